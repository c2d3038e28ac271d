"""EM on the active pairs, for a maximum a posteriori: in batches over all the rows, or online.

The E-step is one scan and the statistics of its active pairs (`mfa_kernels.ops.statistics`); the M-step is in closed
form: means and loadings together, as the coefficients of the augmented latents [z, 1], then the noise (Ghahramani and
Hinton, "The EM algorithm for mixtures of factor analyzers", 1996).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.fitting.sgd import Run, mean_nll, shuffled, standard_deviation
from mfa_kernels.mfa import MFA
from mfa_kernels.ops.factors.reference import factors as exact_factors
from mfa_kernels.ops.statistics.op import Statistics, expectation
from mfa_kernels.ranks import ALONE, Ranks

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Of the prior on covariances, in tokens per region: the best on held-out rows is taken."""

_DEFAULT_STRENGTH = 10.0  # where nothing is held out
_CHOICE_ROWS = 4096  # held-out rows that choose between the strengths
_COVARIANCE_ROWS = 20_000  # of the pooled covariance, at least, and 8 D
_OUTLIER = 1000.0  # times the median squared distance, beyond which a row has no say in the pooled covariance
_BATCH_ELEMENTS = 1 << 22  # of the rows of an E-step, or
_LEAST_BATCH = 4096  # rows, which share one visit to the statistics
_CHUNK_ELEMENTS = 1 << 23  # of the loadings of the components whose M-step runs at once
_TOLERANCE = 1e-5  # nats per token and feature that a pass has to gain
_ONLINE_ROWS = 16  # per component, of an online step at least: fewer would cost more in M-steps than in the scan
_KAPPA = 0.6  # of the step sizes (t + t0)^-kappa; above 0.5 for convergence
_STREAM_EVALUATION = 20  # steps between evaluations on a stream, whose length is not known
_DEAD = 2.0  # tokens that a region owns, below which it is moved
_DUPLICATE = 0.4  # of a region's tokens shared with another (0.5 and more: always both), from which on it is moved
_REVIVALS = 3  # passes that may move regions


@dataclass(frozen=True)
class Prior:
    """What the likelihood is weighed against; conjugate, so that the M-step stays in closed form.

    Every region has seen `strength` further tokens whose residuals have the covariance that regions have on average
    (an inverse Wishart prior on C_k = W_k W_k^T + Psi): a region that owns many tokens hardly notices, one that owns
    few takes over the directions and the noise that its neighbours agree on. On the weights, a Dirichlet prior of
    `tokens` further tokens.

    Attributes:
        covariance: S_0, (D, D) float64.
        strength: nu, tokens per region.
        tokens: of the weights, per region.
    """

    covariance: Tensor
    strength: float = _DEFAULT_STRENGTH
    tokens: float = 1.0

    @torch.no_grad()
    def log_density(self, mfa: MFA) -> Tensor:
        """log p(parameters) but for a constant, (): -nu/2 sum_k (log|C_k| + tr C_k^-1 S_0) + tokens sum_k log pi_k."""
        noise, total = mfa.noise_variance.double(), self.tokens * mfa.log_weights.double().sum()
        for k in _component_chunks(mfa):
            psi = noise if noise.dim() == 1 else noise[k]
            rows, _, log_det = exact_factors(mfa.loadings[k].double(), psi)
            rows = rows * psi.rsqrt().unsqueeze(-2)
            trace = (self.covariance.diagonal() / psi).sum(-1) - ((rows @ self.covariance) * rows).sum((1, 2))
            total = total - self.strength / 2 * (log_det + trace).sum()
        return total


def _component_chunks(mfa: MFA) -> tuple[Tensor, ...]:
    step = max(1, _CHUNK_ELEMENTS // (mfa.n_features * (mfa.rank + 1)))
    return torch.arange(mfa.n_components, device=mfa.means.device).split(step)


def _covariance_rows(mfa: MFA) -> int:
    return max(_COVARIANCE_ROWS, 8 * mfa.n_features)


@torch.no_grad()
def pooled_covariance(mfa: MFA, x: Tensor) -> Tensor:
    """Covariance of the residuals of finite rows x (n, D) in the regions that own them, (D, D) float64."""
    scale = standard_deviation(mfa)
    x = x[: _covariance_rows(mfa)].to(mfa.means)
    owner = mfa.assign(x)
    x, owner = x[owner >= 0], owner[owner >= 0]
    distance = ((x - mfa.means[owner]) / scale).square().sum(1)
    near = distance <= _OUTLIER * distance.median() if len(x) else owner >= 0
    x, owner = x[near], owner[near]
    total = torch.zeros(mfa.n_features, mfa.n_features, dtype=torch.float64, device=x.device)
    for part, k in zip(x.split(_LEAST_BATCH), owner.split(_LEAST_BATCH)):
        y = (part - mfa.means[k]) / scale
        total += y.mT @ y
    scale = scale.double()
    return total / max(1, len(x)) * scale * scale.unsqueeze(1)


@torch.no_grad()
def maximize(mfa: MFA, s: Statistics, prior: Prior, others: Ranks = ALONE) -> Tensor:
    """The M-step: sets the mixture's parameters to those that maximise the expected log posterior.

    With the mean moved by delta, W and delta minimise sum E|y - W z - delta|^2 / Psi over the tokens and those of the
    prior: [W delta] = [cross shift] [[second latent] [latent^T mass]]^-1. The noise is what they leave, but for the
    mixture's noise floor. A region without tokens stays as it is.

    Args:
        mfa: what the statistics were collected under.
        s: the statistics.
        prior: its strengths in the units of `s.mass`.
        others: the ranks that hold the other components, where these are not all.

    Returns:
        How far the means moved, (K, D) float64.
    """
    rank, nu = mfa.rank, prior.strength
    noise = mfa.noise_variance.double()
    shared = noise.dim() == 1
    total = s.mass.sum()
    others.sum_(total)
    components = int(others.totals(mfa.n_components)[0])
    owned = s.mass > 1e-9 * total
    unexplained = s.squares.clone()
    change = torch.empty_like(s.shift)
    loadings = torch.empty_like(mfa.loadings)
    identity = torch.eye(rank, dtype=torch.float64, device=noise.device)
    for k in _component_chunks(mfa):
        old = mfa.loadings[k].double()
        scaled = old / (noise if shared else noise[k]).unsqueeze(-1)
        posterior = torch.linalg.inv(identity + old.mT @ scaled)  # M^-1
        gain = posterior @ scaled.mT  # E[z | y] = gain y
        spread = gain @ prior.covariance
        products = torch.cat([s.cross[k] + nu * spread, s.shift[k].unsqueeze(1)], 1)  # (k, R+1, D)
        gram = torch.empty(len(k), rank + 1, rank + 1, dtype=torch.float64, device=noise.device)
        gram[:, :rank, :rank] = s.second[k] + nu * (spread @ gain.mT + posterior)
        gram[:, :rank, rank] = gram[:, rank, :rank] = s.latent[k]
        gram[:, rank, rank] = s.mass[k]
        own = owned[k]
        if own.all():  # as a rule; the copies of the other case cost as much as the solution
            fitted = torch.cholesky_solve(products, torch.linalg.cholesky(gram))
        else:
            fitted = torch.cat([old.mT, torch.zeros_like(products[:, :1])], 1)
            fitted[own] = torch.cholesky_solve(products[own], torch.linalg.cholesky(gram[own]))
        left = -(fitted * (2 * products - gram @ fitted)).sum(1)
        if shared:
            unexplained += left.sum(0)
        else:
            unexplained[k] += left
        change[k] = fitted[:, rank]
        loadings[k] = fitted[:, :rank].mT.to(loadings)
    if shared:
        others.sum_(unexplained)
    regions = components if shared else 1
    unexplained += regions * nu * prior.covariance.diagonal()
    weight = (total if shared else s.mass.unsqueeze(1)) + regions * nu
    least = 2 * mfa.noise_floor or torch.finfo(mfa.means.dtype).tiny
    psi = torch.where(weight > 0, unexplained / weight, noise).clamp_min(least)
    means = (mfa.means.double() + change).to(mfa.means)
    change = means.double() - mfa.means.double()
    mfa.means.copy_(means)
    mfa.loadings.copy_(loadings)
    mfa.log_noise.copy_((psi - mfa.noise_floor).log())
    mfa.weight_logits.copy_(((s.mass + prior.tokens) / (total + components * prior.tokens)).log())
    return change


def choose_prior(mfa: MFA, s: Statistics, covariance: Tensor, held_out: Tensor, ranks: Ranks = ALONE) -> Prior:
    """The prior whose M-step serves held-out rows (n, D), of all ranks, best; the mixture is left as it was."""
    if not ranks.totals(len(held_out))[0]:
        return Prior(covariance)
    before = [p.detach().clone() for p in mfa.parameters()]
    scores = {}
    for strength in STRENGTHS:
        maximize(mfa, s, Prior(covariance, strength))
        nll = mean_nll(mfa, held_out[: -(-_CHOICE_ROWS // ranks.size)], ranks)
        scores[strength] = nll if math.isfinite(nll) else math.inf
        with torch.no_grad():
            for parameter, kept in zip(mfa.parameters(), before):
                parameter.copy_(kept)
    return Prior(covariance, min(scores, key=scores.__getitem__))


def statistics_state(s: Statistics) -> dict[str, Tensor]:
    """Statistics by the names they have in a checkpoint."""
    return {f"statistics.{field.name}": getattr(s, field.name) for field in fields(Statistics)}


class Overlap:
    """How much of their tokens pairs of regions share: sum_n r_ni r_nj over the two largest responsibilities."""

    def __init__(self, components: int) -> None:
        self.components = components
        self.pairs: list[Tensor] = []
        self.shares: list[Tensor] = []

    def add(self, components: Tensor, responsibilities: Tensor) -> None:
        """Counts a batch: (N, S) both, largest first."""
        if components.shape[1] < 2:
            return
        both = (components[:, 1] >= 0) & (responsibilities[:, 1] > 0)
        pair = components[both, :2].long().sort(1).values
        code, place = (pair[:, 0] * self.components + pair[:, 1]).unique(return_inverse=True)
        share = torch.zeros(len(code), dtype=torch.float64, device=code.device)
        share.index_put_((place,), responsibilities[both, :2].double().prod(1), accumulate=True)
        self.pairs.append(code)
        self.shares.append(share)

    def clear(self) -> None:
        """Forgets all of them."""
        self.pairs, self.shares = [], []

    def pool(self, ranks: Ranks) -> None:
        """Adds what the other ranks have counted, in the order of the ranks."""
        if ranks.size > 1:
            none = torch.empty(0, device=ranks.device)
            self.pairs = [ranks.concatenated(torch.cat([none.long(), *self.pairs]))]
            self.shares = [ranks.concatenated(torch.cat([none.double(), *self.shares]))]

    def duplicates(self, mass: Tensor) -> list[tuple[int, int]]:
        """Pairs of regions that explain the same tokens, given what each owns, (K,)."""
        if not self.pairs:
            return []
        code, place = torch.cat(self.pairs).unique(return_inverse=True)
        share = torch.zeros(len(code), dtype=torch.float64, device=code.device)
        share.index_put_((place,), torch.cat(self.shares), accumulate=True)
        first, second = code // self.components, code % self.components
        same = share > _DUPLICATE * torch.minimum(mass[first], mass[second])
        return list(zip(first[same].tolist(), second[same].tolist()))


@torch.no_grad()
def revive(mfa: MFA, mass: Tensor, overlap: Overlap, covariance: Tensor) -> int:
    """Moves the regions that own next to nothing, or what another one owns too: each takes half of the largest.

    A region is split across its widest direction u (unit latent variance): the halves of a normal distribution have
    their means at +-sqrt(2/pi) u, and the variance 1 - 2/pi along u.

    Args:
        mfa: changed in place.
        mass: tokens of each region, (K,).
        overlap: of the same pass.
        covariance: pooled, (D, D): the directions of a mixture of rank 0.

    Returns:
        Regions moved.
    """
    mass = mass.clone()
    for first, second in overlap.duplicates(mass):
        small, large = sorted((first, second), key=lambda k: float(mass[k]))
        mass[large] += mass[small]
        mass[small] = 0
    moved = 0
    for k in (mass < _DEAD).nonzero().squeeze(1).tolist():
        donor = int(mass.argmax())
        if mass[donor] < 2 * _DEAD:
            break
        if mfa.rank:
            u, strength, rotation = torch.linalg.svd(mfa.loadings[donor].double(), full_matrices=False)
            direction = u[:, 0] * strength[0]
            strength[0] *= math.sqrt(1 - 2 / math.pi)
            mfa.loadings[donor] = (u * strength @ rotation).to(mfa.loadings)
            mfa.loadings[k] = mfa.loadings[donor]
        else:
            values, vectors = torch.linalg.eigh(covariance)
            direction = vectors[:, -1] * values[-1].clamp_min(0).sqrt()
        step = (math.sqrt(2 / math.pi) * direction).to(mfa.means)
        mfa.means[k] = mfa.means[donor] - step
        mfa.means[donor] += step
        if mfa.log_noise.dim() == 2:
            mfa.log_noise[k] = mfa.log_noise[donor]
        mass[donor] /= 2
        mass[k] = mass[donor]
        mfa.weight_logits[donor] -= math.log(2)
        mfa.weight_logits[k] = mfa.weight_logits[donor]
        moved += 1
    return moved


class _EM(Run):
    """What batch and online EM share.

    Args:
        start_rows: (n, D), finite and on the mixture's device: the rows that the start was made of, a rank's share.
    """

    def __init__(self, *args: Any, start_rows: Tensor) -> None:
        super().__init__(*args)
        first = self.ranks.gathered(start_rows[: _covariance_rows(self.mfa)])
        self.covariance = pooled_covariance(self.mfa, first)
        self.ranks.broadcast_(self.covariance)
        self.prior: Prior | None = None  # until the first statistics are there to choose it by
        self.step = self.batch = 0  # M-steps done, and batches of the pass going on

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        tensors["covariance"] = self.covariance
        strengths = None if self.prior is None else [self.prior.strength, self.prior.tokens]
        return tensors, values | {"prior": strengths, "step": self.step, "batch": self.batch}

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.covariance = tensors["covariance"].to(self.covariance, copy=True)
        self.prior = None if values["prior"] is None else Prior(self.covariance, *values["prior"])
        self.step, self.batch = values["step"], values["batch"]

    def _saved_statistics(self, tensors: Mapping[str, Tensor]) -> Statistics:
        device = self.mfa.means.device
        return Statistics(*(tensors[f"statistics.{f.name}"].to(device, copy=True) for f in fields(Statistics)))

    def _zeros(self) -> Statistics:
        return Statistics.zeros(self.mfa.means, self.mfa.rank, self.mfa.log_noise.dim() == 2)

    def _expect(self, x: Tensor, out: Statistics, token_weight: float | None = None) -> tuple[Any, Tensor]:
        with torch.no_grad():
            means, loadings, noise, log_weights = self.mfa.parameters_in_compute_dtype()
            weights = None if token_weight is None else torch.full_like(x[:, 0], token_weight, dtype=means.dtype)
            return expectation(x, means, loadings, noise, log_weights, self.mfa.factors(), out, weights)

    def _choose_prior(self, s: Statistics) -> Prior:
        if not float(s.mass.sum()) > 0:
            raise RuntimeError("fit: no row has a finite density; look at the scale of the activations")
        self.prior = choose_prior(self.mfa, s, self.covariance, self.held_out, self.ranks)
        self.report.prior_strength = self.prior.strength
        return self.prior

    def _batch_rows(self) -> int:
        return max(_LEAST_BATCH, _BATCH_ELEMENTS // self.mfa.n_features)


class BatchEM(_EM):
    """A pass over all the rows for every M-step; the log posterior never falls, but where a region is moved."""

    def __init__(self, *args: Any, start_rows: Tensor) -> None:
        super().__init__(*args, start_rows=start_rows)
        self.rows = self.rows.sort().values  # as disks like it; the order does not matter
        self.log_posteriors: list[float] = []  # per token, before each M-step
        self.revivals = 0  # passes that moved regions
        self.partial: tuple[Statistics, Overlap] | None = None  # of the batches of a pass that were seen
        self.seen = 0  # their rows, of all ranks

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        tensors["log_posteriors"] = torch.tensor(self.log_posteriors, dtype=torch.float64)
        if self.partial is not None:
            s, overlap = self.partial
            self._pool(s, overlap)
            if not self.ranks.first:  # what was seen so far is with rank 0, as after the checkpoint is read
                s.scale_(0)
                overlap.clear()
            tensors |= statistics_state(s)
            if overlap.pairs:
                tensors |= {"overlap.pairs": torch.cat(overlap.pairs), "overlap.shares": torch.cat(overlap.shares)}
        return tensors, values | {"revivals": self.revivals, "seen": self.seen}

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.log_posteriors, self.revivals = tensors["log_posteriors"].tolist(), values["revivals"]
        self.seen = values["seen"]
        if self.seen:
            overlap, device = Overlap(self.mfa.n_components), self.mfa.means.device
            if "overlap.pairs" in tensors:
                overlap.pairs = [tensors["overlap.pairs"].to(device, copy=True)]
                overlap.shares = [tensors["overlap.shares"].to(device, copy=True)]
            self.partial = self._saved_statistics(tensors), overlap
            if not self.ranks.first:
                self.partial = None

    def run(self) -> None:
        """Ends when a pass gains too little to matter, when patience runs out, or after `epochs` passes."""
        from tqdm import tqdm

        passes = self.settings.epochs
        every = self.settings.eval_every or 1
        bar = tqdm(
            total=passes * len(self.rows),
            initial=self.step * len(self.rows) + self.seen,
            desc="EM",
            unit="token",
            unit_scale=True,
            disable=not self.settings.progress,
        )
        with bar:
            if not self.report.history:
                self._evaluate(0, 0, bar)
            for step in range(self.step + 1, passes + 1):
                s, overlap = self._pass(step == 1, bar)
                prior = self.prior or self._choose_prior(s)
                tokens = float(s.mass.sum())
                self.losses.append(-float(s.log_likelihood) / tokens)
                self.log_posteriors.append(float(s.log_likelihood + prior.log_density(self.mfa)) / tokens)
                maximize(self.mfa, s, prior)
                moved = 0
                if self.revivals < _REVIVALS and step < passes:
                    moved = revive(self.mfa, s.mass, overlap, self.covariance)
                    self.revivals += moved > 0
                    self.report.revived_components += moved
                settled = step == passes or (not moved and self._settled())
                if step % every == 0 or settled:
                    self._evaluate(step, step, bar)
                if settled or self._out_of_patience(finished=step == passes):
                    return
                self.step, self.seen, self.partial = step, 0, None
                self._save_if_due()

    def _pass(self, count_skipped: bool, bar: Any) -> tuple[Statistics, Overlap]:
        s, overlap = self.partial = self.partial or (self._zeros(), Overlap(self.mfa.n_components))
        left = self.rows[self.seen :]
        batches = left.split(self._batch_rows() * self.ranks.size) if len(left) else ()
        for batch, x in zip(batches, self._read(iter(batches))):
            bar.update(len(batch))
            x = self._finite(x, count_skipped)
            active, responsibilities = self._expect(x, s)
            overlap.add(active.components, responsibilities)
            self.tokens += len(x)
            self.seen += len(batch)
            self._save_if_due()
        self._pool(s, overlap)
        return s, overlap

    def _pool(self, s: Statistics, overlap: Overlap) -> None:
        """Puts what all ranks have seen into each one's."""
        self.ranks.sum_(*s.tensors())
        overlap.pool(self.ranks)

    def _settled(self) -> bool:
        before, now = self.log_posteriors[-2:] if len(self.log_posteriors) > 1 else (-math.inf, math.inf)
        return abs(now - before) < _TOLERANCE * self.mfa.n_features


def online_rows(components: int, batch_size: int) -> int:
    """Rows of an online step."""
    return max(batch_size, _ONLINE_ROWS * components)


class OnlineEM(_EM):
    """An M-step every few rows, from statistics that forget: for streams, and data of which one pass is enough.

    The statistics s of a token are averaged by s <- (1 - eta) s + eta s_batch with eta = (t + t0)^-kappa (stochastic
    approximation EM: Cappe and Moulines, "On-line expectation-maximization", 2009), from those of the rows that the
    start was made of, which count as t0 batches.

    Args:
        stream: batches of rows (n, D) to read after the start rows; None: `epochs` passes over the source's.
    """

    statistics: Statistics  # per token; of the parameters' past, about the means that they have now
    about: Tensor  # these means

    def __init__(self, *args: Any, start_rows: Tensor, stream: Iterable[Tensor] | None = None) -> None:
        super().__init__(*args, start_rows=start_rows)
        self.start_rows: Tensor | None = start_rows  # until they have been looked at
        self.stream = stream
        self.batch_rows = online_rows(self.mfa.n_components, self.settings.batch_size)
        self.known = 1.0  # batches that the start rows are worth
        self.epoch = 1  # the pass going on
        self.order = self.generator.get_state()  # that its order is drawn from

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        tensors["order"] = self.order
        if self.start_rows is None:
            tensors |= {**statistics_state(self.statistics), "about": self.about}
        return tensors, values | {"known": self.known, "epoch": self.epoch}

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.generator.set_state(tensors["order"])
        self.known, self.epoch = values["known"], values["epoch"]
        if "about" in tensors:
            self.start_rows = None
            self.about = tensors["about"].to(self.mfa.means, copy=True)
            self.statistics = self._saved_statistics(tensors)

    def run(self) -> None:
        """Ends when the rows do, or when patience runs out."""
        from tqdm import tqdm

        settings = self.settings
        passes = settings.epochs if self.stream is None else min(1, settings.epochs)
        per_pass = -(-len(self.rows) // self.batch_rows)
        total = None if self.stream is not None else passes * len(self.rows)
        every = settings.eval_every or (per_pass if self.stream is None else _STREAM_EVALUATION)
        bar = tqdm(
            total=total,
            initial=(self.epoch - 1) * len(self.rows) + min(len(self.rows), self.batch * self.batch_rows),
            desc="online EM",
            unit="token",
            unit_scale=True,
            disable=not settings.progress,
        )
        with bar:
            if not self.report.history:
                self._evaluate(0, 0, bar)
            if not passes:
                return
            if self.start_rows is not None:
                self._look_at_start(self.start_rows)
                self._save_if_due()
            for epoch in range(self.epoch, passes + 1):
                self.epoch, self.order = epoch, self.generator.get_state()
                for x in self._batches(bar):
                    x = self._finite(x, count_skipped=epoch == 1)
                    self.batch += 1
                    rows = int(self.ranks.totals(len(x))[0])
                    if not rows:
                        continue
                    self.step += 1
                    self._step(x, rows, (self.step + self.known) ** -_KAPPA)
                    if self.step % every == 0:
                        self._evaluate(self.step, epoch, bar)
                        if self._out_of_patience(finished=False):
                            return
                    self._save_if_due()
                self.batch = 0
            if self.step % every or not self.step:
                self._evaluate(self.step, passes, bar)

    def _look_at_start(self, start_rows: Tensor) -> None:
        """The statistics of the start rows, and the first M-step."""
        s, rows = self._zeros(), len(start_rows)
        for x in start_rows.split(self._batch_rows()):
            self._expect(x, s)
            self.tokens += len(x)
        self.ranks.sum_(*s.tensors())
        rows = int(self.ranks.totals(rows)[0])
        self.start_rows = None
        self._maximize(s, self._choose_prior(s))
        self.statistics.scale_(1 / rows)
        self.known = max(1.0, rows / self.batch_rows)

    def _step(self, x: Tensor, rows: int, eta: float) -> None:
        """x (n, D) are this rank's of the `rows` of a batch."""
        s, prior = self.statistics, self.prior
        assert prior is not None
        s.scale_(1 - eta if self.ranks.first else 0)  # the past counts once
        active, _ = self._expect(x, s, eta / rows)
        self.ranks.sum_(*s.tensors())
        counted = active.log_prob[active.components[:, 0] >= 0]
        total, count = self.ranks.totals(float(counted.double().sum()), len(counted))
        if count:
            self.losses.append(-total / count)
        self.tokens += len(x)
        window = rows / eta  # tokens that the statistics remember
        self._maximize(s, replace(prior, strength=prior.strength / window, tokens=prior.tokens / window))

    def _maximize(self, s: Statistics, prior: Prior) -> None:
        """The M-step; the statistics kept are about the new means."""
        self.statistics = s.moved(maximize(self.mfa, s, prior))
        self.about = self.mfa.means.detach().clone()

    def _parameters_changed(self) -> None:
        if hasattr(self, "statistics"):
            self.statistics = self.statistics.moved(self.mfa.means.detach().double() - self.about)
            self.about = self.mfa.means.detach().clone()

    def _batches(self, bar: Any) -> Iterator[Tensor]:
        """This rank's share of the batches of a pass that were not seen yet."""
        if self.stream is None:
            order = shuffled(self.rows, self.batch_rows, self.generator)
            yield from self._read(islice(order, self.batch, None), bar)
            return
        own = islice(_regrouped(self.stream, -(-self.batch_rows // self.ranks.size)), self.batch, None)
        empty = torch.empty(0, self.source.n_features, dtype=self.source.dtype)
        for x, rows in self.ranks.together(own, empty):
            bar.update(rows)
            yield x


def _regrouped(batches: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """The rows of the batches in order, `rows` at a time; the last may be fewer."""
    held: list[Tensor] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch)
        if count >= rows:
            *full, rest = torch.cat(held).split(rows)
            yield from full
            held, count = [rest], len(rest)
            if count == rows:
                yield rest
                held, count = [], 0
    if count:
        yield torch.cat(held)

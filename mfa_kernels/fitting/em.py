"""EM on the active pairs, for a maximum a posteriori: in batches over all the rows, or online.

The E-step is one scan (`mfa_kernels.mixture.screening`) and the statistics of its active pairs
(`mfa_kernels.ops.statistics`), the M-step is in closed form (`mfa_kernels.fitting.m_step`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.fitting.dead_regions import Overlap, find, hand_on, move
from mfa_kernels.fitting.m_step import Prior, covariance_rows, maximize, pooled_covariance
from mfa_kernels.fitting.row_weights import Weighed
from mfa_kernels.fitting.run import Run, mean_nll, shuffled
from mfa_kernels.fitting.streaming import Feed, Steps
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.screening import SAMPLE, Screening
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.statistics.op import SufficientStatistics, expectation

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Of the prior on covariances, in tokens per region: the best on held-out rows is taken."""

_CHOICE_ROWS = 4096  # held-out rows that choose between the strengths
_BATCH_ELEMENTS = 1 << 22  # of the rows of an E-step, or
_LEAST_BATCH = 4096  # rows, which share one visit to the statistics
_TOLERANCE = 1e-5  # nats per token and feature that a pass has to gain
_ONLINE_ROWS = 16  # per component, of an online step at least: fewer would cost more in M-steps than in the scan
_KAPPA = 0.6  # of the step sizes (t + t0)^-kappa; above 0.5 for convergence
_STREAM_EVALUATION = 20  # steps between evaluations on a stream, whose length is not known
_OVERRELAXED = 1.9  # times EM's own step
_REVIVALS = 3  # passes that may move regions
_REVIVAL_ROWS = 64  # per component, after which online EM looks for regions that own nothing


def choose_prior(
    mfa: Mixture,
    s: SufficientStatistics,
    covariance: Tensor,
    held_out: Tensor,
    processes: Processes = ALONE,
    weights: Tensor | None = None,
) -> Prior:
    """The prior whose M-step serves held-out rows (n, D), which weigh (n,), of all processes, best; the mixture is left
    as it was."""
    if not processes.totals(len(held_out))[0]:
        return Prior(covariance)
    before = [p.detach().clone() for p in mfa.parameters()]
    few = slice(-(-_CHOICE_ROWS // processes.count))
    scores = {}
    for strength in STRENGTHS:
        maximize(mfa, s, Prior(covariance, strength))
        nll = mean_nll(mfa, held_out[few], processes, None if weights is None else weights[few])
        scores[strength] = nll if math.isfinite(nll) else math.inf
        with torch.no_grad():
            for parameter, kept in zip(mfa.parameters(), before):
                parameter.copy_(kept)
    return Prior(covariance, mfa.processes.agree(lambda: min(scores, key=scores.__getitem__)))


def statistics_state(s: SufficientStatistics) -> dict[str, Tensor]:
    """Statistics by the names they have in a checkpoint."""
    return {f"statistics.{field.name}": getattr(s, field.name) for field in fields(SufficientStatistics)}


class _EM(Run):
    """What batch and online EM share.

    Args:
        start_rows: (n, D), finite, on any device: the rows that the start was made of, a process's share.
        start_weights: of these, (n,) float64 on their device, where the source's rows have weights.
    """

    def __init__(
        self,
        *args: Any,
        start_rows: Tensor,
        start_weights: Tensor | None = None,
        held_out_weights: Tensor | None = None,
    ) -> None:
        super().__init__(*args, held_out_weights=held_out_weights)
        first = slice(covariance_rows(self.mfa))
        weights = None if start_weights is None else self.processes.gathered(start_weights[first])
        self.covariance = pooled_covariance(self.mfa, self.processes.gathered(start_rows[first]), weights)
        self.processes.broadcast_(self.covariance)
        # Its own rows: a view would hold all of those that the start was made of, for the length of the fit.
        self.screening = Screening(self._held(), start_rows[:SAMPLE].clone(), self.processes)
        self.prior: Prior | None = None  # until the first statistics are there to choose it by
        self.step = self.batch = 0  # M-steps done, and batches of the pass going on

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        basis, screening = self.screening.state()
        tensors |= {"covariance": self.covariance} | basis
        strengths = None if self.prior is None else [self.prior.strength, self.prior.tokens]
        return tensors, values | {"prior": strengths, "step": self.step, "batch": self.batch} | screening

    def _like(self) -> dict[str, Tensor]:
        nowhere = self.mfa.means.detach().to("meta")
        statistics = SufficientStatistics.zeros(nowhere, self.mfa.rank, self.mfa.log_noise.dim() == 2)
        return super()._like() | statistics_state(statistics) | {"covariance": self.covariance}

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.covariance = tensors["covariance"].to(self.covariance, copy=True)
        self.prior = None if values["prior"] is None else Prior(self.covariance, *values["prior"])
        self.step, self.batch = values["step"], values["batch"]
        self.screening.load(tensors, values)

    def _saved_statistics(self, tensors: Mapping[str, Tensor]) -> SufficientStatistics:
        device = self.mfa.means.device
        return SufficientStatistics(
            *(tensors[f"statistics.{f.name}"].to(device, copy=True) for f in fields(SufficientStatistics))
        )

    def _saved_overlap(self, tensors: Mapping[str, Tensor]) -> Overlap:
        overlap = Overlap(self.mfa.n_components)
        overlap.load(tensors, self.mfa.means.device)
        return overlap

    def _held(self) -> MFA:
        """The components that this process scans."""
        return self.mfa

    def _count(self, s: SufficientStatistics) -> float:
        """Tokens behind the statistics."""
        return self.mfa.processes.totals(float(s.mass.sum()))[0]

    def _zeros(self) -> SufficientStatistics:
        return SufficientStatistics.zeros(self.mfa.means, self.mfa.rank, self.mfa.log_noise.dim() == 2)

    def _expect(self, batch: Weighed, out: SufficientStatistics, unit: float | None = None) -> tuple[Any, Tensor]:
        """Adds the statistics of a batch, in whose weights 1 is `unit`."""
        with torch.no_grad():
            x, weights = batch
            means, loadings, noise, log_weights = self.mfa.parameters_in_compute_dtype()
            if weights is not None:
                weights = weights * (1.0 if unit is None else unit)
            elif unit is not None:
                weights = torch.full_like(x[:, 0], unit, dtype=means.dtype)
            active = self.screening.scan(x)
            return expectation(x, means, loadings, noise, log_weights, self.mfa.woodbury(), out, weights, active)

    def _scan(self, x: Tensor) -> ActivePairs:
        return self.screening.scan(x)

    def _choose_prior(self, s: SufficientStatistics) -> Prior:
        if not self._count(s) > 0:
            raise RuntimeError("fit: no row has a finite density; look at the scale of the activations")
        self.prior = choose_prior(self.mfa, s, self.covariance, self.held_out, self.processes, self.held_out_weights)
        self.report.prior_strength = self.prior.strength
        assert self.start is not None
        self.start = self.start[0], self._log_prior()  # the parameters are still those of the start
        return self.prior

    def _log_prior(self) -> float:
        return 0.0 if self.prior is None else float(self.prior.log_density(self.mfa))

    def _expect_alone(self, x: Tensor, out: SufficientStatistics, weights: Tensor) -> ActivePairs:
        """Adds the statistics of a few tokens that weigh (n,), by a scan that goes through no bounds."""
        parameters = self.mfa.parameters_in_compute_dtype()
        return expectation(x, *parameters, self.mfa.woodbury(), out, weights)[0]

    def _batch_rows(self) -> int:
        return max(_LEAST_BATCH, _BATCH_ELEMENTS // self.mfa.n_features)


class BatchEM(_EM):
    """A pass over all the rows for every M-step, which goes nearly twice as far as EM's: half the passes.

    Near where EM settles, a step scaled by anything below 2 shrinks what is left, and most of what is left is in
    directions that EM's own step shortens by little (Salakhutdinov and Roweis, "Adaptive overrelaxed bound
    optimization methods", 2003). Where the log posterior has fallen after all, EM's own step is taken instead, so that
    it never falls from one of them to the next, but where a region is moved.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows = self.rows.sort().values  # as disks like it; the order does not matter
        self.log_posteriors: list[float] = []  # per token, before each M-step
        self.revivals = 0  # passes that moved regions
        self.moved = 0  # of these, in the pass before
        self.plain: list[Tensor] | None = None  # where EM's own step had come to, where the last one did not stay there
        self.calm = False  # whether the last step was EM's own, or went further and did not fall
        self.partial: tuple[SufficientStatistics, Overlap] | None = None  # of the batches of a pass that were seen
        self.seen = 0  # their rows, of all processes

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        tensors["log_posteriors"] = torch.tensor(self.log_posteriors, dtype=torch.float64)
        if self.partial is not None:
            s, overlap = self.partial
            self._pool(s, overlap)
            if not self.processes.first:  # what was seen so far is with process 0, as after the checkpoint is read
                s.scale_(0)
                overlap.clear()
            tensors |= statistics_state(s) | overlap.state()
        tensors |= {f"plain.{i}": p for i, p in enumerate(self.plain or ())}
        return tensors, values | {
            "revivals": self.revivals, "moved": self.moved, "calm": self.calm, "seen": self.seen,
        }  # fmt: skip

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.log_posteriors, self.revivals = tensors["log_posteriors"].tolist(), values["revivals"]
        self.calm, self.seen, self.moved = values["calm"], values["seen"], values["moved"]
        device = self.mfa.means.device
        self.plain = [tensors[f"plain.{i}"].to(device, copy=True) for i in range(4) if f"plain.{i}" in tensors] or None
        if self.seen and self.processes.first:
            self.partial = self._saved_statistics(tensors), self._saved_overlap(tensors)

    def run(self) -> None:
        """Ends when a pass gains too little to matter, when patience runs out, or after `epochs` passes."""
        passes = self.settings.epochs
        every = self.settings.eval_every or 1
        bar = progress_bar(
            total=passes * len(self.rows),
            initial=self.step * len(self.rows) + self.seen,
            desc=f"{self.settings.label}EM",
            unit="token",
            unit_scale=True,
            progress=self.settings.progress,
        )
        with bar:
            if not self.report.history:
                self._prepare(passes)
                self._evaluate(0, 0, bar)
            for step in range(self.step + 1, passes + 1):
                s, overlap = self._pass(step == 1, bar)
                prior = self.prior or self._choose_prior(s)
                tokens = self._count(s)
                self.losses.append(-float(s.log_likelihood) / tokens)
                log_posterior = float(s.log_likelihood + prior.log_density(self.mfa)) / tokens
                moved = self._step(s, overlap, prior, log_posterior, last=step == passes)
                self.report.settled = step < passes and not moved and self._settled()
                settled = step == passes or self.report.settled
                self.screening.parameters_moved()
                self._prepare(0 if settled else passes - step)
                if step % every == 0 or settled:
                    self._evaluate(step, step, bar)
                if settled or self._out_of_patience(finished=step == passes):
                    return
                self.step, self.seen, self.partial = step, 0, None
                self._save_if_due()

    def _step(self, s: SufficientStatistics, overlap: Overlap, prior: Prior, log_posterior: float, last: bool) -> bool:
        """The M-step; whether it moved regions, or went back to where EM's own step had come to."""
        if self.plain is not None and not log_posterior >= self.log_posteriors[-1]:
            self._put(self.plain)
            self.plain, self.calm = None, False
            if self.moved:  # what was gained by that does not make up for what was lost: it would not the next time
                self.revivals = _REVIVALS
                self.report.revived_components -= self.moved
                self.moved = 0
            return True
        self.moved = 0
        self.log_posteriors.append(log_posterior)
        before = self._copy()
        maximize(self.mfa, s, prior)
        own = None if last else self._copy()
        if own is not None and self.revivals < _REVIVALS and self._revive(s, overlap, prior, before):
            self.plain, self.calm = own, False
            return True
        self.plain = own if self.calm else None
        if self.plain is not None:
            with torch.no_grad():
                for parameter, old in zip(self.mfa.parameters(), before):
                    parameter.add_(parameter - old, alpha=_OVERRELAXED - 1)
        self.calm = True
        return False

    def _revive(self, s: SufficientStatistics, overlap: Overlap, prior: Prior, before: list[Tensor]) -> bool:
        """Moves regions after an M-step from the parameters `before`; whether there are such."""
        revival = find(self.mfa, s.mass, overlap, self.guard)
        if not revival.moves:
            return False
        if revival.lost:  # the M-step is done again, for their tokens
            own = self._copy()
            self._put(before)
            if not hand_on(self.mfa, revival, s, self._expect_alone):
                self._put(own)
                return False
            maximize(self.mfa, s, prior)
        move(self.mfa, revival, self.covariance)
        self.revivals += 1
        self.moved = len(revival.moves)
        self.report.revived_components += self.moved
        return True

    def _parameters_changed(self) -> None:
        self.plain, self.calm = None, False

    def _prepare(self, passes: int) -> None:
        """For the rows held out and, where passes are to come, for the next one."""
        rows = len(self.rows) // self.processes.count + len(self.held_out)
        self.screening.prepare(rows if passes else len(self.held_out), passes * rows)

    def _pass(self, count_skipped: bool, bar: Any) -> tuple[SufficientStatistics, Overlap]:
        self._prepare(self.settings.epochs - self.step)  # where a checkpoint or a callback came between
        s, overlap = self.partial = self.partial or (self._zeros(), Overlap(self.mfa.n_components))
        left = self.rows[self.seen :]
        batches = left.split(self._batch_rows() * self.processes.count) if len(left) else ()
        for batch, read in zip(batches, self._read(iter(batches))):
            bar.update(len(batch))
            found = self._finite(read, count_skipped)
            active, responsibilities = self._expect(found, s)
            overlap.add(active.components, responsibilities)
            self.tokens += len(found.rows)
            self.seen += len(batch)
            self._save_if_due()
        self._pool(s, overlap)
        return s, overlap

    def _pool(self, s: SufficientStatistics, overlap: Overlap) -> None:
        """Puts what all processes have seen into each one's."""
        self.processes.sum_(*s.tensors())
        overlap.pool(self.processes)

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
        stream: of the rows after the start rows; None: `epochs` passes over the source's.
    """

    statistics: SufficientStatistics  # per token; of the parameters' past, about the means that they have now
    counted: Tensor  # tokens of each region held here since regions were looked at for revival, (K,)
    about: Tensor  # these means

    def __init__(
        self,
        *args: Any,
        start_rows: Tensor,
        start_weights: Tensor | None = None,
        held_out_weights: Tensor | None = None,
        stream: Feed | None = None,
    ) -> None:
        super().__init__(*args, start_rows=start_rows, start_weights=start_weights, held_out_weights=held_out_weights)
        self.start_rows: Tensor | None = start_rows  # until they have been looked at
        self.start_weights = start_weights
        self.stream = stream
        self.batch_rows = online_rows(self.mfa.n_components, self.settings.batch_size)
        self.known = 1.0  # batches that the start rows are worth
        self.overlap = Overlap(self.mfa.n_components)  # of the same tokens as `counted`
        self.counted = torch.zeros(len(self.mfa.means), dtype=torch.float64, device=self.mfa.means.device)
        self.epoch = 1  # the pass going on
        self.order = self.generator.get_state()  # that its order is drawn from

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        self.overlap.pool(self.processes)
        if not self.processes.first:  # what was counted so far is with process 0, as after the checkpoint is read
            self.overlap.clear()
        tensors |= {"order": self.order, "counted": self.counted} | self.overlap.state()
        if self.start_rows is None:
            tensors |= {**statistics_state(self.statistics), "about": self.about}
        return tensors, values | {"known": self.known, "epoch": self.epoch}

    def _like(self) -> dict[str, Tensor]:
        return super()._like() | {"order": self.order, "counted": self.counted, "about": self.mfa.means}

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.generator.set_state(tensors["order"])
        self.known, self.epoch = values["known"], values["epoch"]
        self.counted = tensors["counted"].to(self.counted, copy=True)
        if self.processes.first:
            self.overlap = self._saved_overlap(tensors)
        if "about" in tensors:
            self.start_rows = None
            self.about = tensors["about"].to(self.mfa.means, copy=True)
            self.statistics = self._saved_statistics(tensors)

    def run(self) -> Steps:
        """Ends when the rows do, or when patience runs out."""
        settings = self.settings
        passes = settings.epochs if self.stream is None else min(1, settings.epochs)
        per_pass = -(-len(self.rows) // self.batch_rows)
        total = None if self.stream is not None else passes * len(self.rows)
        every = settings.eval_every or (per_pass if self.stream is None else _STREAM_EVALUATION)
        bar = progress_bar(
            total=total,
            initial=(self.epoch - 1) * len(self.rows) + min(len(self.rows), self.batch * self.batch_rows),
            desc=f"{settings.label}online EM",
            unit="token",
            unit_scale=True,
            progress=settings.progress,
        )
        with bar:
            if not self.report.history:
                rows = 0 if self.start_rows is None else len(self.start_rows)
                self.screening.prepare(rows + len(self.held_out), self._to_come())
                self._evaluate(0, 0, bar)
            if not passes:
                return
            if self.start_rows is not None:
                self._look_at_start(self.start_rows)
                self._save_if_due()
            for epoch in range(self.epoch, passes + 1):
                self.epoch, self.order = epoch, self.generator.get_state()
                for read in self._batches(bar):
                    if read is None:
                        assert self.stream is not None
                        self.stream.put((yield))
                        continue
                    batch = self._finite(read, count_skipped=epoch == 1)
                    self.batch += 1
                    rows = int(self.processes.totals(len(batch.rows))[0])
                    if not rows:
                        continue
                    self.step += 1
                    self._step(batch, rows, (self.step + self.known) ** -_KAPPA)
                    if self.step % every == 0:
                        self.screening.prepare(len(batch.rows) + len(self.held_out), self._to_come())
                        self._evaluate(self.step, epoch, bar)
                        if self._out_of_patience(finished=False):
                            return
                    self._save_if_due()
                self.batch = 0
            if self.step % every or not self.step:
                self.screening.prepare(len(self.held_out), 0)
                self._evaluate(self.step, passes, bar)

    def _to_come(self) -> float:
        """Rows of the rest of the run."""
        if self.stream is not None:
            return math.inf
        return (self.settings.epochs + 1 - self.epoch) * len(self.rows) - self.batch * self.batch_rows

    def _look_at_start(self, start_rows: Tensor) -> None:
        """The statistics of the start rows, and the first M-step."""
        s, before, mass = self._zeros(), self.tokens, 0.0
        self.screening.prepare(len(start_rows), self._to_come())  # where a checkpoint or a callback came between
        for batch in self._start_batches(start_rows):
            self._expect(batch, s)
            self.tokens += len(batch.rows)
            mass += batch.mass
        self.processes.sum_(*s.tensors())
        rows, mass = self.processes.totals(self.tokens - before, mass)
        self.start_rows = self.start_weights = None
        self._maximize(s, self._choose_prior(s))
        self.statistics.scale_(1 / mass)
        self.known = max(1.0, rows / self.batch_rows)

    def _start_batches(self, start_rows: Tensor) -> Iterable[Weighed]:
        device, weights = self.mfa.means.device, self.start_weights
        parts = start_rows.split(self._batch_rows())
        theirs = [None] * len(parts) if weights is None else weights.split(self._batch_rows())
        for part, own in zip(parts, theirs):
            yield Weighed(part.to(device), None if own is None else own.to(device))

    def _step(self, batch: Weighed, rows: int, eta: float) -> None:
        """The batch is this process's of so many `rows`.

        They weigh as much as that many rows do on average: of batches of heavy rows, the statistics take up more.
        """
        x, weights = batch
        s, prior = self.statistics, self.prior
        assert prior is not None
        self.screening.prepare(len(x), self._to_come())
        s.scale_(1 - eta if self.processes.first else 0)  # the past counts once
        unit, remembered = eta / (rows * self.mean_weight), s.mass.clone()
        active, responsibilities = self._expect(batch, s, unit)
        fresh = (s.mass - remembered) / unit
        self.processes.sum_(*s.tensors(), fresh)
        self.counted += fresh
        self.overlap.add(active.components, responsibilities / unit)
        known = active.components[:, 0] >= 0
        found = Weighed(active.log_prob[known].double(), None if weights is None else weights[known])
        total = float((found.rows if found.weights is None else found.rows * found.weights).sum())
        total, mass = self.processes.totals(total, found.mass)
        if mass:
            self.losses.append(-total / mass)
        self.tokens += len(x)
        # The prior is worth its tokens among all the rows there are, not among those that the statistics remember:
        # fewer of a long stream, and more where the same few rows come again and again.
        seen = self._rows_behind()
        prior = replace(prior, strength=prior.strength / seen, tokens=prior.tokens / seen)
        self._maximize(s, prior)
        due = _REVIVAL_ROWS * self.mfa.n_components
        tokens = self.mfa.processes.totals(float(self.counted.sum()))[0]
        if tokens >= due:
            if self._to_come() * self.mean_weight > due:
                self.overlap.pool(self.processes)
                self._revive(prior, tokens)
            self.counted.zero_()
            self.overlap = Overlap(self.mfa.n_components)

    def _rows_behind(self) -> float:
        seen = (self.known + self.step) * self.batch_rows
        return seen if self.stream is not None else min(seen, len(self.rows)) * self.mean_weight

    def _revive(self, prior: Prior, tokens: float) -> None:
        """Moves regions that own nothing; the statistics become those that their parameters are the answer to."""
        mfa = self.mfa
        mass = self.statistics.mass  # remembers more steps than were counted
        owned = torch.maximum(self.counted, mass / self._count(self.statistics) * tokens)
        found = find(mfa, self.counted, self.overlap, self.guard, owned)
        if not found.moves:
            return
        if found.lost:
            if not hand_on(mfa, found, self.statistics, self._expect_alone):
                return
            self._maximize(self.statistics, prior)
        s = self.statistics
        explained = (mfa.loadings.detach().double().mT * s.cross).sum(1)  # of the squares
        move(mfa, found, self.covariance)
        self.report.revived_components += len(found.moves)
        touched = torch.tensor(found.touched, device=mfa.means.device)
        touched = touched[(touched >= mfa.first_component) & (touched < mfa.first_component + len(mfa.means))]
        mass = found.mass[touched] / found.mass.sum() * self._count(s)
        k = touched - mfa.first_component
        loadings = mfa.loadings.detach()[k].double().mT
        s.mass[k], s.shift[k], s.latent[k] = mass, 0.0, 0.0
        s.second[k] = mass[:, None, None] * torch.eye(mfa.rank, dtype=mass.dtype, device=mass.device)
        s.cross[k] = mass[:, None, None] * loadings
        spread = mass.unsqueeze(1) * loadings.square().sum(1)
        if s.squares.dim() == 2:
            s.squares[k] = spread + mass.unsqueeze(1) * mfa.noise_variance.detach()[k].double()
        else:  # what the loadings explain is others now, the noise stays
            s.squares.add_((spread - explained[k]).sum(0)).clamp_(min=0)
        self.screening.parameters_moved()
        self.about = mfa.means.detach().clone()

    def _maximize(self, s: SufficientStatistics, prior: Prior) -> None:
        """The M-step; the statistics kept are about the new means."""
        self.statistics = s.moved(maximize(self.mfa, s, prior))
        self.screening.parameters_moved()
        self.about = self.mfa.means.detach().clone()

    def _parameters_changed(self) -> None:
        if hasattr(self, "statistics"):
            self.statistics = self.statistics.moved(self.mfa.means.detach().double() - self.about)
            self.about = self.mfa.means.detach().clone()

    def _batches(self, bar: Any) -> Iterator[Weighed | None]:
        """This process's share of the batches of a pass that were not seen yet; None while a stream must bring more."""
        if self.stream is None:
            order = shuffled(self.rows, self.batch_rows, self.generator)
            yield from self._read(islice(order, self.batch, None), bar)
            return
        rows, seen = -(-self.batch_rows // self.processes.count), self.batch
        for number in count():
            while not self.stream.holds(rows):
                yield None
            x = self.stream.take(rows)  # none, where this process's own stream has ended
            if number >= seen:
                found = int(self.processes.totals(len(x))[0])
                if not found:
                    return
                bar.update(found)
                yield Weighed(x)

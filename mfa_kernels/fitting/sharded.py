"""EM of a mixture whose components are spread over the ranks: every rank reads all tokens, for its own components."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.checkpoint import CONFIG
from mfa_kernels.checks import check_choice
from mfa_kernels.files import StrPath
from mfa_kernels.fitting import loop, memory
from mfa_kernels.fitting.checkpoint import fingerprint
from mfa_kernels.fitting.em import BatchEM
from mfa_kernels.fitting.kmeans import KMeansResult, kmeans
from mfa_kernels.fitting.maximization import Prior, covariance_rows, maximize
from mfa_kernels.fitting.report import FitReport
from mfa_kernels.fitting.sgd import Settings
from mfa_kernels.fitting.source import as_source, picked
from mfa_kernels.fitting.start import centroids_of, start_from_clusters
from mfa_kernels.functional import PRECISIONS
from mfa_kernels.mfa import MFA
from mfa_kernels.ops.select.op import Active
from mfa_kernels.ops.statistics.op import Statistics, collect
from mfa_kernels.ranks import Ranks
from mfa_kernels.sharded import ShardedMFA, part_of


def fit_sharded(
    activations: Any,
    n_components: int,
    rank: int = 10,
    *,
    noise: str = "shared",
    clusters: KMeansResult | Tensor | None = None,
    start: ShardedMFA | None = None,
    epochs: int = 10,
    held_out: float = 0.05,
    eval_every: int | None = None,
    patience: int | None = 5,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str = "exact",
    callbacks: Sequence[Callable[[Any, dict[str, Any]], Any]] = (),
    log: StrPath | None = None,
    checkpoint: StrPath | None = None,
    progress: bool = True,
    group: Any = None,
) -> ShardedMFA:
    """`fit` with method "em" for a mixture that is too large for one device: each rank holds some of its components.

    Every process of the group calls it with the same arguments, and sees the same rows. The result is that of `fit` in
    one process, but for the order of sums. A rank holds parameters, statistics, steps and the best state of its own
    K / size components, and never loadings of others. What all hold alike is a few times K D numbers, centroids and
    their sums, while K-means and the start run; those share their passes over the rows of the sample, which are read
    again in each and not held. In EM every rank reads all rows; per token, a few numbers from each rank travel.

    A fit that is cut off does not go on bit for bit. The best state that it came to, in `checkpoint`, can be the
    `start` of another, by any number of ranks: ``start=ShardedMFA.from_pretrained(folder)``.

    Args:
        activations: what `fit` takes, but for streams: an iterator is concatenated in memory, on every rank.
        n_components: K, at least the number of ranks.
        rank, noise, clusters, epochs, held_out, eval_every, patience, seed, dtype, precision: as in `fit`.
        start: a mixture to begin with, instead of K-means and the PCA of clusters; it is changed.
        device: of this rank's components and of the work; None: where the activations are.
        callbacks: called on every rank, which must have the same, as callback(mfa, record) after every evaluation.
        log: path of a file of JSON lines, one per evaluation; rank 0 writes.
        checkpoint: folder to which the best state so far is saved (`ShardedMFA.save_pretrained`), after every
            evaluation that has found one; replaced atomically. Every rank has to see it to go on from it.
        progress: show progress bars, on rank 0.
        group: the `torch.distributed.ProcessGroup`; None: the default one where there is one; False: this process
            alone.

    Returns:
        The mixture, with a `FitReport` as its attribute `fit_report`; its times and its memory are the rank's own.

    Raises:
        TypeError, ValueError: naming the argument; different data or settings on the ranks among it.
        FileExistsError: `checkpoint` holds a mixture, and there is no `start`.
    """
    check_choice(noise, ("shared", "per_component"), "noise")
    check_choice(precision, PRECISIONS, "precision")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    loop._check_counts(n_components=(n_components, 1), rank=(rank, 0), epochs=(epochs, 0), eval_every=(eval_every, 1),
                       patience=(patience, 1))  # fmt: skip
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share in [0, 1), got {held_out!r}")
    ranks = Ranks(group)
    first, stop = part_of(n_components, ranks)
    source = as_source(activations)
    if rank > source.n_features:
        raise ValueError(f"rank must be at most the width of the activations, {source.n_features}, got {rank}")
    if checkpoint is not None and start is None:
        ranks.agree(lambda: _check_free(Path(checkpoint)))
    if clusters is not None:
        clusters = centroids_of(clusters, source.n_features, n_components)
    if start is not None:
        _check_start(start, n_components, source.n_features, rank, noise, ranks)
        device = start.means.device
    device = torch.device(device) if device is not None else source.device
    ranks.on(device)
    looked_at = torch.arange(0, len(source), max(1, len(source) // loop._FINGERPRINT_ROWS))[: loop._FINGERPRINT_ROWS]
    facts = {
        "rows": len(source), "n_features": source.n_features, "data": fingerprint(source.rows(looked_at)),
        "n_components": n_components, "rank": rank, "noise": noise,
        "clusters": None if clusters is None else fingerprint(clusters), "start": start is not None,
        "epochs": epochs, "held_out": held_out, "eval_every": eval_every, "patience": patience, "seed": seed,
        "dtype": str(dtype), "precision": precision, "checkpoint": None if checkpoint is None else str(checkpoint),
        "callbacks": len(callbacks),
    }  # fmt: skip
    loop._check_same(facts, False, ranks)

    report = FitReport(method="em")
    generator = torch.Generator().manual_seed(seed)
    rows, held_index = loop._split(len(source), held_out, generator)
    if len(rows) < n_components:
        raise ValueError(f"n_components = {n_components} needs at least as many rows to train on, got {len(rows)}")
    held_out_rows = loop._finite(source, held_index, device, report).to(dtype)
    report.held_out_rows = len(held_out_rows)
    if len(held_index) and not report.held_out_rows:
        raise ValueError(f"held_out: none of the {len(held_index)} held-out rows is finite")
    sample = rows[: max(loop._LEAST_START_ROWS, loop._START_ROWS_PER_COMPONENT * n_components)]
    progress = progress and ranks.first
    if progress:
        planned = memory.plan(
            stop - first, source.n_features, rank, noise, "em", dtype, len(held_out_rows), report.held_out_rows > 0
        )
        told = memory.line(planned, f"K={n_components} R={rank} D={source.n_features}, a rank of {ranks.size},")
        if told:
            print(told, file=sys.stderr)

    if start is None:
        with loop._timed(report, "kmeans"):
            found: KMeansResult | Tensor = kmeans(
                picked(source, sample), n_components,
                iterations=loop._KMEANS_ITERATIONS, seed=seed, device=device, progress=progress, ranks=ranks,
            ) if clusters is None else clusters  # fmt: skip
        with loop._timed(report, "start"):
            local = start_from_clusters(
                picked(source, sample), centroids_of(found, source.n_features, n_components), rank, noise,
                precision=precision, dtype=dtype, device=device, seed=seed, progress=progress, ranks=ranks,
            )  # fmt: skip
        del found
        start = ShardedMFA(local, group)
    settings = Settings(
        epochs, 1, 1.0, "constant", eval_every, patience, tuple(callbacks), log if ranks.first else None, progress
    )
    start_rows = loop._finite(source, sample[: covariance_rows(start)], device)
    run = _ShardedEM(
        start, source, rows, held_out_rows, settings, generator, report, start_rows=start_rows, checkpoint=checkpoint
    )
    deque(loop._run(run, "em", None, None), maxlen=0)  # steps of a fit that is not fed
    live_index = rows[: loop._LIVE_ROWS_PER_COMPONENT * n_components]
    loop._count_live(start, held_out_rows, source, live_index, report, settings.ranks)
    start.fit_report = report
    return start


def _check_free(checkpoint: Path) -> None:
    if (checkpoint / CONFIG).exists():
        raise FileExistsError(
            f"checkpoint: {checkpoint} holds a mixture: start=ShardedMFA.from_pretrained(...) goes on with it; else "
            "name another folder"
        )


def _check_start(start: ShardedMFA, components: int, features: int, rank: int, noise: str, ranks: Ranks) -> None:
    found = (start.n_components, start.n_features, start.rank, start.noise, start.ranks.size)
    expected = (components, features, rank, noise, ranks.size)
    if found != expected:
        raise ValueError(f"start must have (n_components, n_features, rank, noise, ranks) = {expected}, got {found}")


class _ShardedEM(BatchEM):
    """Batch EM in which a rank reads all rows, scans them for its own components, and keeps what belongs to these.

    What decides, likelihoods among it, is the same on every rank.
    """

    def __init__(self, mfa: ShardedMFA, *args: Any, start_rows: Tensor, checkpoint: StrPath | None) -> None:
        self.whole, self.checkpoint = mfa, checkpoint
        super().__init__(mfa, *args, start_rows=start_rows)

    def _held(self) -> MFA:
        return self.whole.local

    def _scan_own(self, x: Tensor) -> Active:
        """Among this rank's components; the weights are those of the whole."""
        active = self.screening.scan(x)
        share = self.whole.log_weights.logsumexp(0).to(active.logits)
        return active._replace(log_prob=active.log_prob + share, logits=active.logits + share)

    @torch.no_grad()
    def _scan(self, x: Tensor) -> Active:
        return self.whole.merged(self._scan_own(x))

    @torch.no_grad()
    def _expect(self, x: Tensor, out: Statistics, token_weight: float | None = None) -> tuple[Any, Tensor]:
        """The two most responsible components of all: where regions overlap."""
        ranks = self.whole.ranks
        active, responsibilities = expectation(self.whole, x, out, self._scan_own(x))
        numbers = torch.where(active.components >= 0, active.components + self.whole.start, -1)
        every, places = ranks.stacked(responsibilities[:, :2]).transpose(0, 1).flatten(1).topk(2)
        numbers = ranks.stacked(numbers[:, :2]).transpose(0, 1).flatten(1).gather(1, places)
        return active._replace(components=numbers), every

    def _pool(self, s: Statistics, overlap: Any) -> None:
        self.whole.ranks.broadcast_(s.log_likelihood)

    def _look_at_held_out(self) -> dict[str, Any]:
        found = super()._look_at_held_out()
        return self.whole.ranks.agree(lambda: found)

    def _evaluate(self, step: int, epoch: int, bar: Any) -> None:
        super()._evaluate(step, epoch, bar)
        if self.checkpoint is not None and not self.evaluations_since_best:
            self.whole.save_pretrained(self.checkpoint)


@torch.no_grad()
def em_step(mfa: ShardedMFA, batches: Iterable[Tensor], prior: Prior | None = None) -> float:
    """One step of EM in place: a pass over the tokens, then the M-step of each rank's components.

    Responsibilities are those among the components of all ranks; statistics stay where the components are, and only
    the sums that make a shared noise and the weights travel.

    Args:
        mfa: the mixture; the call is collective.
        batches: (..., D) each, the same on every rank. Tokens that are not finite add nothing.
        prior: see `mfa_kernels.fitting.em.Prior`; None: maximum likelihood, for regions that all own many tokens.

    Returns:
        The mean negative log-likelihood before the step, in nats per finite token.
    """
    means = mfa.means
    s = Statistics.zeros(means, mfa.rank, mfa.noise == "per_component")
    tokens = 0
    for x in batches:
        x = x.to(means.device).reshape(-1, mfa.n_features)
        tokens += int(expectation(mfa, x, s, mfa.scan(x))[0].log_prob.isfinite().sum())
    if not tokens:
        raise ValueError("batches hold no token of a finite density")
    if prior is None:
        nothing = torch.zeros(mfa.n_features, mfa.n_features, dtype=torch.float64, device=means.device)
        prior = Prior(nothing, strength=0.0, tokens=0.0)
    maximize(mfa, s, prior)
    return -float(s.log_likelihood) / tokens


@torch.no_grad()
def expectation(mfa: ShardedMFA, x: Tensor, out: Statistics, own: Active) -> tuple[Active, Tensor]:
    """Adds the statistics of this rank's components to `out`, and log p(x) of the whole mixture.

    Args:
        mfa: the mixture; the call is collective.
        x: (N, D), the same on every rank.
        out: of this rank's components.
        own: what this rank's scan of x has found (`ShardedMFA.scan`).

    Returns:
        `own` with log p(x) of the whole mixture, and the responsibilities of its slots (N, S).
    """
    parameters, factors = mfa.parameters_in_compute_dtype(), mfa.local.factors()
    x = x.to(factors.rows.dtype).contiguous()
    every = mfa.ranks.stacked(own.log_prob)
    log_prob = every.logsumexp(0)
    finite = log_prob.isfinite()
    share = every.softmax(0)[mfa.ranks.rank].masked_fill(~finite, 0)  # of the responsibility, on this rank
    weights = collect(x, own, *parameters, factors, out, share, least=math.exp(-mfa._threshold))
    out.log_likelihood.add_(log_prob.double().masked_fill(~finite, 0).sum())
    return own._replace(log_prob=log_prob), weights

"""EM of a mixture whose components are spread over processes: each reads all tokens, for its own components."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_callables, check_choice, check_device, check_flag
from mfa_kernels.common.files import StrPath
from mfa_kernels.common.modes import door
from mfa_kernels.common.processes import Processes
from mfa_kernels.data.source import Source, as_source, picked
from mfa_kernels.fitting import memory, preparation
from mfa_kernels.fitting.checkpoint import DONE, State, fingerprint
from mfa_kernels.fitting.em import _EM, BatchEM, OnlineEM
from mfa_kernels.fitting.guard import OTHERS, Guard
from mfa_kernels.fitting.guard import ROWS as GUARD_ROWS
from mfa_kernels.fitting.initialization import centroids_of, start_from_clusters
from mfa_kernels.fitting.kmeans import KMeansResult, kmeans
from mfa_kernels.fitting.m_step import Prior, covariance_rows, maximize
from mfa_kernels.fitting.notices import going_on
from mfa_kernels.fitting.provenance import now, run_of
from mfa_kernels.fitting.row_weights import Weighed
from mfa_kernels.fitting.run import Settings, mixture_state
from mfa_kernels.fitting.sharded_checkpoint import ShardedCheckpoints
from mfa_kernels.fitting.start_from_mixture import fingerprint_of, shape_given, start_from_mixture
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.sharded import ShardedMFA, part_of
from mfa_kernels.ops.common.finite import finite_rows
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.statistics.op import SufficientStatistics, collect


@door
def fit_sharded(
    activations: Any,
    n_components: int,
    rank: int = 10,
    *,
    method: str = "auto",
    noise: str = "shared",
    clusters: KMeansResult | Tensor | None = None,
    start: MFA | ShardedMFA | None = None,
    epochs: int = 10,
    batch_size: int = 1024,
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
    checkpoint_seconds: float = 60.0,
    resume: StrPath | bool = False,
    progress: bool = True,
    group: Any = None,
) -> ShardedMFA:
    """`fit` by EM of a mixture that is too large for one device: each process holds some of its components.

    Every process of the group calls it with the same arguments, and sees the same rows. The result is that of `fit` in
    one process, but for the order of sums. A process holds parameters, statistics, steps and the best state of its own
    K / size components, and never loadings of others. What all hold alike is a few times K D numbers, centroids and
    their sums, while K-means and the start run; those share their passes over the rows of the sample, which are read
    again in each and not held. In EM every process reads all rows; per token, a few numbers from each process travel.

    All rows weigh the same: `row_weights` are for `fit`.

    With a `checkpoint`, each process writes what it holds. A fit that is killed goes on, with `resume`, to the bits
    that it would have come to; with another number of processes, to the same but for the order of sums.

    Args:
        activations: what `fit` takes, but for streams: an iterator is concatenated in memory, on every process.
        n_components: K, at least the number of processes.
        method: "em", "online" or "auto", as in `fit`.
        rank, noise, clusters, epochs, batch_size, held_out, eval_every, patience, seed, dtype, precision: as in `fit`.
        start: a mixture to begin with, instead of K-means and the PCA of clusters. An `MFA`, which every process holds,
            is cut into the processes' parts as `fit` would begin with it; a `ShardedMFA` is itself what is trained.
        device: of this process's components and of the work; None: where the activations are.
        callbacks: called on every process, which must have the same, as callback(mfa, record) after every evaluation.
        log: path of a file of JSON lines, one per evaluation; process 0 writes.
        checkpoint: folder, which every process has to see, for what is needed to go on; of one fit.
        checkpoint_seconds, resume: as in `fit`.
        progress: show progress bars, on process 0.
        group: the `torch.distributed.ProcessGroup`; None: the default one where there is one; False: this process
            alone.

    Returns:
        The mixture, with a `FitReport` as its attribute `fit_report`; its times and its memory are the process's own.

    Raises:
        TypeError, ValueError: naming the argument; different data or settings on the processes among it.
        FileExistsError, FileNotFoundError: as `fit`.
    """
    began, asked = now(), check_choice(method, ("em", "online", "auto"), "method")
    held_out, n_components, rank, epochs, batch_size, eval_every, patience, seed = preparation.checked_arguments(
        noise, precision, dtype, held_out, log, n_components=(n_components, 1), rank=(rank, 0), epochs=(epochs, 0),
        batch_size=(batch_size, 1), eval_every=(eval_every, 1), patience=(patience, 1), seed=(seed, 0),
    )  # fmt: skip
    callbacks, progress = check_callables(callbacks, "callbacks"), check_flag(progress, "progress")
    device = None if device is None else check_device(device)
    processes = Processes(group)
    first, stop = part_of(n_components, processes)
    folder, resumed = processes.agree(lambda: preparation.checkpoint_folders(checkpoint, checkpoint_seconds, resume))
    log = None if log is None else Path(log).absolute()
    with preparation.holding(folder, log, processes):
        source = as_source(activations)
        if rank > source.n_features:
            raise ValueError(f"rank must be at most the width of the activations, {source.n_features}, got {rank}")
        if method == "auto":
            method = preparation.chosen_method(len(source) * (1 - held_out), n_components, batch_size)
        if clusters is not None:
            clusters = centroids_of(clusters, source.n_features, n_components)
        given = fingerprint_of(start) if isinstance(start, MFA) else start is not None
        if isinstance(start, MFA):
            shape_given(start, n_components, rank, noise, {"clusters": clusters is not None})
            there = source.device if device is None else torch.device(device)
            start = ShardedMFA.from_mfa(start_from_mixture(start, precision, dtype, there), group)
        if start is not None:
            _check_start(start, n_components, source.n_features, rank, noise, processes)
            device = start.means.device
        device = device if device is not None else source.device
        processes.on(device)
        facts = {
            "rows": len(source), "n_features": source.n_features, "data": preparation.data_fingerprint(source),
            "n_components": n_components, "rank": rank, "method": method, "noise": noise,
            "clusters": None if clusters is None else fingerprint(clusters), "start": given,
            "epochs": epochs, "batch_size": batch_size, "held_out": held_out, "eval_every": eval_every,
            "patience": patience, "seed": seed, "dtype": str(dtype), "precision": precision,
        }  # fmt: skip
        preparation.check_same({**facts, "callbacks": len(callbacks)}, processes)
        checkpoints: ShardedCheckpoints | None = None
        saved: State | None = None
        if folder is not None:
            checkpoints = ShardedCheckpoints(folder, checkpoint_seconds, facts, n_components, noise, processes)
            saved = None if resumed is None else checkpoints.load(resumed)

        report = FitReport(
            method=method, run=run_of(facts, source, device, processes, began=began, asked=asked, spread=True)
        )
        generator = torch.Generator().manual_seed(seed)
        rows, held_index = preparation.split_rows(source, held_out, generator, report)
        if len(rows) < n_components:
            raise ValueError(f"n_components = {n_components} needs at least as many rows to train on, got {len(rows)}")
        held_out_rows = preparation.finite(source, held_index, device, dtype, report).to(dtype)
        report.held_out_rows = len(held_out_rows)
        if len(held_index) and not report.held_out_rows:
            raise ValueError(f"held_out: none of the {len(held_index)} held-out rows is finite")
        sample = rows[: max(preparation.LEAST_START_ROWS, preparation.START_ROWS_PER_COMPONENT * n_components)]
        if source.dtype != dtype:  # K-means, in that of the source, would take rows that have no density in this one
            parts = [finite_rows(source.rows(part), dtype).cpu() for part in sample.split(preparation.CHUNK_ROWS)]
            sample = sample[torch.cat(parts)]
        progress = progress and processes.first
        if progress:
            kept = len(held_out_rows) + min(GUARD_ROWS, len(sample))
            planned = memory.plan(stop - first, source.n_features, rank, noise, method, dtype, kept)
            told = memory.line(
                planned, f"K={n_components} R={rank} D={source.n_features}, a process of {processes.count},"
            )
            if told:
                print(told, file=sys.stderr)

        if saved is not None:
            assert checkpoints is not None
            with checkpoints.reading():
                held = preparation.restored_mixture(
                    saved, noise, precision, device, (stop - first, source.n_features, rank)
                )
            start, report = ShardedMFA(held, group), saved.report
        elif start is None:
            with preparation.timed(report, "kmeans"):
                found: KMeansResult | Tensor = kmeans(
                    picked(source, sample), n_components, iterations=preparation.KMEANS_ITERATIONS,
                    seed=seed, device=device, progress=progress, processes=processes,
                ) if clusters is None else clusters  # fmt: skip
            with preparation.timed(report, "start"):
                local = start_from_clusters(
                    picked(source, sample), centroids_of(found, source.n_features, n_components), rank, noise,
                    precision=precision, dtype=dtype, device=device, seed=seed, progress=progress, processes=processes,
                )  # fmt: skip
            del found
            start = ShardedMFA(local, group)
        if saved is None or saved.stage != DONE:
            settings = Settings(
                epochs, batch_size, 1.0, "constant", eval_every, patience, callbacks,
                log if processes.first else None, progress,
            )  # fmt: skip
            run = (_ShardedBatchEM if method == "em" else _ShardedOnlineEM)(
                start, source, rows, held_out_rows, settings, generator, report, sample=sample
            )
            deque(preparation.run_stage(run, method, checkpoints, saved), maxlen=0)  # steps of a fit that is not fed
            live_index = rows[: preparation.LIVE_ROWS_PER_COMPONENT * n_components]
            preparation.count_live(start, held_out_rows, source, live_index, report, settings.processes)
            if checkpoints is not None and not report.interrupted:
                with going_on("the checkpoint of its end", "the one before stays, and the mixture is returned"):
                    checkpoints.save(State(DONE, mixture_state(start), {"noise_floor": start.noise_floor}, report))
        start.fit_report = report
        return start


def _check_start(
    start: ShardedMFA, components: int, features: int, rank: int, noise: str, processes: Processes
) -> None:
    found = (start.n_components, start.n_features, start.rank, start.noise, start.processes.count)
    expected = (components, features, rank, noise, processes.count)
    if found != expected:
        raise ValueError(
            f"start must have (n_components, n_features, rank, noise, processes) = {expected}, got {found}"
        )


class _Sharded(_EM):
    """EM in which a process reads all rows, scans them for its own components, and keeps what belongs to these.

    What decides, likelihoods among it, is the same on every process.

    Args:
        sample: numbers of the rows that the start was made of.
    """

    def __init__(self, mfa: ShardedMFA, source: Source, *args: Any, sample: Tensor) -> None:
        self.whole, self.sample = mfa, sample
        device, dtype, rows = mfa.means.device, mfa.means.dtype, args[0]
        start_rows = preparation.finite(source, sample[: covariance_rows(mfa)], device, dtype)
        after = max(preparation.LEAST_START_ROWS, preparation.START_ROWS_PER_COMPONENT * mfa.n_components)
        others = preparation.finite(source, rows[after : after + OTHERS], device, dtype)
        super().__init__(mfa, source, *args, Guard(start_rows, device, others), start_rows=start_rows)

    def _held(self) -> MFA:
        return self.whole.local

    def _scan_own(self, x: Tensor) -> ActivePairs:
        """Among this process's components; the weights are those of the whole."""
        active = self.screening.scan(x)
        share = self.whole.log_weights.logsumexp(0).to(active.logits)
        return active._replace(log_prob=active.log_prob + share, logits=active.logits + share)

    @torch.no_grad()
    def _scan(self, x: Tensor) -> ActivePairs:
        return self.whole.merged(self._scan_own(x))

    @torch.no_grad()
    def _expect(self, batch: Weighed, out: SufficientStatistics, unit: float | None = None) -> tuple[Any, Tensor]:
        """The two most responsible components of all: where regions overlap."""
        x, processes = batch.rows, self.whole.processes
        active, weights = expectation(self.whole, x, out, self._scan_own(x), 1.0 if unit is None else unit)
        numbers = torch.where(active.components >= 0, active.components + self.whole.first_component, -1)
        every, places = processes.stacked(weights[:, :2]).transpose(0, 1).flatten(1).topk(2)
        numbers = processes.stacked(numbers[:, :2]).transpose(0, 1).flatten(1).gather(1, places)
        return active._replace(components=numbers), every

    @torch.no_grad()
    def _expect_alone(self, x: Tensor, out: SufficientStatistics, weights: Tensor) -> ActivePairs:
        return expectation(self.whole, x, out, self.whole.scan(x.to(self.whole.means)), weights)[0]

    def _look_at_held_out(self) -> dict[str, Any]:
        found = super()._look_at_held_out()
        return self.whole.processes.agree(lambda: found)


class _ShardedBatchEM(_Sharded, BatchEM):
    def _pool(self, s: SufficientStatistics, overlap: Any) -> None:
        self.whole.processes.broadcast_(s.log_likelihood)


class _ShardedOnlineEM(_Sharded, OnlineEM):
    def _start_batches(self, start_rows: Tensor) -> Iterator[Weighed]:
        """All of the sample, which is not held."""
        for index in self.sample.split(self._batch_rows()):
            yield Weighed(preparation.finite(self.source, index, self.whole.means.device, self.whole.means.dtype))


@torch.no_grad()
def em_step(mfa: ShardedMFA, batches: Iterable[Tensor], prior: Prior | None = None) -> float:
    """One step of EM in place: a pass over the tokens, then the M-step of each process's components.

    Responsibilities are those among the components of all processes; statistics stay where the components are, and only
    the sums that make a shared noise and the weights travel.

    Args:
        mfa: the mixture; the call is collective.
        batches: (..., D) each, the same on every process. Tokens that are not finite add nothing.
        prior: see `mfa_kernels.fitting.em.Prior`; None: maximum likelihood, for regions that all own many tokens.

    Returns:
        The mean negative log-likelihood before the step, in nats per finite token.
    """
    means = mfa.means
    s = SufficientStatistics.zeros(means, mfa.rank, mfa.noise == "per_component")
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
def expectation(
    mfa: ShardedMFA, x: Tensor, out: SufficientStatistics, own: ActivePairs, token_weight: float | Tensor = 1.0
) -> tuple[ActivePairs, Tensor]:
    """Adds the statistics of this process's components to `out`, and log p(x) of the whole mixture.

    Args:
        mfa: the mixture; the call is collective.
        x: (N, D), the same on every process.
        out: of this process's components.
        own: what this process's scan of x has found (`ShardedMFA.scan`).
        token_weight: of each token, or one for all, (N,).

    Returns:
        `own` with log p(x) of the whole mixture, and the responsibilities of its slots (N, S), times the weight.
    """
    parameters, woodbury = mfa.parameters_in_compute_dtype(), mfa.local.woodbury()
    x = x.to(woodbury.rows.dtype).contiguous()
    every = mfa.processes.stacked(own.log_prob)
    log_prob = every.logsumexp(0)
    finite = log_prob.isfinite()
    share = token_weight * every.softmax(0)[mfa.processes.index].masked_fill(~finite, 0)  # of the responsibility, here
    every_weight = torch.as_tensor(token_weight)
    least = float(every_weight.min()) * math.exp(-mfa.threshold) if every_weight.numel() else 0.0
    weights = collect(x, own, *parameters, woodbury, out, share, least=least)
    out.log_likelihood.add_((token_weight * log_prob.double().masked_fill(~finite, 0)).sum())
    return own._replace(log_prob=log_prob), weights

"""`fit`: from activations to a mixture, with the best state on held-out rows."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels import locks
from mfa_kernels.checks import (
    check_callables,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_integer,
    check_number,
    check_path,
    check_positive,
    is_flag,
)
from mfa_kernels.files import StrPath, check_writable
from mfa_kernels.fit_report import FitReport
from mfa_kernels.fitting import memory
from mfa_kernels.fitting.checkpoint import DONE, FILE, Checkpoints, State, fingerprint, load_on_all
from mfa_kernels.fitting.em import BatchEM, OnlineEM, online_rows
from mfa_kernels.fitting.feed import Feed, Fitting, Steps, alone
from mfa_kernels.fitting.given import fingerprint_of, shape_given, start_from_mixture
from mfa_kernels.fitting.guard import OTHERS, Guard
from mfa_kernels.fitting.guard import ROWS as GUARD_ROWS
from mfa_kernels.fitting.kmeans import KMeansResult, kmeans
from mfa_kernels.fitting.notices import going_on, warn
from mfa_kernels.fitting.provenance import now, run_of
from mfa_kernels.fitting.sgd import SCHEDULES, Callback, Run, Settings, Training, mixture_state
from mfa_kernels.fitting.source import Source, as_source, home
from mfa_kernels.fitting.start import INITS, centroids_of, start_from_clusters
from mfa_kernels.fitting.weighing import Weighed, weighted
from mfa_kernels.functional import PRECISIONS
from mfa_kernels.mfa import MFA, NOISES
from mfa_kernels.ops.finite import finite_rows
from mfa_kernels.places import CHECKPOINT, CURVE, check_apart, check_place
from mfa_kernels.ranks import Ranks
from mfa_kernels.rotation import sign_
from mfa_kernels.sharded import AnyMFA

METHODS = ("sgd", "em", "online", "auto")
_HELD_OUT_ROWS = 20_000  # at most
_LEAST_HELD_TEXTS = 4  # fewer would say more of themselves than of all
_NEARLY = 0.02  # of the rows to hold out, may be missing where texts are held out whole
_START_ROWS_PER_COMPONENT = 128
_LEAST_START_ROWS = 100_000
_KMEANS_ITERATIONS = 10
_LEAST_ONLINE_STEPS = 100  # a pass, for "auto": with fewer, as many passes of EM take less time (bench/RESULTS.md)
_LIVE_ROWS_PER_COMPONENT = 64
_CHUNK_ROWS = 4096  # of these that are assigned at once
_FINGERPRINT_ROWS = 256
_DEAD_SHARE = 0.1  # of the components, from which on a warning is due


@alone  # a generator, so that several can be fed from one stream: `mfa_kernels.fitting.many`
def fit(
    activations: Any,
    n_components: int | None = None,
    rank: int | None = None,
    *,
    method: str = "auto",
    noise: str | None = None,
    init: str = "pca",
    clusters: KMeansResult | Tensor | None = None,
    start: MFA | None = None,
    row_weights: Tensor | None = None,
    epochs: int = 10,
    batch_size: int = 1024,
    lr: float = 1e-2,
    schedule: str = "cosine",
    polish: int = 0,
    held_out: float = 0.05,
    eval_every: int | None = None,
    patience: int | None = 5,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str = "exact",
    callbacks: Sequence[Callback] = (),
    log: StrPath | None = None,
    checkpoint: StrPath | None = None,
    checkpoint_seconds: float = 60.0,
    resume: StrPath | bool = False,
    progress: bool | str = True,
    group: Any = None,
) -> Fitting:
    """Fits a mixture of factor analyzers to activations; returns the best on held-out rows.

    K-means on a sample of the rows (the greater of 100,000 and 128 K), a start from the clusters, then one of

    - "auto": "online" for an iterator, and where a pass over the rows makes at least 100 of its M-steps; else "em";
    - "em": passes over all the rows, each followed by a closed M-step under a prior, whose strength is chosen on the
      held-out rows (`mfa_kernels.fitting.em`): a region that owns few rows leans on what the others have in common.
      Steps are lengthened, which halves the passes, and taken back where the posterior falls;
    - "online": the same with an M-step every few rows, which needs fewer passes. An iterator is read once and never
      held: the rows of the sample are buffered, for the start and to hold out from, and the others are let go. One
      that ends within the sample is fitted as other data are. `mfa_kernels.fit_many` fits several mixtures to one;
    - "sgd": Adam on the mean negative log-likelihood, the paper's procedure (arXiv 2602.02464).

    Rows are shuffled by number and never moved. The same seed gives the same bits on one device and number of threads
    (docs/fitting.md, "The same bits"). Rows that are not finite in `dtype`, or whose squared norm is not, are left out
    and counted. Ctrl-C ends the training with a warning, and returns the best so far.

    With a `checkpoint`, a fit that is killed at any moment goes on, with `resume`, to the bits that it would have
    come to (timings apart; on the same kind of device and number of threads). The first one is written when the
    start is there: K-means is not cut up, and one that was killed runs again. An iterator has to be given again
    from its beginning: the rows that were used are read and passed over. What callbacks remember is theirs to keep.

    Where `torch.distributed` is initialised (as under torchrun), its processes fit one mixture, data-parallel: each of
    them calls `fit` with the same arguments, takes its share of every batch, and returns the same mixture, bit for
    bit. The batches are those of a single process: only the order of sums differs from its results, and a checkpoint
    can be gone on with by another number of processes. (By as many, it leads to the same bits, except where it cut a
    pass of "em" in two.) Rank 0 runs K-means, shows progress, and writes `log` and `checkpoint`; callbacks are called
    on the ranks that have them, and parameters that they change become those of rank 0. Of an iterator that is fitted
    online, every rank brings its own, and it takes as many ranks to resume. Data or settings that differ between ranks
    are an error. An error on one rank alone, and Ctrl-C, are left to the launcher, which ends the others. Where the
    mixture itself does not fit on one device, `mfa_kernels.fitting.fit_sharded` spreads its components.

    Args:
        activations: (N, D): a tensor, an array, an `ActivationStore`, or an iterable of batches (B, D), which is
            concatenated in memory, unless it is an iterator that is fitted online; see `mfa_kernels.fitting.as_source`.
        n_components: K, at most the number of rows to train on; None: that of `start`.
        rank: R, at most D; 0 is a mixture of diagonal Gaussians. None: that of `start`, else 10.
        method: "auto", "em", "online" or "sgd".
        noise: "shared" or "per_component". None: that of `start`, else "shared".
        init: "pca" (of every cluster) or "random" (loadings, the paper's start); see `start_from_clusters`.
        clusters: a `KMeansResult` or centroids (K, D) to begin with, instead of running K-means.
        start: a mixture to begin with, instead of K-means and a start from the clusters: one that was fitted before,
            for more epochs or to other rows, or one with parameters of your own. It is copied, in `dtype` and
            `precision` and with its `extra`, and stays as it is. The state kept is never worse on the held-out rows
            than the start, which is step 0. These are the rows that were held out before where data, `held_out` and
            `seed` are the same; with another seed, some were trained on. Adam, EM's choice of a prior and the report
            begin anew. A region of weight 0 may come back to life.
        row_weights: (N,), finite and non-negative; None: all 1. What is maximised is the mean of log p by these
            weights, in the start, in training and on the held-out rows: a row of weight 2 counts as two rows, one of
            weight 0 is left out. K-means, `start_from_clusters`, EM, Adam's loss, likelihoods in the report and the
            sample of `held_out` go by them; which rows are drawn (`held_out` is a share of the rows), which stick out,
            and live regions do not. The prior is worth its tokens beside what the rows weigh together: weights are
            best scaled to a mean of 1. Smaller ones lean more on the prior, and less than K in all are refused. Not
            for an iterator that is fitted online.
        epochs: passes over the rows, at most; 0 returns the start.
        batch_size: rows per step, at most; an epoch is cut into batches of equal size. Online, rows per M-step, but
            at least 16 K. Passes of "em" do not depend on it.
        lr: Adam's learning rate. Means and loadings move in units of the standard deviation within clusters, per
            dimension, so that the rate depends neither on the scale of the activations nor on outlier dimensions.
        schedule: of Adam's rate: "cosine" (down to 0) or "constant", both after a short linear warm-up.
        polish: epochs of Adam after EM; not for an iterator, whose rows are gone.
        held_out: share of the rows kept from training to choose the best state, in [0, 1); at most 20,000 rows,
            and of whole texts where these are known, as a store does (`FitReport.held_out_by` says which it was). With
            0 nothing is chosen: the last state is returned. No state is, whatever held-out rows say, under which a
            sample of the rows trained on (`mfa_kernels.fitting.guard`) is less likely than under the start; with EM,
            what is compared is likelihood and prior, which a step climbs together.
        eval_every: steps (of EM: M-steps) between evaluations on the held-out rows; None: once an epoch, and every
            20 M-steps of an iterator.
        patience: evaluations without improvement after which to stop; None: never.
        seed: of everything that is drawn.
        device: of the mixture and of the work; None: where the activations are.
        dtype: of the parameters, float32 or float64.
        precision: of the mixture: "exact", "fast" or "reference".
        callbacks: called as callback(mfa, record) after every evaluation, the one of the start included; `record` is
            the entry of `FitReport.history`. They may change the mixture's parameters in place.
        log: path of a file of JSON lines, one per evaluation; the curve of another fit that is there is replaced.
        checkpoint: folder for what is needed to go on, replaced atomically; of one fit. See
            `mfa_kernels.fitting.checkpoint`.
        checkpoint_seconds: at least, between two of them.
        resume: a folder to go on from (and to write to, where `checkpoint` names no other), with the same data and
            settings. True: from `checkpoint`, or from the beginning where it holds none yet. A fit that came to its
            end returns its result.
        progress: show progress bars; with a string, that of the training begins with it.
        group: the `torch.distributed.ProcessGroup` whose ranks fit together; None: the default one where there is
            one; False: this process fits alone.

    Returns:
        The mixture, with a `FitReport` as its attribute `fit_report`.

    Raises:
        TypeError, ValueError: naming the argument; for `resume`, each setting that differs.
        FileExistsError: `checkpoint` holds one, and there is no `resume`; or `checkpoint` or `log` would take the place
            of something else (`mfa_kernels.places`).
        FileNotFoundError: `resume` names a folder without a checkpoint.
        RuntimeError: when step after step has a loss or a gradient that is not finite.
    """
    began, asked = now(), check_choice(method, METHODS, "method")
    check_choice(init, INITS, "init")
    check_choice(schedule, SCHEDULES, "schedule")
    n_components, rank, noise = shape_given(
        start, n_components, rank, noise, {"init": init != "pca", "clusters": clusters is not None}
    )
    streamed = isinstance(activations, Iterator) and method in ("online", "auto")
    held_out, n_components, rank, epochs, batch_size, polish, eval_every, patience, seed = _checked(
        noise, precision, dtype, held_out, log, n_components=(n_components, 1), rank=(rank, 0), epochs=(epochs, 0),
        batch_size=(batch_size, 1), polish=(polish, 0), eval_every=(eval_every, 1), patience=(patience, 1),
        seed=(seed, 0),
    )  # fmt: skip
    lr, callbacks = check_positive(lr, "lr"), check_callables(callbacks, "callbacks")
    progress = progress if isinstance(progress, str) else check_flag(progress, "progress")
    device = device if device is None else check_device(device)
    if device is not None and device.type == "meta":
        raise ValueError("device must be one that holds values, got the meta device")
    ranks = Ranks(group)
    folder, resumed = ranks.agree(lambda: _checkpoint_folders(checkpoint, checkpoint_seconds, resume))
    log = None if log is None else Path(log).absolute()  # wherever the process goes meanwhile
    if polish and (streamed or method == "sgd"):
        raise ValueError(f"polish must be 0 {'for an iterator' if streamed else 'with method sgd'}, got {polish}")
    if row_weights is not None and streamed:
        raise ValueError(
            "row_weights must be None for an iterator that is fitted online: give weighted rows as a whole"
        )
    with _held(folder, log, ranks):
        sample = max(_LEAST_START_ROWS, _START_ROWS_PER_COMPONENT * n_components)
        stream = Feed() if streamed else None
        if stream is not None:
            head = math.ceil(sample / ranks.size / (1 - held_out))
            while not stream.holds(head):
                stream.put((yield))
            source = stream.source()
            if stream.ended and ranks.size == 1:  # all of it is here: data like any other
                stream, streamed = None, False
            else:
                sample = len(source)  # what the last batch brought besides is not read again
                while not stream.holds(OTHERS // ranks.size):
                    stream.put((yield))
        else:
            source = weighted(as_source(activations), row_weights)
        if rank > source.n_features:
            raise ValueError(f"rank must be at most the width of the activations, {source.n_features}, got {rank}")
        if start is not None and start.n_features != source.n_features:
            raise ValueError(
                f"start must have the width of the activations, {source.n_features}, got {start.n_features} features"
            )
        if method == "auto":
            method = "online" if streamed else _chosen(len(source) * (1 - held_out), n_components, batch_size)
        device = device if device is not None else source.device
        ranks.on(device)
        label = f"{progress}, " if isinstance(progress, str) else ""
        progress = bool(progress) and ranks.first
        settings = Settings(
            epochs, batch_size, lr, schedule, eval_every, patience, callbacks, log, progress, ranks, label
        )
        generator = torch.Generator().manual_seed(seed)
        report = FitReport(method=method)

        rows, held_index = _split(source, held_out, generator, report)
        start_index, live_index = rows[:sample], rows[: _LIVE_ROWS_PER_COMPONENT * n_components]
        if not streamed:  # every rank its part. Of held-out rows, the first are then the first of each rank's
            start_index, live_index = ranks.share(start_index), ranks.share(live_index)
            held_index = held_index[ranks.rank :: ranks.size]
        held_out_rows, held_out_weights = _weighed(source, held_index, device, dtype, report)
        held_out_rows = held_out_rows.to(dtype)
        all_held, report.held_out_rows = map(int, ranks.totals(len(held_index), len(held_out_rows)))
        if all_held and not report.held_out_rows:
            raise ValueError(f"held_out: none of the {all_held} held-out rows is finite")
        # What is left out of the sample is counted when training meets it. Several ranks send it on their devices.
        there = device if ranks.size > 1 else home(source, len(start_index), device)
        start_rows, start_weights = _weighed(
            source, start_index, there, dtype, None if epochs and not streamed else report
        )
        found, report.skipped_rows = map(int, ranks.totals(len(start_rows), report.skipped_rows))
        if found < n_components:
            raise ValueError(
                f"n_components = {n_components} needs at least as many finite rows to train on, got {found} "
                f"of {len(source)} (held out: {all_held})"
            )
        if source.weights is not None and float(source.weights[rows].sum()) < n_components:
            raise ValueError(
                f"row_weights must be n_components = {n_components} in all at least, of the rows to train on, as they "
                f"count rows, got {float(source.weights[rows].sum()):g}: scale them, to a mean of 1 for example"
            )

        if clusters is not None:
            clusters = centroids_of(clusters, source.n_features, n_components)
        checkpoints: Checkpoints | None = None
        saved: State | None = None
        data = _data(source, streamed)
        facts = {
            "rows": None if streamed else len(source), "n_features": source.n_features,
            "data": " ".join(ranks.objects(data)) if streamed else data,  # every rank brings a stream of its own
            "n_components": n_components, "rank": rank, "method": method, "noise": noise, "init": init,
            "clusters": None if clusters is None else fingerprint(clusters), "start": fingerprint_of(start),
            "row_weights": None if source.weights is None else fingerprint(source.weights), "epochs": epochs,
            "batch_size": batch_size, "lr": lr, "schedule": schedule, "polish": polish, "held_out": held_out,
            "eval_every": eval_every, "patience": patience, "seed": seed, "dtype": str(dtype),
            "precision": precision, "ranks": ranks.size if streamed else None,
        }  # fmt: skip
        _check_same(facts, ranks)
        report.run = run_of(facts, source, device, ranks, began=began, asked=asked, streamed=streamed)
        if folder is not None:
            checkpoints = Checkpoints(folder, checkpoint_seconds, facts)
            saved = None if resumed is None else load_on_all(checkpoints, resumed, ranks)

        if streamed and len(live_index):  # nothing else of the head is looked at again
            source, live_index = as_source(source.rows(live_index)), torch.arange(len(live_index))

        if progress:
            held = len(held_out_rows) + (len(start_rows) if there == device else 0) + min(GUARD_ROWS, found)
            planned = memory.plan(n_components, source.n_features, rank, noise, method, dtype, held)
            told = memory.line(planned, f"K={n_components} R={rank} D={source.n_features}")
            if told:
                print(told, file=sys.stderr)

        if saved is None:
            whole = ranks.gathered(start_rows)
            weights = None if start_weights is None else ranks.gathered(start_weights)

            def begin() -> MFA:
                if start is not None:
                    with _timed(report, "start"):
                        return start_from_mixture(start, precision, dtype, device)
                with _timed(report, "kmeans"):
                    result: KMeansResult | Tensor = clusters if clusters is not None else kmeans(
                        whole, n_components, weights=weights,
                        iterations=_KMEANS_ITERATIONS, seed=seed, device=device, progress=progress,
                    )  # fmt: skip
                    centroids = centroids_of(result, source.n_features, n_components)
                with _timed(report, "start"):
                    return start_from_clusters(
                        whole, centroids, rank, noise, weights=weights,
                        init=init, precision=precision, dtype=dtype, device=device, seed=seed, progress=progress,
                    )  # fmt: skip

            mfa = _from_first(begin, ranks, n_components, source.n_features, rank, noise, precision, device, dtype)
            del whole, weights, begin
        else:
            report = saved.report
            assert checkpoints is not None
            with checkpoints.reading():
                mfa = _restored(saved, noise, precision, device, (n_components, source.n_features, rank))
        if saved is None or saved.stage != DONE:
            arguments = mfa, source, rows, held_out_rows
            # Rows that the start has not seen, and that are trained on next: none, where it has seen all.
            if stream is None:
                unseen, unseen_weights = _weighed(source, ranks.share(rows[sample : sample + OTHERS]), device, dtype)
            else:
                unseen_weights = None
                unseen = stream.peek(OTHERS // ranks.size)
                unseen = unseen[finite_rows(unseen, dtype)]
            guard = Guard(start_rows, device, unseen, ranks, start_weights, unseen_weights)
            del unseen
            weighing: dict[str, Any] = {"held_out_weights": held_out_weights}
            of_start = {"start_rows": start_rows, "start_weights": start_weights, **weighing}
            run: Run
            begun: tuple[float, float] | None = None
            if saved is None or saved.stage == method:
                if method == "sgd":
                    run = Training(*arguments, settings, generator, report, guard, **weighing)
                elif method == "em":
                    run = BatchEM(*arguments, settings, generator, report, guard, **of_start)
                else:
                    run = OnlineEM(*arguments, settings, generator, report, guard, **of_start, stream=stream)
                del start_rows, start_weights, of_start
                yield from _run(run, method, checkpoints, saved)
                saved, begun = None, run.start
            if polish and not report.interrupted:
                run = Training(*arguments, replace(settings, epochs=polish), generator, report, guard, **weighing)
                run.begin_below(begun)
                yield from _run(run, "polish", checkpoints, saved)
            if stream is not None and report.run:  # known only now
                report.run.setdefault("data", {})["rows"] = int(ranks.totals(stream.taken)[0])
            _count_live(mfa, held_out_rows, source, live_index, report, ranks)
            if report.refused_states and ranks.first:
                warn(
                    f"fit: {report.refused_states} states were not kept: rows that they were trained on, weighed "
                    "against the prior, are less likely under them than under the start"
                )
            if checkpoints is not None and ranks.first and not report.interrupted:
                with going_on("the checkpoint of its end", "the one before stays, and the mixture is returned"):
                    checkpoints.save(State(DONE, mixture_state(mfa), {"noise_floor": mfa.noise_floor}, report))
        mfa.zero_grad()
        mfa.fit_report = report
        return mfa


def _run(run: Run, stage: str, checkpoints: Checkpoints | None, saved: State | None) -> Steps:
    run.enter(stage, checkpoints, saved)
    try:
        yield from run.run() or ()
    except KeyboardInterrupt:
        if max(run.ranks.size, run.mfa.ranks.size) > 1:  # the others are elsewhere
            raise
        run.report.interrupted = True
        warn("fit: interrupted; the mixture is the best so far")
    run.report_skipped()
    run.note_time()
    run.restore_best()
    sign_(run.mfa.loadings)


@contextmanager
def _held(folder: Path | None, log: StrPath | None, ranks: Ranks) -> Iterator[None]:
    """Tries, on rank 0, where the fit is to write, before work begins; keeps other writers out of its checkpoints.

    Raises, on every rank:
        OSError: naming the path that cannot be written to; TimeoutError where another fit writes to the folder.
    """
    with ExitStack() as stack:

        def enter() -> None:
            if log is not None and folder is not None:
                check_apart([("log", log, CURVE), ("checkpoint", folder, CHECKPOINT)])
            if log is not None:
                check_place(log, CURVE, "log")
                check_writable(log, "log")
            if folder is not None:
                if not (folder / FILE).exists():  # else it is read, and what is wrong with it is said then
                    check_place(folder, CHECKPOINT, "checkpoint")
                check_writable(folder / FILE, "checkpoint")
                stack.enter_context(locks.alone(folder))

        ranks.agree(enter)
        yield


def _checkpoint_folders(
    checkpoint: StrPath | None, seconds: float, resume: StrPath | bool
) -> tuple[Path | None, Path | None]:
    """Where checkpoints go, and the folder to go on from, where there is one."""
    check_number(seconds, "checkpoint_seconds", 0)
    if not is_flag(resume) and not isinstance(resume, str | os.PathLike):
        raise TypeError(f"resume must be a folder or a bool, got {type(resume).__name__}")
    resume = bool(resume) if is_flag(resume) else check_path(resume, "resume")
    checkpoint = None if checkpoint is None else check_path(checkpoint, "checkpoint")
    if checkpoint is not None and Path(checkpoint).is_file():
        raise NotADirectoryError(f"checkpoint must name a folder, {checkpoint} is a file")
    held = checkpoint is not None and (Path(checkpoint) / FILE).exists()
    if resume is True:
        if checkpoint is None:
            raise ValueError("resume = True needs a checkpoint folder to go on from")
        return Path(checkpoint), Path(checkpoint) if held else None
    if resume is False:
        if held:
            raise FileExistsError(
                f"checkpoint: {checkpoint} holds the {FILE} of a fit: resume=True goes on with it; else name another"
            )
        return None if checkpoint is None else Path(checkpoint), None
    folder = Path(resume if checkpoint is None else checkpoint)
    if held and folder.resolve() != Path(resume).resolve():
        raise FileExistsError(f"checkpoint: {checkpoint} holds the {FILE} of another fit than resume: {resume}")
    return folder, Path(resume)


@torch.no_grad()
def _restored(saved: State, noise: str, precision: str, device: torch.device, expected: tuple[int, int, int]) -> MFA:
    """The mixture of a checkpoint, of `expected` components, features and rank."""
    tensors = {name.removeprefix("mfa."): t for name, t in saved.tensors.items() if name.startswith("mfa.")}
    found = tuple(tensors["loadings"].shape)
    if found != expected:
        raise ValueError(f"loadings have shape {found}, expected {expected}")
    if tensors["means"].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means are {tensors['means'].dtype}, expected torch.float32 or torch.float64")
    mfa = _blank(*expected, noise, precision, device, tensors["means"].dtype)
    mfa.noise_floor = saved.values["noise_floor"]
    mfa.load_state_dict(tensors)
    return mfa


def _blank(
    components: int, features: int, rank: int, noise: str, precision: str, device: torch.device, dtype: torch.dtype
) -> MFA:
    """A mixture whose parameters are yet to be written."""
    return torch.nn.utils.skip_init(
        MFA, components, features, rank, noise, precision=precision, device=device, dtype=dtype
    )


@torch.no_grad()
def _from_first(start: Callable[[], MFA], ranks: Ranks, *shape: Any) -> MFA:
    """The mixture that `start` makes on rank 0, on every rank; `shape` is what `_blank` takes."""
    made: list[MFA] = []

    def make() -> float:
        made.append(start())
        return made[0].noise_floor

    floor = ranks.agree(make)
    mfa = made[0] if made else _blank(*shape)
    mfa.noise_floor = floor
    ranks.broadcast_(*mfa.tensors().values())
    return mfa


def _check_same(facts: dict[str, Any], ranks: Ranks) -> None:
    """Raises, on every rank, where the ranks were given different data or settings."""
    first, *others = ranks.objects(facts)
    for rank, other in enumerate(others, 1):
        different = [
            f"{name} = {other[name]!r}, on rank 0 {fact!r}" for name, fact in first.items() if other[name] != fact
        ]
        if different:
            raise ValueError(
                f"the ranks that fit together have different data or settings: rank {rank} has {'; '.join(different)} "
                "(group=False fits alone)"
            )


@contextmanager
def _timed(report: FitReport, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    report.seconds[stage] = time.perf_counter() - began


def _split(source: Source, held_out: float, generator: torch.Generator, report: FitReport) -> tuple[Tensor, Tensor]:
    """Row numbers to train on and to hold out, in random order; whole texts are held out where they are known.

    Rows of one text are alike: held out among those trained on, they promise more than other texts will keep.
    """
    rows = len(source)
    order = torch.randperm(rows, generator=generator)
    if not held_out:
        return order, order[:0]
    wanted = min(_HELD_OUT_ROWS, max(1, round(held_out * rows)))
    report.held_out_by = "row"
    if source.texts is not None:
        texts = source.texts().unique(return_inverse=True)[1]
        held = _held_texts(texts.bincount(), wanted, generator)[texts]
        if held.any():
            report.held_out_by = "text"
            return order[~held[order]], order[held[order]]
    return order[wanted:], order[:wanted]


def _held_texts(sizes: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Which texts, of so many rows each, are held out: in random order, as far as they fit; none, if only few would."""
    held = torch.zeros(len(sizes), dtype=torch.bool)
    left, count = wanted, 0
    for text in torch.randperm(len(sizes), generator=generator).tolist():
        size = int(sizes[text])
        if size <= left:
            held[text], left, count = True, left - size, count + 1
            if left < _NEARLY * wanted:
                break
    if count < _LEAST_HELD_TEXTS or left > wanted / 2:
        held.zero_()
    return held


def _checked(
    noise: Any,
    precision: Any,
    dtype: Any,
    held_out: Any,
    log: Any,
    **counts: tuple[Any, int],  # a value, and its least
) -> list[Any]:
    """`held_out` and the counts, in their order, as Python's own numbers.

    Raises where an argument is not what a fit can be given; now, and not when K-means is done.
    """
    check_choice(noise, NOISES, "noise")
    check_choice(precision, PRECISIONS, "precision")
    if check_dtype(dtype) not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    checked: list[Any] = [check_number(held_out, "held_out")]
    if not 0 <= checked[0] < 1:
        raise ValueError(f"held_out must be a share in [0, 1), got {held_out!r}")
    for name, (value, least) in counts.items():
        is_left_out = value is None and name in ("eval_every", "patience")
        checked.append(None if is_left_out else check_integer(value, name, least))
    if log is not None and check_path(log, "log").is_dir():
        raise IsADirectoryError(f"log must name a file, {log} is a folder")
    return checked


def _chosen(rows: float, components: int, batch_size: int) -> str:
    """The method of "auto" for data that is held, of so many rows to train on."""
    return "online" if rows / online_rows(components, batch_size) >= _LEAST_ONLINE_STEPS else "em"


def _data(source: Source, streamed: bool = False) -> str:
    """What tells whether the data is the same: rows from all over, or the first of a stream."""
    every = 1 if streamed else max(1, len(source) // _FINGERPRINT_ROWS)
    return fingerprint(source.rows(torch.arange(0, len(source), every)[:_FINGERPRINT_ROWS]))


def _finite(
    source: Source, index: Tensor, device: torch.device, dtype: torch.dtype, report: FitReport | None = None
) -> Tensor:
    """The finite ones of some rows, on `device`; the others are counted where there is a report."""
    return _weighed(source, index, device, dtype, report).rows


def _weighed(
    source: Source, index: Tensor, device: torch.device, dtype: torch.dtype, report: FitReport | None = None
) -> Weighed:
    """The same, with their weights."""
    weights = None if source.weights is None else source.weights[index].to(device)
    if not len(index):
        return Weighed(torch.empty(0, source.n_features, dtype=source.dtype, device=device), weights)
    x = source.rows(index).to(device)
    finite = finite_rows(x, dtype)
    if finite.all():
        return Weighed(x, weights)
    if report is not None:
        report.skipped_rows += int((~finite).sum())
    return Weighed(x[finite], None if weights is None else weights[finite])


@torch.no_grad()
def _count_live(mfa: AnyMFA, held_out: Tensor, source: Source, index: Tensor, report: FitReport, ranks: Ranks) -> None:
    """Counts the components that own a held-out row or one at `index`, of any rank, and warns where many own none."""
    owned = torch.zeros(mfa.n_components, dtype=torch.int32, device=mfa.means.device)
    rows = 0
    others = (_finite(source, part, mfa.means.device, mfa.means.dtype) for part in index.split(_CHUNK_ROWS))
    for x in chain(held_out.split(_CHUNK_ROWS), others):
        owners = mfa.assign(x)
        owned[owners[owners >= 0]] = 1  # a row too far out for the dtype has none
        rows += len(x)
    ranks.sum_(owned)
    report.live_rows += int(ranks.totals(rows)[0])
    report.live_components = int((owned > 0).sum())
    dead = mfa.n_components - report.live_components
    if dead > _DEAD_SHARE * mfa.n_components and ranks.first and mfa.ranks.first:
        warn(
            f"fit: {dead} of {mfa.n_components} components are not the most responsible for any of "
            f"{report.live_rows} rows; fewer components, more rows or another start may serve better"
        )

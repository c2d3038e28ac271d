"""`fit`: from activations to a mixture, with the best state on held-out rows."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import (
    check_callables,
    check_choice,
    check_device,
    check_flag,
    check_positive,
)
from mfa_kernels.common.files import StrPath
from mfa_kernels.common.processes import Processes
from mfa_kernels.data.source import as_source, home
from mfa_kernels.fitting import memory, preparation
from mfa_kernels.fitting.adam import SCHEDULES, Training
from mfa_kernels.fitting.checkpoint import DONE, Checkpoints, State, fingerprint, load_on_all
from mfa_kernels.fitting.em import BatchEM, OnlineEM
from mfa_kernels.fitting.guard import OTHERS, Guard
from mfa_kernels.fitting.guard import ROWS as GUARD_ROWS
from mfa_kernels.fitting.initialization import INITS, centroids_of, start_from_clusters
from mfa_kernels.fitting.kmeans import KMeansResult, kmeans
from mfa_kernels.fitting.notices import going_on, warn
from mfa_kernels.fitting.provenance import now, run_of
from mfa_kernels.fitting.row_weights import weighted
from mfa_kernels.fitting.run import Callback, Run, Settings, mixture_state
from mfa_kernels.fitting.start_from_mixture import fingerprint_of, shape_given, start_from_mixture
from mfa_kernels.fitting.streaming import Feed, Fitting, alone
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.ops.common.finite import finite_rows

METHODS = ("sgd", "em", "online", "auto")


@alone  # a generator, so that several can be fed from one stream: `mfa_kernels.fitting.fit_many`
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
    pass of "em" in two.) Process 0 runs K-means, shows progress, and writes `log` and `checkpoint`; callbacks are
    called on the processes that have them, and parameters that they change become those of process 0. Of an iterator
    that is fitted online, every process brings its own, and it takes as many processes to resume. Data or settings that
    differ between processes are an error. An error on one process alone, and Ctrl-C, are left to the launcher, which
    ends the others. Where the mixture itself does not fit on one device, `mfa_kernels.fitting.fit_sharded` spreads its
    components.

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
        group: the `torch.distributed.ProcessGroup` whose processes fit together; None: the default one where there is
            one; False: this process fits alone.

    Returns:
        The mixture, with a `FitReport` as its attribute `fit_report`.

    Raises:
        TypeError, ValueError: naming the argument; for `resume`, each setting that differs.
        FileExistsError: `checkpoint` holds one, and there is no `resume`; or `checkpoint` or `log` would take the place
            of something else (`mfa_kernels.common.places`).
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
    checked = preparation.checked_arguments(
        noise, precision, dtype, held_out, log, n_components=(n_components, 1), rank=(rank, 0), epochs=(epochs, 0),
        batch_size=(batch_size, 1), polish=(polish, 0), eval_every=(eval_every, 1), patience=(patience, 1),
        seed=(seed, 0),
    )  # fmt: skip
    held_out, n_components, rank, epochs, batch_size, polish, eval_every, patience, seed = checked
    lr, callbacks = check_positive(lr, "lr"), check_callables(callbacks, "callbacks")
    progress = progress if isinstance(progress, str) else check_flag(progress, "progress")
    device = device if device is None else check_device(device)
    if device is not None and device.type == "meta":
        raise ValueError("device must be one that holds values, got the meta device")
    processes = Processes(group)
    folder, resumed = processes.agree(lambda: preparation.checkpoint_folders(checkpoint, checkpoint_seconds, resume))
    log = None if log is None else Path(log).absolute()  # wherever the process goes meanwhile
    if polish and (streamed or method == "sgd"):
        raise ValueError(f"polish must be 0 {'for an iterator' if streamed else 'with method sgd'}, got {polish}")
    if row_weights is not None and streamed:
        raise ValueError(
            "row_weights must be None for an iterator that is fitted online: give weighted rows as a whole"
        )
    with preparation.holding(folder, log, processes):
        sample = max(preparation.LEAST_START_ROWS, preparation.START_ROWS_PER_COMPONENT * n_components)
        stream = Feed() if streamed else None
        if stream is not None:
            head = math.ceil(sample / processes.count / (1 - held_out))
            while not stream.holds(head):
                stream.put((yield))
            source = stream.source()
            if stream.ended and processes.count == 1:  # all of it is here: data like any other
                stream, streamed = None, False
            else:
                sample = len(source)  # what the last batch brought besides is not read again
                while not stream.holds(OTHERS // processes.count):
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
            method = (
                "online"
                if streamed
                else preparation.chosen_method(len(source) * (1 - held_out), n_components, batch_size)
            )
        device = device if device is not None else source.device
        processes.on(device)
        label = f"{progress}, " if isinstance(progress, str) else ""
        progress = bool(progress) and processes.first
        settings = Settings(
            epochs, batch_size, lr, schedule, eval_every, patience, callbacks, log, progress, processes, label
        )
        generator = torch.Generator().manual_seed(seed)
        report = FitReport(method=method)

        rows, held_index = preparation.split_rows(source, held_out, generator, report)
        start_index, live_index = rows[:sample], rows[: preparation.LIVE_ROWS_PER_COMPONENT * n_components]
        if not streamed:  # every process its part. Of held-out rows, the first are then the first of each process's
            start_index, live_index = processes.share(start_index), processes.share(live_index)
            held_index = held_index[processes.index :: processes.count]
        held_out_rows, held_out_weights = preparation.weighed(source, held_index, device, dtype, report)
        held_out_rows = held_out_rows.to(dtype)
        all_held, report.held_out_rows = map(int, processes.totals(len(held_index), len(held_out_rows)))
        if all_held and not report.held_out_rows:
            raise ValueError(f"held_out: none of the {all_held} held-out rows is finite")
        # What is left out of the sample is counted when training meets it. Several processes send it on their devices.
        there = device if processes.count > 1 else home(source, len(start_index), device)
        start_rows, start_weights = preparation.weighed(
            source, start_index, there, dtype, None if epochs and not streamed else report
        )
        found, report.skipped_rows = map(int, processes.totals(len(start_rows), report.skipped_rows))
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
        data = preparation.data_fingerprint(source, streamed)
        facts = {
            "rows": None if streamed else len(source), "n_features": source.n_features,
            "data": " ".join(processes.objects(data)) if streamed else data,  # every process brings a stream of its own
            "n_components": n_components, "rank": rank, "method": method, "noise": noise, "init": init,
            "clusters": None if clusters is None else fingerprint(clusters), "start": fingerprint_of(start),
            "row_weights": None if source.weights is None else fingerprint(source.weights), "epochs": epochs,
            "batch_size": batch_size, "lr": lr, "schedule": schedule, "polish": polish, "held_out": held_out,
            "eval_every": eval_every, "patience": patience, "seed": seed, "dtype": str(dtype),
            "precision": precision, "ranks": processes.count if streamed else None,
        }  # fmt: skip
        preparation.check_same(facts, processes)
        report.run = run_of(facts, source, device, processes, began=began, asked=asked, streamed=streamed)
        if folder is not None:
            checkpoints = Checkpoints(folder, checkpoint_seconds, facts)
            saved = None if resumed is None else load_on_all(checkpoints, resumed, processes)

        if streamed and len(live_index):  # nothing else of the head is looked at again
            source, live_index = as_source(source.rows(live_index)), torch.arange(len(live_index))

        if progress:
            held = len(held_out_rows) + (len(start_rows) if there == device else 0) + min(GUARD_ROWS, found)
            planned = memory.plan(n_components, source.n_features, rank, noise, method, dtype, held)
            told = memory.line(planned, f"K={n_components} R={rank} D={source.n_features}")
            if told:
                print(told, file=sys.stderr)

        if saved is None:
            whole = processes.gathered(start_rows)
            weights = None if start_weights is None else processes.gathered(start_weights)

            def begin() -> MFA:
                if start is not None:
                    with preparation.timed(report, "start"):
                        return start_from_mixture(start, precision, dtype, device)
                with preparation.timed(report, "kmeans"):
                    result: KMeansResult | Tensor = clusters if clusters is not None else kmeans(
                        whole, n_components, weights=weights,
                        iterations=preparation.KMEANS_ITERATIONS, seed=seed, device=device, progress=progress,
                    )  # fmt: skip
                    centroids = centroids_of(result, source.n_features, n_components)
                with preparation.timed(report, "start"):
                    return start_from_clusters(
                        whole, centroids, rank, noise, weights=weights,
                        init=init, precision=precision, dtype=dtype, device=device, seed=seed, progress=progress,
                    )  # fmt: skip

            mfa = preparation.from_first_process(
                begin, processes, n_components, source.n_features, rank, noise, precision, device, dtype
            )
            del whole, weights, begin
        else:
            report = saved.report
            assert checkpoints is not None
            with checkpoints.reading():
                mfa = preparation.restored_mixture(
                    saved, noise, precision, device, (n_components, source.n_features, rank)
                )
        if saved is None or saved.stage != DONE:
            arguments = mfa, source, rows, held_out_rows
            # Rows that the start has not seen, and that are trained on next: none, where it has seen all.
            if stream is None:
                unseen, unseen_weights = preparation.weighed(
                    source, processes.share(rows[sample : sample + OTHERS]), device, dtype
                )
            else:
                unseen_weights = None
                unseen = stream.peek(OTHERS // processes.count)
                unseen = unseen[finite_rows(unseen, dtype)]
            guard = Guard(start_rows, device, unseen, processes, start_weights, unseen_weights)
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
                yield from preparation.run_stage(run, method, checkpoints, saved)
                saved, begun = None, run.start
            if polish and not report.interrupted:
                run = Training(*arguments, replace(settings, epochs=polish), generator, report, guard, **weighing)
                run.begin_below(begun)
                yield from preparation.run_stage(run, "polish", checkpoints, saved)
            if stream is not None and report.run:  # known only now
                report.run.setdefault("data", {})["rows"] = int(processes.totals(stream.taken)[0])
            preparation.count_live(mfa, held_out_rows, source, live_index, report, processes)
            if report.refused_states and processes.first:
                warn(
                    f"fit: {report.refused_states} states were not kept: rows that they were trained on, weighed "
                    "against the prior, are less likely under them than under the start"
                )
            if checkpoints is not None and processes.first and not report.interrupted:
                with going_on("the checkpoint of its end", "the one before stays, and the mixture is returned"):
                    checkpoints.save(State(DONE, mixture_state(mfa), {"noise_floor": mfa.noise_floor}, report))
        mfa.zero_grad()
        mfa.fit_report = report
        return mfa

"""The stages of a fit, in the order of a class: prepare, start, train, report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.data.source import Source, as_source, home
from mfa_kernels.fitting import memory, preparation
from mfa_kernels.fitting.adam import Training
from mfa_kernels.fitting.candidates import BYTES
from mfa_kernels.fitting.checkpoint import DONE, Checkpoints, State, fingerprint, load_on_all
from mfa_kernels.fitting.em import BatchEM
from mfa_kernels.fitting.guard import OTHERS, Guard, Look, Scan
from mfa_kernels.fitting.guard import ROWS as GUARD_ROWS
from mfa_kernels.fitting.initialization import centroids_of, start_from_clusters
from mfa_kernels.fitting.kmeans import kmeans
from mfa_kernels.fitting.kmeans.two_levels import FEWEST, two_levels
from mfa_kernels.fitting.notices import warn, write_or_warn
from mfa_kernels.fitting.online_em import OnlineEM, StreamedEM
from mfa_kernels.fitting.options import Options
from mfa_kernels.fitting.provenance import now, run_of
from mfa_kernels.fitting.run import Run, mixture_state
from mfa_kernels.fitting.start_from_mixture import fingerprint_of, start_from_mixture
from mfa_kernels.fitting.streaming import RowQueue
from mfa_kernels.fitting.truncated_em import TruncatedEM
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.ops.common.backends import serving
from mfa_kernels.ops.common.finite import finite_rows


class Stages:
    """A fit whose processes share the rows, each with the whole mixture: its stages are called once, in their order.

    Args:
        options: what was asked for.
    """

    checkpoints: Checkpoints | None = None
    saved: State | None = None  # the checkpoint to resume from, until the stage that it was written in is resumed
    scan: Scan | None = None  # of rows by their numbers, as the training leaves it
    look: Look | None = None  # of any rows
    start_rows: Tensor | None = None  # until the training has read them
    start_weights: Tensor | None = None

    def __init__(self, options: Options) -> None:
        self.options, self.began = options, now()

    def prepare(self, source: Source, queue: RowQueue | None = None) -> None:
        """Compares the processes, opens the checkpoint to resume from, and takes the rows of the fit.

        Args:
            source: the data; of a stream, the rows that it began with.
            queue: brings the other rows of a stream; None: the source is all there is.
        """
        options, spread = self.options, self.options.split == "components"
        self.source, self.queue, self.method = source, queue, options.method
        self.device = source.device if options.device is None else options.device
        if options.rank > source.n_features:
            raise ValueError(
                f"rank must be at most the width of the activations, {source.n_features}, got {options.rank}"
            )
        if self.method == "auto":
            rows = len(source) * (1 - options.held_out)
            passes = options.epochs if self._truncates() else None
            chosen = preparation.chosen_method(rows, options.n_components, options.batch_size, passes)
            self.method = chosen if queue is None else "online"
        self._check_start()
        options.group.on(self.device)
        facts = self._facts()
        alike = {"callbacks": len(options.callbacks)} if spread else {}
        preparation.check_same({**facts, **alike}, options.group)
        record = run_of(
            facts, source, self.device, options.group, began=self.began, asked=options.method,
            streamed=queue is not None, spread=spread,
        )  # fmt: skip
        self.fit_report = FitReport(method=self.method, run=record)
        if options.checkpoint is not None:
            self._open_checkpoints(options.checkpoint, facts)
        kept = self._take_rows()
        if options.progress:
            sizes = options.n_own, source.n_features, options.rank
            of_candidates = BYTES * len(source) if self.method == "truncated" else 0
            planned = memory.plan(*sizes, options.noise, self.method, options.dtype, kept, of_candidates)
            part = f", a process of {options.group.count}," if spread else ""
            memory.tell(planned, f"K={options.n_components} R={options.rank} D={source.n_features}{part}")

    def _truncates(self) -> bool:
        """True where "auto" may take truncated E-steps: where kernels for them were measured."""
        asked = self.options
        like = torch.empty(0, dtype=asked.dtype, device=self.device)
        return asked.split == "rows" and asked.precision != "reference" and serving(like, asked.rank) == "cpp"

    def _take_rows(self) -> int:
        """Splits the rows, reads those held out and those of the start; returns how many are kept on the device."""
        options, processes, source, queue = self.options, self.options.processes, self.source, self.queue
        self.generator = torch.Generator().manual_seed(options.seed)
        self.rows, held_out = preparation.split_rows(source, options.held_out, self.generator, self.fit_report)
        self.n_start = preparation.start_rows(options.n_components) if queue is None else len(source)
        start = self.rows[: self.n_start]
        live = self.rows[: preparation.sampled_rows(preparation.LIVE_ROWS_PER_COMPONENT, options.n_components)]
        if queue is None:  # interleaved, so that the first rows of all are split evenly over the processes
            held_out = held_out[processes.index :: processes.count]
            start, live = processes.share(start), processes.share(live)
        found = preparation.weighed(source, held_out, self.device, options.dtype, self.fit_report)
        self.held_out, self.held_out_weights = found.rows.to(options.dtype), found.weights
        all_held, self.fit_report.held_out_rows = map(int, processes.totals(len(held_out), len(found.rows)))
        if all_held and not self.fit_report.held_out_rows:
            raise ValueError(f"held_out: none of the {all_held} held-out rows is finite")
        kept = len(self.held_out) + self._read_start(start, all_held)
        self.live = live
        if queue is not None and len(live):  # of the buffered rows, only these are read again: the others are freed
            self.source, self.live = as_source(source.rows(live)), torch.arange(len(live))
        return kept

    def start(self) -> None:
        """Makes the mixture that training begins with, or takes over that of the checkpoint."""
        if self.saved is None:
            self.mfa: Any = self._first()
            return
        assert self.checkpoints is not None
        self.fit_report = self.saved.report
        asked, shape = self.options, (self.options.n_own, self.source.n_features, self.options.rank)
        with self.checkpoints.reading():
            self.mfa = self._spread(
                preparation.restored_mixture(self.saved, asked.noise, asked.precision, self.device, shape)
            )

    @property
    def n_unseen(self) -> int:
        """How many rows, unread by the start, this process gives to the sample that guards against worse states."""
        return OTHERS // self.options.processes.count

    @property
    def was_done(self) -> bool:
        """True where the checkpoint is that of a fit that came to its end."""
        return self.saved is not None and self.saved.stage == DONE

    def train(self) -> None:
        """Trains by the method, and polishes; the mixture is then the best of its states."""
        if self.was_done:
            return
        guard = self.guard()
        objective: tuple[float, float] | None = None
        if self.saved is None or self.saved.stage == self.method:
            run = self.run(guard)
            run.train(self.method, self.checkpoints, self.saved)
            self.saved, objective = None, run.objective_of_start
            self.scan, self.look = run.scan_rows, run.look
        if self.options.polish and not self.fit_report.interrupted:
            polished = replace(self.options, epochs=self.options.polish)
            run = Training(*self._arguments(guard, polished), held_out_weights=self.held_out_weights)
            run.begin_below(objective)
            run.train("polish", self.checkpoints, self.saved)

    def report(self) -> Any:
        """Completes the report, writes the checkpoint of the end, and returns the mixture."""
        report, options = self.fit_report, self.options
        if not self.was_done:
            if self.queue is not None and report.run:  # how many rows a stream has is known only now
                report.run.setdefault("data", {})["rows"] = int(options.processes.totals(self.queue.taken)[0])
            rows = self.held_out, self.source, self.live
            preparation.count_live(self.mfa, *rows, report, options.processes, self.scan, self.look)
            if report.refused_states and options.group.first:
                warn(
                    f"fit: {report.refused_states} states were not kept: rows that they were trained on, weighed "
                    "against the prior, are less likely under them than under the start"
                )
            if self.checkpoints is not None and options.processes.first and not report.interrupted:
                with write_or_warn("the checkpoint of its end", "the one before stays, and the mixture is returned"):
                    values = {"noise_floor": self.mfa.noise_floor}
                    self.checkpoints.save(State(DONE, mixture_state(self.mfa), values, report))
        self.mfa.zero_grad()
        self.mfa.fit_report = report
        return self.mfa

    def streamed_run(self) -> StreamedEM:
        """The training on rows as they come, begun or resumed; it is fed, and then left."""
        run: Any = self.run(self.guard())
        run.enter(self.method, self.checkpoints, self.saved)
        self.scan, self.look = run.scan_rows, run.look
        return run

    def run(self, guard: Guard) -> Run:
        """The training by the method, yet to begin."""
        arguments = self._arguments(guard, self.options)
        weighing: dict[str, Any] = {"held_out_weights": self.held_out_weights}
        of_start = {"start_rows": self.start_rows, "start_weights": self.start_weights}
        self.start_rows = self.start_weights = None  # from now only a run of EM refers to them, and can free them
        if self.method == "sgd":
            return Training(*arguments, **weighing)
        weighing |= of_start
        if self.method == "em":
            return BatchEM(*arguments, **weighing)
        if self.method == "truncated":
            return TruncatedEM(*arguments, **weighing)
        if self.queue is None:
            return OnlineEM(*arguments, **weighing)
        return StreamedEM(*arguments, **weighing, queue=self.queue)

    def guard(self) -> Guard:
        """Returns the sample on which no kept state may be less likely than the start.

        It holds up to `OTHERS` rows that the start has not read, and outliers among the rows that it has.
        """
        asked, processes = self.options, self.options.processes
        if self.queue is None:
            index = processes.share(self.rows[self.n_start : self.n_start + OTHERS])
            unseen, weights, _ = preparation.weighed(self.source, index, self.device, asked.dtype)
        else:
            unseen, weights = self.queue.peek(self.n_unseen), None
            unseen = unseen[finite_rows(unseen, asked.dtype)]
        assert self.start_rows is not None
        return Guard(self.start_rows, self.device, unseen, processes, self.start_weights, weights)

    def _arguments(self, guard: Guard, options: Options) -> tuple[Any, ...]:
        return self.mfa, self.source, self.rows, self.held_out, options, self.generator, self.fit_report, guard

    def _check_start(self) -> None:
        start, features = self.options.start, self.source.n_features
        if start is not None and start.n_features != features:
            raise ValueError(
                f"start must have the width of the activations, {features}, got {start.n_features} features"
            )

    def _facts(self) -> dict[str, Any]:
        """The data and the settings, as checkpoints compare them."""
        asked, source, streamed = self.options, self.source, self.queue is not None
        clusters = None
        if asked.clusters is not None:
            clusters = centroids_of(asked.clusters, source.n_features, asked.n_components)
        data = preparation.data_fingerprint(source, streamed)
        return {
            "rows": None if streamed else len(source), "n_features": source.n_features,
            "data": " ".join(asked.group.objects(data)) if streamed else data,  # each process has a stream of its own
            "n_components": asked.n_components, "rank": asked.rank, "method": self.method, "noise": asked.noise,
            "init": asked.init, "clusters": None if clusters is None else fingerprint(clusters),
            "start": fingerprint_of(asked.start) if isinstance(asked.start, MFA) else None,
            "row_weights": None if source.weights is None else fingerprint(source.weights), "epochs": asked.epochs,
            "batch_size": asked.batch_size, "lr": asked.lr, "schedule": asked.schedule, "polish": asked.polish,
            "held_out": asked.held_out, "eval_every": asked.eval_every, "patience": asked.patience,
            "seed": asked.seed, "dtype": str(asked.dtype), "precision": asked.precision,
            "ranks": asked.group.count if streamed else None,
        }  # fmt: skip

    def _open_checkpoints(self, folder: Path, facts: dict[str, Any]) -> None:
        """Prepares to write checkpoints, and reads the one to resume from."""
        self.checkpoints = Checkpoints(folder, self.options.checkpoint_seconds, facts)
        if self.options.resume is not None:
            self.saved = load_on_all(self.checkpoints, self.options.resume, self.options.processes)

    def _read_start(self, index: Tensor, all_held: int) -> int:
        """Reads the rows of the start; returns how many rows the device holds for it and for the guard."""
        source, processes, components = self.source, self.options.processes, self.options.n_components
        # Rows of the sample that are not finite are counted here only if training will not read them again. With
        # several processes the sample is kept on the device, from which it is sent.
        there = self.device if processes.count > 1 else home(source, len(index), self.device)
        counts = self.fit_report if self.queue is not None or not self.options.epochs else None
        found = preparation.weighed(source, index, there, self.options.dtype, counts)
        self.start_rows, self.start_weights, _ = found
        total, self.fit_report.skipped_rows = map(int, processes.totals(len(found.rows), self.fit_report.skipped_rows))
        if total < components:
            raise ValueError(
                f"n_components = {components} needs at least as many finite rows to train on, got {total} "
                f"of {len(source)} (held out: {all_held})"
            )
        if source.weights is not None and float(source.weights[self.rows].sum()) < components:
            raise ValueError(
                f"row_weights must be n_components = {components} in all at least, of the rows to train on, as they "
                f"count rows, got {float(source.weights[self.rows].sum()):g}: scale them, to a mean of 1 for example"
            )
        return (len(found.rows) if there == self.device else 0) + min(GUARD_ROWS, total)

    def _first(self) -> Any:
        """Makes the mixture that training begins with on process 0, and copies it to the others."""
        asked, processes = self.options, self.options.processes
        assert self.start_rows is not None
        whole = processes.gathered(self.start_rows)
        weights = None if self.start_weights is None else processes.gathered(self.start_weights)

        def begin() -> MFA:
            if not isinstance(asked.start, MFA):
                return self._of_clusters(as_source(whole), weights=weights)
            with preparation.timed(self.fit_report, "start"):
                return start_from_mixture(asked.start, asked.precision, asked.dtype, self.device)

        shape = asked.n_components, self.source.n_features, asked.rank, asked.noise
        return preparation.from_first_process(begin, processes, *shape, asked.precision, self.device, asked.dtype)

    def _of_clusters(self, rows: Source, **how: Any) -> MFA:
        """The mixture of the clusters that were given, or that K-means finds."""
        asked, found = self.options, self.options.clusters
        common = {"seed": asked.seed, "device": self.device, "progress": asked.progress, **how}
        with preparation.timed(self.fit_report, "kmeans"):
            many = asked.n_components >= FEWEST and self.device.type == rows.device.type == "cpu"
            if found is None and many and "processes" not in how:
                found = two_levels(rows, asked.n_components, seed=asked.seed, progress=asked.progress, **how)
                common["assignment"] = found.assignment
            elif found is None:
                found = kmeans(rows, asked.n_components, iterations=preparation.KMEANS_ITERATIONS, **common)
                common["assignment"] = found.assignment.clamp_min(0)  # rows that are not finite are let be again
        with preparation.timed(self.fit_report, "start"):
            return start_from_clusters(
                rows, found, asked.rank, asked.noise,
                init=asked.init, precision=asked.precision, dtype=asked.dtype, **common,
            )  # fmt: skip

    def _spread(self, own: MFA) -> Any:
        """Returns `own`, which holds all components; `ShardedStages` wraps it as a part of a `ShardedMFA`."""
        return own

"""The base of all training: settings, batches, and a run that keeps the best state on held-out rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.files import StrPath
from mfa_kernels.common.modes import of_the_caller
from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.data.source import Source
from mfa_kernels.fitting import memory
from mfa_kernels.fitting.checkpoint import Checkpoints, State
from mfa_kernels.fitting.guard import Guard, Look, Scan
from mfa_kernels.fitting.notices import warn, write_or_warn
from mfa_kernels.fitting.row_weights import Weighed, mean_weight
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.rotate_loadings import sign_
from mfa_kernels.ops.common.finite import finite_rows
from mfa_kernels.ops.scan.types import ActivePairs

Callback = Callable[[MFA, dict[str, Any]], Any]


EVALUATION_ROWS = 4096  # at once


@dataclass(frozen=True)
class Settings:
    """Settings of the training; `fit` documents the fields."""

    epochs: int
    batch_size: int
    lr: float
    schedule: str
    eval_every: int | None
    patience: int | None
    callbacks: Sequence[Callback]
    log: StrPath | None
    progress: bool
    processes: Processes = ALONE
    label: str = ""  # that progress bars begin with


def read_ahead(source: Source, indices: Iterator[Tensor]) -> Iterator[Tensor]:
    """The rows at each of the indices; from a disk, the next ones are read while the caller works."""
    if source.in_memory:
        yield from map(source.rows, indices)
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for index in indices:
            due, ahead = ahead, pool.submit(source.rows, index)
            if due is not None:
                yield due.result()
        if ahead is not None:
            yield ahead.result()


def shuffled(rows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The row numbers `rows` in random batches of nearly equal size, sorted within each, as disks like it."""
    order = rows[torch.randperm(len(rows), generator=generator)]
    for batch in order.tensor_split(-(-len(rows) // batch_size)):
        yield batch.sort().values


@torch.no_grad()
def standard_deviation(mfa: Mixture) -> Tensor:
    """The standard deviation of x within a component, averaged over the components: (D,)."""
    weights = mfa.log_weights.exp()
    noise = mfa.noise_variance
    variance = torch.einsum("k,kdr,kdr->d", weights, mfa.loadings, mfa.loadings)
    if noise.dim() == 2:
        variance += weights @ noise
    mfa.processes.sum_(variance)
    return (variance if noise.dim() == 2 else noise + variance).sqrt()


@torch.no_grad()
def mean_nll(mfa: Mixture, x: Tensor, processes: Processes = ALONE, weights: Tensor | None = None) -> float:
    """Mean negative log-likelihood of x (n, D), which weigh (n,), in nats per row; over the rows of all processes."""
    log_prob = torch.cat([mfa.log_prob(part) for part in x.split(EVALUATION_ROWS)]).double()
    return nll_of(log_prob, processes, weights)


def nll_of(log_prob: Tensor, processes: Processes, weights: Tensor | None) -> float:
    if processes.count == 1 and weights is None:
        return -float(log_prob.mean())
    total = float((log_prob if weights is None else log_prob * weights).sum())
    total, mass = processes.totals(total, len(log_prob) if weights is None else float(weights.sum()))
    return -total / mass


def mixture_state(mfa: Mixture) -> dict[str, Tensor]:
    """Parameters of the components that are held here and the centre, by the names they have in a checkpoint."""
    return {f"mfa.{name}": tensor for name, tensor in mfa.tensors().items()}


class Run:
    """A training of a mixture in place, which keeps the parameters that are best on held-out rows.

    A run whose report has a history continues it: with the mixture as the best so far.

    Args:
        mfa: the start.
        source: the data.
        rows: numbers of the rows to train on, int64.
        held_out: finite rows (n, D) on the mixture's device, a process's own share; where no process has any, the last
            parameters are left.
        settings: how, and with which other processes.
        generator: of the order of the rows.
        report: is filled.
        guard: rows to train on, under which no state may be less likely than under the start.
        held_out_weights: of the held-out rows, (n,) float64, where the source's rows have weights.
    """

    def __init__(
        self, mfa: MFA, source: Source, rows: Tensor, held_out: Tensor, settings: Settings,
        generator: torch.Generator, report: FitReport, guard: Guard, *, held_out_weights: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.mfa, self.source, self.rows, self.held_out, self.guard = mfa, source, rows, held_out, guard
        self.held_out_weights, self.mean_weight = held_out_weights, mean_weight(source, rows)
        self.settings, self.generator, self.report = settings, generator, report
        self.processes = settings.processes
        self.selects = self.processes.totals(len(held_out))[0] > 0  # on held-out rows
        last: dict[str, Any] = {"step": 0, "epoch": 0, "seconds": 0.0, **(report.history[-1] if report.history else {})}
        self.first_step, self.first_epoch, self.seconds = last["step"], last["epoch"], last["seconds"]
        self.best = self._copy() if report.history else None
        self.objective_of_start: tuple[float, float] | None = None  # the guard's likelihood, and the log prior
        self.evaluations_since_best = 0
        self.losses: list[float] = []  # since the last evaluation, as are the two counts below
        self.tokens = 0  # trained on by this process
        self.skipped = 0  # rows of this process that the report does not count yet
        self.began = time.perf_counter()
        self.checkpoints: Checkpoints | None = None
        self.stage = ""  # the name of the stage of the fit, for the report and the checkpoints
        self.created, self.spent_before = self.began, 0.0

    def _bar(self, name: str, total: int | None, done: int, unit: str = "token") -> Any:
        """A progress bar of this run, of so many units in all."""
        label, progress = f"{self.settings.label}{name}", self.settings.progress
        large = unit == "token"
        return progress_bar(total=total, initial=done, desc=label, unit=unit, unit_scale=large, progress=progress)

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.mfa.parameters()]

    def train(self, stage: str, checkpoints: Checkpoints | None, saved: State | None) -> None:
        """Does one stage of a fit, until its end or Ctrl-C; the mixture is then the best of its states."""
        self.enter(stage, checkpoints, saved)
        try:
            self.run()
        except KeyboardInterrupt:
            self.interrupt()
        self.leave()

    def run(self) -> None:
        """Changes the mixture, evaluating on the way."""
        raise NotImplementedError

    def enter(self, stage: str, checkpoints: Checkpoints | None, saved: State | None) -> None:
        """Begins a stage of the fit, or resumes it from a checkpoint of this stage."""
        self.stage, self.checkpoints = stage, checkpoints
        self.spent_before = self.report.seconds.get(stage, 0.0)
        if saved is not None:
            assert checkpoints is not None  # that it was read by
            with checkpoints.reading():
                self._check(saved.tensors)
                self._load(saved.tensors, saved.values)
        elif checkpoints is not None:
            self._save(checkpoints)

    def interrupt(self) -> None:
        """Notes Ctrl-C, which ends the training; with several processes it ends the fit, as the others work on."""
        if max(self.processes.count, self.mfa.processes.count) > 1:
            raise KeyboardInterrupt
        self.report.interrupted = True
        warn("fit: interrupted; the mixture is the best so far")

    def leave(self) -> None:
        """Ends the stage: completes the report, and leaves the best parameters in the mixture."""
        self.report_skipped()
        self.note_time()
        if self.best is not None and (self.selects or self.report.interrupted or self._gain() < 0):
            self._put(self.best)
        sign_(self.mfa.loadings)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises where a saved tensor has another shape or dtype than what it is to replace: kernels rely on both."""
        for name, like in self._like().items():
            if name in tensors and (tensors[name].shape, tensors[name].dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"{name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}, expected {like.dtype} of "
                    f"shape {tuple(like.shape)}"
                )
        for name in ("losses", "log_posteriors"):
            if name in tensors and (tensors[name].dim() != 1 or tensors[name].dtype != torch.float64):
                raise ValueError(
                    f"{name} is {tensors[name].dtype} of {tensors[name].dim()} dimensions, expected a list"
                )
        if all(f"best.{i}" in tensors for i in range(4)) != any(f"best.{i}" in tensors for i in range(4)):
            raise ValueError("one of the best parameters is missing")

    def _like(self) -> dict[str, Tensor]:
        """By name, what has the shape and the dtype that a saved tensor must have."""
        like = mixture_state(self.mfa)
        for i, parameter in enumerate(self.mfa.parameters()):
            like |= {f"best.{i}": parameter, f"plain.{i}": parameter}
        return like

    def note_time(self) -> None:
        """Tells the report what this stage has taken so far."""
        self.report.seconds[self.stage] = self.spent_before + time.perf_counter() - self.created

    def _save_if_due(self) -> None:
        """Saves a checkpoint where one is due; all processes call it, between two batches, where a run can resume."""
        if self.checkpoints is not None and self.processes.totals(self.processes.first and self.checkpoints.due())[0]:
            self._save(self.checkpoints)

    def _save(self, checkpoints: Checkpoints) -> None:
        self.note_time()
        self.report_skipped()
        state = self._state()  # which may take all processes
        if self.processes.first:
            with write_or_warn(f"a checkpoint in {checkpoints.folder}"):
                checkpoints.save(State(self.stage, *state, self.report))
            checkpoints.note_time()

    def report_skipped(self) -> None:
        """Tells the report the rows that all processes have left out."""
        self.report.skipped_rows += int(self.processes.totals(self.skipped)[0])
        self.skipped = 0

    def _read(self, batches: Iterator[Tensor], bar: Any = None) -> Iterator[Weighed]:
        """This process's share of the rows in each batch of row numbers.

        The batches are those of all processes: their sequence does not depend on how many there are.
        """
        shares, whole = tee(batches)
        for x, batch in zip(read_ahead(self.source, map(self.processes.share, shares)), whole):
            if bar is not None:
                bar.update(len(batch))
            weights, numbers = self.source.weights, self.processes.share(batch)
            yield Weighed(x, None if weights is None else weights[numbers], numbers)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state that the rest of the run depends on: tensors, and values that JSON can hold."""
        tensors = mixture_state(self.mfa)
        tensors |= {f"best.{i}": kept for i, kept in enumerate(self.best or ())}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors |= self.guard.state()
        return tensors, {
            "start": self.objective_of_start, "noise_floor": self.mfa.noise_floor, "first_step": self.first_step,
            "first_epoch": self.first_epoch, "seconds": self.seconds + time.perf_counter() - self.began,
            "evaluations_since_best": self.evaluations_since_best,
        }  # fmt: skip

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes over what `_state` gave; the mixture's own part is in it already."""
        self.best = self._saved_parameters(tensors, "best")
        self.losses = tensors["losses"].tolist()
        self.guard.load(tensors)
        self.objective_of_start = None if values["start"] is None else tuple(values["start"])
        self.first_step, self.first_epoch = values["first_step"], values["first_epoch"]
        self.seconds = values["seconds"]
        self.evaluations_since_best = values["evaluations_since_best"]

    def _saved_parameters(self, tensors: Mapping[str, Tensor], group: str) -> list[Tensor] | None:
        """The parameters that were saved as one group of tensors, such as the best ones; None where there were none."""
        names = [f"{group}.{i}" for i in range(4)]
        return [tensors[name].to(self.mfa.means.device, copy=True) for name in names if name in tensors] or None

    @torch.no_grad()
    def _put(self, parameters: list[Tensor]) -> None:
        """The inverse of `_copy`."""
        for parameter, kept in zip(self.mfa.parameters(), parameters):
            parameter.copy_(kept)

    def _finite(self, batch: Weighed, count_skipped: bool) -> Weighed:
        """The finite rows of a batch, on the mixture's device; the others are counted, once."""
        device = self.mfa.means.device
        x, (weights, numbers) = batch.rows.to(device), (None if t is None else t.to(device) for t in batch[1:])
        finite = finite_rows(x, self.mfa.means.dtype)
        if finite.all():
            return Weighed(x, weights, numbers)
        if count_skipped:
            self.skipped += int((~finite).sum())
        return Weighed(x[finite], *(None if part is None else part[finite] for part in (weights, numbers)))

    def _out_of_patience(self, finished: bool) -> bool:
        """True where nothing improved for too long; the report says so, unless the run has `finished` anyway."""
        if self.settings.patience is None or self.evaluations_since_best < self.settings.patience:
            return False
        self.report.stopped_early = not finished
        return True

    def _evaluate(self, step: int, epoch: int, bar: Any) -> None:
        spent = time.perf_counter() - self.began
        self.seconds += spent
        found = self._look_at_held_out() if self.selects else {"held_out_nll": None, "live": None, "active": None}
        held_out = found["held_out_nll"]
        self.report_skipped()
        step, epoch = step + self.first_step, epoch + self.first_epoch
        tokens = self.processes.totals(self.tokens)[0]
        train_nll = sum(self.losses) / len(self.losses) if self.losses else None
        record = {
            "step": step, "epoch": epoch, "train_nll": train_nll, **found, "gain": self._gain(),
            "seconds": self.seconds, "tokens_per_second": tokens / spent if tokens else None,
            "memory": memory.peak(self.mfa.means.device),
        }  # fmt: skip
        report = self.report
        report.history.append(record)
        self.evaluations_since_best += 1
        before = report.held_out_nll
        best = held_out is None or before is None or held_out < before or math.isnan(before)
        if best and record["gain"] < 0:
            report.refused_states += 1
        elif best:
            report.best_step, report.held_out_nll, self.evaluations_since_best = step, held_out, 0
            self.best = self._copy()
        if held_out is None:
            self.evaluations_since_best = 0  # there is nothing to lose patience with
        bar.set_postfix(nll=f"{held_out if held_out is not None else record['train_nll'] or math.nan:.4f}")
        if self.settings.log is not None:
            with write_or_warn(f"the log {self.settings.log}"):
                report.write_history(self.settings.log)
        versions = [p._version for p in self.mfa.parameters()]
        for callback in self.settings.callbacks:
            with of_the_caller():
                callback(self.mfa, record)
        changed = self.processes.totals(versions != [p._version for p in self.mfa.parameters()])[0]
        if self.mfa.processes.totals(changed)[0]:
            self.processes.broadcast_(*self.mfa.parameters())
            self._parameters_changed()
        self.losses, self.tokens = [], 0
        self.began = time.perf_counter()

    def _gain(self) -> float:
        """The gain of the objective over the start's, on the guard's rows, in nats per row."""
        if self.objective_of_start is None:
            self.guard.settle(self.mfa)
        likelihood, log_prior = self._guarded(), self._log_prior()
        if self.objective_of_start is None:
            self.objective_of_start = likelihood, log_prior
        first, prior = self.objective_of_start
        gain = likelihood - first + (log_prior - prior) / self._rows_behind()
        return -math.inf if math.isnan(gain) else gain

    def _guarded(self) -> float:
        """The likelihood of the guard's rows, in nats per row."""
        return self.guard.log_likelihood(self.mfa)

    @property
    def scan_rows(self) -> Scan | None:
        """What finds the active pairs of rows by their numbers at less than the cost of a scan; None where nothing
        does."""
        return None

    @property
    def look(self) -> Look | None:
        """`scan_rows` for rows that have no number."""
        return None

    def begin_below(self, objective: tuple[float, float] | None) -> None:
        """Compares states with the start of the run before this one, or with its end where that is less likely."""
        if objective is not None:
            self.objective_of_start = min(objective[0], self.guard.log_likelihood(self.mfa)), 0.0

    def _log_prior(self) -> float:
        """The log prior that the likelihood of all rows is weighed against, in nats."""
        return 0.0

    def _rows_behind(self) -> float:
        """Rows that the prior is weighed against, or what they weigh."""
        return max(1, len(self.rows)) * self.mean_weight

    @torch.no_grad()
    def _look_at_held_out(self) -> dict[str, Any]:
        """Measures held-out rows of all processes: their likelihood, regions that own some, active pairs per row."""
        parts = [self._scan_held_out(part) for part in torch.arange(len(self.held_out)).split(EVALUATION_ROWS)]
        owners = torch.cat([part.components[:, 0] for part in parts]).long()
        owned = torch.zeros(self.mfa.n_components, dtype=torch.float64, device=owners.device)
        owned[owners[owners >= 0]] = 1
        self.processes.sum_(owned)
        log_prob = torch.cat([part.log_prob for part in parts]).double()
        pairs = torch.cat([part.counts for part in parts]).double()
        active, rows = self.processes.totals(float(pairs.sum()), len(self.held_out))
        nll = nll_of(log_prob, self.processes, self.held_out_weights)
        return {"held_out_nll": nll, "live": int((owned > 0).sum()), "active": active / rows}

    def _scan_held_out(self, index: Tensor) -> ActivePairs:
        return self.mfa.active_pairs(self.held_out[index])

    def _parameters_changed(self) -> None:
        """A callback changed the mixture's parameters."""

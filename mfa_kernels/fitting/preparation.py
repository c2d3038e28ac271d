"""Steps around the training: places to write to, rows to take, a mixture to begin with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common import locks
from mfa_kernels.common.checks import (
    check_number,
    check_path,
    is_flag,
)
from mfa_kernels.common.files import StrPath, check_writable
from mfa_kernels.common.places import CHECKPOINT, CURVE, check_apart, check_place
from mfa_kernels.common.processes import Processes
from mfa_kernels.data.source import Source
from mfa_kernels.fitting.checkpoint import FILE, State, fingerprint
from mfa_kernels.fitting.guard import Look, Scan
from mfa_kernels.fitting.notices import warn
from mfa_kernels.fitting.online_em import online_rows
from mfa_kernels.fitting.row_weights import Weighed
from mfa_kernels.fitting.start_from_mixture import blank_mixture
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.ops.common.finite import finite_rows

HELD_OUT_ROWS = 20_000  # that are held out at most
LEAST_HELD_TEXTS = 4  # texts that are held out whole at least: fewer would say more of themselves than of all
NEARLY = 0.02  # share of the rows to hold out that may be missing where texts are held out whole
START_ROWS_PER_COMPONENT = 128
MANY_START_ROWS = 1 << 18  # beyond which FEW_PER_COMPONENT suffice: a sample is held in memory
FEW_PER_COMPONENT = 32
LEAST_START_ROWS = 100_000
KMEANS_ITERATIONS = 10
LEAST_ONLINE_STEPS = 100  # a pass, for "auto": with fewer, as many passes of EM take less time (bench/RESULTS.md)
LEAST_TRUNCATED = 128  # components, for "auto": of fewer, a scan of all takes about as long (bench/RESULTS.md)
LEAST_TRUNCATED_PASSES = 2  # of fewer regions than these, where the first finds the candidates by a scan of all:
LEAST_SEARCHED = 1024  # of more, a search does where it pays, before and after the passes too (measured from 2,048 on)
LIVE_ROWS_PER_COMPONENT = 64
CHUNK_ROWS = 4096  # rows that are assigned at once
FINGERPRINT_ROWS = 256
DEAD_SHARE = 0.1  # share of the components that own no row, above which there is a warning


@contextmanager
def holding(folder: Path | None, log: StrPath | None, processes: Processes) -> Iterator[None]:
    """Tries, on process 0, where the fit is to write, before work begins; keeps other writers out of its checkpoints.

    Raises, on every process:
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

        processes.agree(enter)
        yield


def checkpoint_folders(
    checkpoint: StrPath | None, seconds: float, resume: StrPath | bool
) -> tuple[Path | None, Path | None]:
    """The folder that checkpoints go to, and the one to resume from; None where there is none."""
    check_number(seconds, "checkpoint_seconds", 0)
    if not is_flag(resume) and not isinstance(resume, str | os.PathLike):
        raise TypeError(f"resume must be a folder or a bool, got {type(resume).__name__}")
    resume = bool(resume) if is_flag(resume) else check_path(resume, "resume")
    checkpoint = None if checkpoint is None else check_path(checkpoint, "checkpoint")
    if checkpoint is not None and Path(checkpoint).is_file():
        raise NotADirectoryError(f"checkpoint must name a folder, {checkpoint} is a file")
    is_there = checkpoint is not None and (Path(checkpoint) / FILE).exists()
    if resume is True:
        if checkpoint is None:
            raise ValueError("resume = True needs a checkpoint folder to go on from")
        return Path(checkpoint), Path(checkpoint) if is_there else None
    if resume is False:
        if is_there:
            raise FileExistsError(
                f"checkpoint: {checkpoint} holds the {FILE} of a fit: resume=True goes on with it; else name another"
            )
        return None if checkpoint is None else Path(checkpoint), None
    folder = Path(resume if checkpoint is None else checkpoint)
    if is_there and folder.resolve() != Path(resume).resolve():
        raise FileExistsError(f"checkpoint: {checkpoint} holds the {FILE} of another fit than resume: {resume}")
    return folder, Path(resume)


@torch.no_grad()
def restored_mixture(
    saved: State, noise: str, precision: str, device: torch.device, expected: tuple[int, int, int]
) -> MFA:
    """The mixture of a checkpoint, of `expected` components, features and rank."""
    tensors = {name.removeprefix("mfa."): t for name, t in saved.tensors.items() if name.startswith("mfa.")}
    found = tuple(tensors["loadings"].shape)
    if found != expected:
        raise ValueError(f"loadings have shape {found}, expected {expected}")
    if tensors["means"].dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means are {tensors['means'].dtype}, expected torch.float32 or torch.float64")
    mfa = blank_mixture(*expected, noise, precision, device, tensors["means"].dtype)
    mfa.noise_floor = saved.values["noise_floor"]
    mfa.load_state_dict(tensors)
    return mfa


@torch.no_grad()
def from_first_process(start: Callable[[], MFA], processes: Processes, *shape: Any) -> MFA:
    """The mixture that `start` makes on process 0, on every process; `shape` is what `blank_mixture` takes."""
    made: list[MFA] = []

    def make() -> float:
        made.append(start())
        return made[0].noise_floor

    floor = processes.agree(make)
    mfa = made[0] if made else blank_mixture(*shape)
    mfa.noise_floor = floor
    processes.broadcast_(*mfa.tensors().values())
    return mfa


def check_same(facts: dict[str, Any], processes: Processes) -> None:
    """Raises, on every process, where the processes were given different data or settings."""
    first, *others = processes.objects(facts)
    for index, other in enumerate(others, 1):
        different = [
            f"{name} = {other[name]!r}, process 0 {fact!r}" for name, fact in first.items() if other[name] != fact
        ]
        if different:
            raise ValueError(
                "the processes that fit together have different data or settings: "
                f"process {index} has {'; '.join(different)} (group=False fits alone)"
            )


@contextmanager
def timed(report: FitReport, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    report.seconds[stage] = time.perf_counter() - began


def split_rows(source: Source, held_out: float, generator: torch.Generator, report: FitReport) -> tuple[Tensor, Tensor]:
    """Row numbers to train on and to hold out, in random order; whole texts are held out where they are known.

    Rows of one text are alike: held out among those trained on, they promise more than other texts will keep.
    """
    rows = len(source)
    order = torch.randperm(rows, generator=generator)
    if not held_out:
        return order, order[:0]
    wanted = min(HELD_OUT_ROWS, max(1, round(held_out * rows)))
    report.held_out_by = "row"
    if source.texts is not None:
        texts = source.texts().unique(return_inverse=True)[1]
        held = _held_texts(texts.bincount(), wanted, generator)[texts]
        if held.any():
            report.held_out_by = "text"
            return order[~held[order]], order[held[order]]
    return order[wanted:], order[:wanted]


def _held_texts(sizes: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """A mask of the texts to hold out, of so many rows each: in random order as far as they fit; none, if few would."""
    held = torch.zeros(len(sizes), dtype=torch.bool)
    left, count = wanted, 0
    for text in torch.randperm(len(sizes), generator=generator).tolist():
        size = int(sizes[text])
        if size <= left:
            held[text], left, count = True, left - size, count + 1
            if left < NEARLY * wanted:
                break
    if count < LEAST_HELD_TEXTS or left > wanted / 2:
        held.zero_()
    return held


def start_rows(components: int) -> int:
    """The number of rows that K-means and the start read."""
    return max(LEAST_START_ROWS, sampled_rows(START_ROWS_PER_COMPONENT, components))


def sampled_rows(per_component: int, components: int) -> int:
    """So many rows for each of the components, or fewer where that is many."""
    return min(per_component * components, max(MANY_START_ROWS, FEW_PER_COMPONENT * components))


def chosen_method(rows: float, components: int, batch_size: int, passes: int | None = None) -> str:
    """The method of "auto" for data, other than a stream, of so many rows to train on.

    `passes` over rows whose E-steps can be truncated: on a CPU with the C++ kernels, by processes that share the rows;
    None where they cannot.
    """
    if rows / online_rows(components, batch_size) >= LEAST_ONLINE_STEPS:
        return "online"
    if passes is None or components < LEAST_TRUNCATED:
        return "em"
    return "truncated" if passes >= LEAST_TRUNCATED_PASSES or components >= LEAST_SEARCHED else "em"


def data_fingerprint(source: Source, streamed: bool = False) -> str:
    """A fingerprint of some rows, by which data is known again: of rows from all over, or of the first of a stream."""
    every = 1 if streamed else max(1, len(source) // FINGERPRINT_ROWS)
    return fingerprint(source.rows(torch.arange(0, len(source), every)[:FINGERPRINT_ROWS]))


def finite(
    source: Source, index: Tensor, device: torch.device, dtype: torch.dtype, report: FitReport | None = None
) -> Tensor:
    """The finite ones of some rows, on `device`; the others are counted where there is a report."""
    return weighed(source, index, device, dtype, report).rows


def weighed(
    source: Source, index: Tensor, device: torch.device, dtype: torch.dtype, report: FitReport | None = None
) -> Weighed:
    """`finite`, with the weights of the rows."""
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
def count_live(
    mfa: Mixture, held_out: Tensor, source: Source, index: Tensor, report: FitReport, processes: Processes,
    scan: Scan | None = None, look: Look | None = None,
) -> None:  # fmt: skip
    """Counts the components that own a held-out row or one at `index`, of any process; warns where many own none.

    `scan` and `look`, where they are given, find the active pairs of rows, the one by their numbers in the source.
    """
    owned = torch.zeros(mfa.n_components, dtype=torch.int32, device=mfa.means.device)
    rows = 0

    def assigned(part: Tensor) -> Tensor:
        x = source.rows(part).to(mfa.means.device)
        is_finite = finite_rows(x, mfa.means.dtype)
        x, part = x[is_finite], part[is_finite.to(part.device)]
        return mfa.assign(x) if scan is None else scan(x, part).components[:, 0].long()

    def assigned_held_out(x: Tensor) -> Tensor:
        return mfa.assign(x) if look is None else look(x).components[:, 0].long()

    size = CHUNK_ROWS if scan is None else max(CHUNK_ROWS, mfa.n_components)
    for owners in chain(map(assigned_held_out, held_out.split(size)), map(assigned, index.split(size))):
        owned[owners[owners >= 0]] = 1  # a row too far out for the dtype has none
        rows += len(owners)
    processes.sum_(owned)
    report.live_rows += int(processes.totals(rows)[0])
    report.live_components = int((owned > 0).sum())
    dead = mfa.n_components - report.live_components
    if dead > DEAD_SHARE * mfa.n_components and processes.first and mfa.processes.first:
        warn(
            f"fit: {dead} of {mfa.n_components} components are not the most responsible for any of "
            f"{report.live_rows} rows; fewer components, more rows or another start may serve better"
        )

"""Checkpoints of a fit: their files, format and version, from which a run resumes bit for bit.

A checkpoint is a folder:

    checkpoint.json           settings, report, where the run is, and the name of the file with its tensors
    state-00007.safetensors   parameters, the best ones, the state of the optimiser or of EM

The tensors are complete on disk before the rename of checkpoint.json makes them count, and the older ones are removed
after it: a crash at any moment leaves one complete checkpoint, or none when there was none.

checkpoint.json has a checksum of its own content and those of the tensors, which are compared when it is read: a fit
resumes to its own bits, or not at all. Checkpoints of earlier versions have none, and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common import checksum
from mfa_kernels.common.files import StrPath, atomic_save_safetensors, atomic_write_text, sweep
from mfa_kernels.common.locks import alone
from mfa_kernels.common.processes import Processes
from mfa_kernels.common.reading import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    SHARE,
    TEXT,
    check_fields,
    check_file,
    choice,
    every,
    member,
    naming,
    optional,
    read_json,
    read_safetensors,
    shown,
)
from mfa_kernels.mixture.fit_report import FitReport, check_report

FORMAT = "mfa_kernels.fit"
VERSION = 3
FILE = "checkpoint.json"
DONE = "done"  # the stage of a fit that came to its end
_STATE = r"state-(\d+)(?:-\d+-of-\d+)?\.safetensors"
# States, and what a process of an earlier version that was killed while it wrote has left; the last is the name that
# safetensors writes under.
_OURS = re.compile(rf"{_STATE}|\.({_STATE}|checkpoint\.json)\.\w+\.tmp|\.tmp\w+")

_FIELDS = {
    "stage": choice("sgd", "em", "truncated", "online", "polish", DONE), "settings": OBJECT, "report": OBJECT,
    "values": OBJECT,
}  # fmt: skip
FILE_FIELDS = {"tensors": TEXT, "bytes": COUNT}
# What a state may hold besides tensors; of EM alone, from `prior` on. A likelihood on the way may be NaN.
_SCREENING = {"cost": NUMBER, "since": NUMBER, "decided": FLAG, "used": FLAG, "rows": NUMBER, "work": NUMBER}
_VALUES = {
    "noise_floor": SHARE, "first_step": COUNT, "first_epoch": COUNT, "seconds": NUMBER,
    "evaluations_since_best": COUNT, "prior": optional(every(NUMBER, 2)), "step": COUNT, "batch": COUNT,
    "screening": optional(OBJECT), "revivals": COUNT, "calm": FLAG, "seen": COUNT, "known": NUMBER, "epoch": COUNT,
    "typical": optional(NUMBER), "bad_steps": COUNT, "moved": COUNT, "start": optional(every(NUMBER, 2)),
}  # fmt: skip


def clear(folder: StrPath) -> None:
    """Removes the checkpoint in a folder, where there is one, for a fit that begins anew.

    Raises:
        TimeoutError: another fit writes to the folder.
    """
    folder = Path(folder)
    if not (folder / FILE).exists():
        return
    with alone(folder):
        (folder / FILE).unlink(missing_ok=True)  # first: what it does not name is no checkpoint any more
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and not path.is_dir():
                path.unlink()


class State(NamedTuple):
    """One checkpoint: what stage it was written in, tensors by name, whatever JSON can hold, and the report so far."""

    stage: str
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    report: FitReport


class Checkpoints:
    """Writes the checkpoints of one fit, and reads them.

    Args:
        folder: made if it is missing.
        seconds: at least, between two of them.
        settings: of the fit, what JSON can hold, or numbers of NumPy; a fit with others cannot resume from here.
    """

    format = FORMAT

    def __init__(self, folder: StrPath, seconds: float, settings: Mapping[str, Any]) -> None:
        self.folder, self.seconds = Path(folder).absolute(), seconds  # wherever the process goes meanwhile
        self.settings = plain(settings)
        self.written = time.monotonic()
        self.source: Path | None = None  # the file that was loaded
        self.published: str | None = None  # what this one has written

    def due(self) -> bool:
        """True where it is time for one."""
        return time.monotonic() - self.written >= self.seconds

    def save(self, state: State) -> None:
        """Writes a checkpoint, and removes the one before."""
        name = f"state-{self._number():05d}.safetensors"
        self._publish(state, self._write(state, name), {name})

    def _write(self, state: State, name: str) -> dict[str, Any]:
        """Writes the tensors; what checkpoint.json has to say of them."""
        tensors = {key: tensor.detach().cpu() for key, tensor in state.tensors.items()}
        atomic_save_safetensors(tensors, self.folder / name)
        size = (self.folder / name).stat().st_size
        return {"tensors": name, "bytes": size, "sha256": checksum.of_tensors(tensors)}

    def _number(self) -> int:
        """The number of the next state."""
        found = (re.fullmatch(_STATE, path.name) for path in self.folder.glob("state-*"))
        return max((int(match[1]) for match in found if match), default=-1) + 1

    def _publish(self, state: State, tensors: Mapping[str, Any], names: set[str]) -> None:
        """Makes the files `names` count, which hold the tensors, and removes those before."""
        content = {
            "format": self.format, "version": VERSION, **tensors, "stage": state.stage, "settings": self.settings,
            "report": asdict(state.report), "values": state.values,
        }  # fmt: skip
        # Not `atomic_write_json`: a likelihood on the way may be NaN, and has to come back as it was.
        path, text = self.folder / FILE, json.dumps(checksum.sealed(content), indent=2) + "\n"
        if self.published is not None and path.exists() and path.read_text(encoding="utf-8") != self.published:
            raise FileExistsError(f"{path} is of another fit now, though the folder was locked: it stays as it is")
        atomic_write_text(path, text)
        self.published = text
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in names and not path.is_dir():
                path.unlink()
        sweep(self.folder, _STATE)
        self.note_time()

    def note_time(self) -> None:
        """Says that one was written just now, or could not be."""
        self.written = time.monotonic()

    def load(self, folder: StrPath) -> State:
        """The checkpoint in a folder; its tensors are views of the file, to be copied.

        Raises:
            FileNotFoundError: there is none, or its tensors are missing.
            ValueError: naming the file that is not ours, incomplete or corrupt; or the settings that differ.
        """
        content = self._content(folder)
        check_fields(content, FILE_FIELDS, f"resume: {self.source}")
        path = member(Path(folder), content["tensors"], Path(folder) / FILE)
        check_size(path, content["bytes"])
        tensors = read(path)
        if "sha256" in content:
            checksum.compare(checksum.of_tensors(tensors), content["sha256"], path, FILE)
        return State(content["stage"], tensors, content["values"], FitReport(**content["report"]))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """For taking over what was loaded: what does not fit together is an error that names the file."""
        if self.source is None:
            yield
            return
        with naming(self.source, "the checkpoint of this fit"):
            yield

    def _content(self, folder: StrPath) -> dict[str, Any]:
        """The content of checkpoint.json, of a fit with the same settings."""
        path = self.source = Path(folder) / FILE
        if not path.exists():
            raise FileNotFoundError(f"resume: {folder} holds no {FILE}")
        content = read_json(path, finite=False)
        if not isinstance(content, dict) or content.get("format") != self.format:
            raise ValueError(f"resume: {path} is not the checkpoint of a fit (its format is not {self.format!r})")
        if content.get("version") != VERSION:
            raise ValueError(
                f"resume: {path} has version {shown(content.get('version'))}, this library reads version {VERSION}"
            )
        checksum.check_json(content, path)
        check_fields(content, _FIELDS, f"resume: {path}")
        check_fields(content["values"], _VALUES, f"resume: {path}: values", needed=False)
        check_fields(content["values"].get("screening") or {}, _SCREENING, f"resume: {path}: screening", needed=False)
        unknown = content["report"].keys() - {one.name for one in fields(FitReport)}
        if unknown:
            raise ValueError(f"resume: {path}: the report of a fit has no {shown(sorted(unknown))}")
        check_report(content["report"], f"resume: {path}: report")
        before = content["settings"]
        different = [
            f"{name} = {self.settings.get(name)!r}, there {before.get(name)!r}"
            for name in {**before, **self.settings}
            if self.settings.get(name) != before.get(name)
        ]
        if different:
            raise ValueError(f"resume: {path} is of a fit with other settings: here {'; '.join(different)}")
        return content


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: numbers of NumPy among them become Python's, tuples lists."""
    return dict(json.loads(json.dumps(dict(settings), default=lambda number: number.item())))


def check_size(path: Path, size: int) -> None:
    """Raises where a file of tensors is missing, or has not as many bytes as were written."""
    check_file(path, f"resume: {path} is missing")
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"resume: {path} has {found} bytes, expected {size}")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as views of it."""
    return read_safetensors(path, " is not a safetensors file")[0]


def load_on_all(checkpoints: Checkpoints, folder: StrPath, processes: Processes) -> State:
    """`Checkpoints.load` on every process, of a folder that process 0 alone has to see; raises on every process."""
    if processes.count == 1:
        return checkpoints.load(folder)
    own: dict[str, Tensor] = {}

    def shapes() -> State:
        state = checkpoints.load(folder)
        own.update(state.tensors)
        return state._replace(tensors={name: t.to("meta") for name, t in own.items()})

    state = processes.agree(shapes)
    checkpoints.source = Path(folder) / FILE
    tensors = {}
    for name, like in state.tensors.items():
        there = own[name] if processes.first else torch.empty_like(like, device="cpu")
        tensor = there.to(processes.device, copy=True)
        if tensor.numel():
            processes.broadcast_(tensor)
        tensors[name] = tensor.cpu()
    return state._replace(tensors=tensors)


def fingerprint(tensor: Tensor) -> str:
    """A hash of the bits of a tensor of any dtype and device, and of its shape: 16 hexadecimal digits."""
    bits = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + bits).hexdigest()[:16]

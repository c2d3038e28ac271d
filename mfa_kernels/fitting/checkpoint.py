"""Checkpoints of a fit: what a run needs to go on bit for bit.

A checkpoint is a folder:

    checkpoint.json           settings, report, where the run is, and the name of the file with its tensors
    state-00007.safetensors   parameters, the best ones, the state of the optimiser or of EM

The tensors are complete on disk before the rename of checkpoint.json makes them count, and the older ones are removed
after it: a crash at any moment leaves one complete checkpoint, or none when there was none.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.files import StrPath, atomic_save_safetensors, atomic_write_text
from mfa_kernels.fitting.report import FitReport
from mfa_kernels.ranks import Ranks

FORMAT = "mfa_kernels.fit"
VERSION = 2
FILE = "checkpoint.json"
DONE = "done"  # the stage of a fit that came to its end
_STATE = r"state-(\d+)(?:-\d+-of-\d+)?\.safetensors"
# States, and what a process that was killed while it wrote leaves; the last is the name that safetensors writes under.
_OURS = re.compile(rf"{_STATE}|\.({_STATE}|checkpoint\.json)\.\w+\.tmp|\.tmp\w+")


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
        settings: of the fit, what JSON can hold, or numbers of NumPy; a fit with others cannot go on from here.
    """

    format = FORMAT

    def __init__(self, folder: StrPath, seconds: float, settings: Mapping[str, Any]) -> None:
        self.folder, self.seconds = Path(folder), seconds
        self.settings = json.loads(json.dumps(dict(settings), default=lambda number: number.item()))
        self.written = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for one."""
        return time.monotonic() - self.written >= self.seconds

    def save(self, state: State) -> None:
        """Writes a checkpoint, and removes the one before."""
        name = f"state-{self._number():05d}.safetensors"
        atomic_save_safetensors(state.tensors, self.folder / name)
        self._publish(state, {"tensors": name, "bytes": (self.folder / name).stat().st_size}, {name})

    def _number(self) -> int:
        """Of the next state."""
        found = (re.fullmatch(_STATE, path.name) for path in self.folder.glob("state-*"))
        return max((int(match[1]) for match in found if match), default=-1) + 1

    def _publish(self, state: State, tensors: Mapping[str, Any], names: set[str]) -> None:
        """Makes the files `names` count, which hold the tensors, and removes those before."""
        content = {
            "format": self.format,
            "version": VERSION,
            **tensors,
            "stage": state.stage,
            "settings": self.settings,
            "report": asdict(state.report),
            "values": state.values,
        }
        # Not `atomic_write_json`: a likelihood on the way may be NaN, and has to come back as it was.
        atomic_write_text(self.folder / FILE, json.dumps(content, indent=2) + "\n")
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in names:
                path.unlink()
        self.written = time.monotonic()

    def load(self, folder: StrPath) -> State:
        """The checkpoint in a folder; its tensors are views of the file, to be copied.

        Raises:
            FileNotFoundError: there is none, or its tensors are missing.
            ValueError: a file is not ours or incomplete, or the settings differ, each of which is named.
        """
        content = self._content(folder)
        path = Path(folder) / content["tensors"]
        check_size(path, content["bytes"])
        return State(content["stage"], read(path), content["values"], FitReport(**content["report"]))

    def _content(self, folder: StrPath) -> dict[str, Any]:
        """What checkpoint.json holds, of a fit with the same settings."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"resume: {folder} holds no {FILE}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"resume: {path} is not JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != self.format:
            raise ValueError(f"resume: {path} is not the checkpoint of a fit (its format is not {self.format!r})")
        if content.get("version") != VERSION:
            raise ValueError(
                f"resume: {path} has version {content.get('version')!r}, this library reads version {VERSION}"
            )
        before = content["settings"]
        different = [
            f"{name} = {self.settings.get(name)!r}, there {before.get(name)!r}"
            for name in {**before, **self.settings}
            if self.settings.get(name) != before.get(name)
        ]
        if different:
            raise ValueError(f"resume: {folder} is of a fit with other settings: here {'; '.join(different)}")
        return content


def check_size(path: Path, size: int) -> None:
    """Raises where a file of tensors is missing, or has not as many bytes as were written."""
    if not path.is_file():
        raise FileNotFoundError(f"resume: {path} is missing")
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"resume: {path} has {found} bytes, expected {size}")


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as views of it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"resume: {path} is not a safetensors file: {error}") from error


def load_on_all(checkpoints: Checkpoints, folder: StrPath, ranks: Ranks) -> State:
    """`Checkpoints.load` on every rank, of a folder that rank 0 alone has to see; raises on every rank."""
    if ranks.size == 1:
        return checkpoints.load(folder)
    held: dict[str, Tensor] = {}

    def shapes() -> State:
        state = checkpoints.load(folder)
        held.update(state.tensors)
        return state._replace(tensors={name: t.to("meta") for name, t in held.items()})

    state = ranks.agree(shapes)
    tensors = {}
    for name, like in state.tensors.items():
        there = held[name] if ranks.first else torch.empty_like(like, device="cpu")
        tensor = there.to(ranks.device, copy=True)
        if tensor.numel():
            ranks.broadcast_(tensor)
        tensors[name] = tensor.cpu()
    return state._replace(tensors=tensors)


def fingerprint(tensor: Tensor) -> str:
    """Of the bits of a tensor of any dtype and device, and of its shape."""
    bits = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + bits).hexdigest()[:16]

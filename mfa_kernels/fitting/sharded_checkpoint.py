"""Checkpoints of spread components: each process writes its own, and any number resumes.

A checkpoint is a folder:

    checkpoint.json                 as of any fit, with what there is of every process
    state-00007-2-of-4.safetensors  what process 2 of 4 holds
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common import checksum
from mfa_kernels.common.files import StrPath
from mfa_kernels.common.processes import Processes
from mfa_kernels.common.reading import COUNT, OBJECT, check_fields, every, member, opened, optional
from mfa_kernels.fitting.checkpoint import FILE, FILE_FIELDS, Checkpoints, State, check_size, read
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.sharded import is_split, part_of

# How a tensor is redistributed when the number of processes changes: split by component; summed, as each process has a
# part of the sum; the same everywhere; or dropped.
_SPLIT, _SUMMED, _COMMON, _OWN = range(4)
_PART = {**FILE_FIELDS, "components": every(COUNT, 2), "screening": optional(OBJECT)}
_PARAMETERS = ("means", "loadings", "log_noise", "weight_logits")  # as a module lists them


def _kind(name: str, noise: str) -> int:
    group, _, rest = name.partition(".")
    if group in ("best", "plain"):
        group, rest = "mfa", _PARAMETERS[int(rest)]
    if group == "mfa":
        return _SPLIT if is_split(rest, noise) else _COMMON
    if group == "statistics" and rest != "log_likelihood":
        return _SUMMED if rest == "squares" and noise == "shared" else _SPLIT
    if name in ("counted", "about"):
        return _SPLIT
    return _OWN if group == "screening" else _COMMON


class ShardedCheckpoints(Checkpoints):
    """Writes the checkpoints of one fit, and reads them; all processes call together, and all see the folder.

    Args:
        folder, seconds, settings: as of `Checkpoints`.
        components: K, of all processes.
        noise: "shared" or "per_component".
        processes: that hold them.
    """

    format = "mfa_kernels.fit_sharded"

    def __init__(
        self, folder: StrPath, seconds: float, settings: Mapping[str, Any], components: int, noise: str,
        processes: Processes,
    ) -> None:  # fmt: skip
        super().__init__(folder, seconds, settings)
        self.components, self.noise, self.processes = components, noise, processes
        self.span = part_of(components, processes)

    def due(self) -> bool:
        """True where it is time for one, by the clock of process 0."""
        return self.processes.totals(self.processes.first and super().due())[0] > 0

    def save(self, state: State) -> None:
        """Writes a checkpoint, and removes the one before; values are those of process 0, but for those of screening.

        Raises, on every process:
            OSError: one of them could not write.
        """
        number = self.processes.agree(self._number)
        name = f"state-{number:05d}-{self.processes.index}-of-{self.processes.count}.safetensors"
        failure: OSError | None = None
        own: dict[str, Any] = {}
        try:
            own = {**self._write(state, name), "components": self.span, "screening": state.values.get("screening")}
        except OSError as error:  # perhaps of one process alone: all of them have to know
            failure = error
        told = [text for text in self.processes.objects(failure and str(failure)) if text]
        every = self.processes.objects(own)  # when all files are there
        if told:
            raise failure or OSError(told[0])
        names = {one["tensors"] for one in every}

        def publish() -> str | None:
            try:
                self._publish(state, {"ranks": every}, names)
            except OSError as error:
                return str(error)
            return None

        unpublished = self.processes.agree(publish)
        if unpublished is not None:
            raise OSError(unpublished)

    def load(self, folder: StrPath) -> State:
        """The checkpoint that this process resumes from; raises what that of one process does."""

        where = Path(folder) / FILE

        def look() -> dict[str, Any]:
            content = self._content(folder)
            check_fields(content, {"ranks": every(OBJECT)}, f"resume: {where}")
            if not content["ranks"]:
                raise ValueError(f"resume: {where}: ranks must name at least one file, got none")
            after = 0
            for i, one in enumerate(content["ranks"]):
                check_fields(one, _PART, f"resume: {where}: ranks[{i}]")
                check_size(member(Path(folder), one["tensors"], where), one["bytes"])
                first, stop = one["components"]
                if first != after or stop <= first:
                    raise ValueError(
                        f"resume: {where}: ranks[{i}] has components [{first}, {stop}), expected [{after},"
                    )
                after = stop
            if after != self.components:
                raise ValueError(f"resume: {where} is of {after} components, expected {self.components}")
            return content

        content = self.processes.agree(look)
        self.source = where
        files, values = content["ranks"], content["values"]
        own = files[self.processes.index] if len(files) == self.processes.count else None
        values["screening"] = own and own["screening"]
        self._verify(Path(folder), files)
        if own:
            tensors = read(Path(folder) / own["tensors"])
        else:
            tensors = self._regrouped([(one["components"], Path(folder) / one["tensors"]) for one in files])
        return State(content["stage"], tensors, values, FitReport(**content["report"]))

    def _verify(self, folder: Path, files: list[dict[str, Any]]) -> None:
        """Compares the checksum of every file, each on one of the processes; raises on all."""
        failure: ValueError | OSError | None = None
        try:
            for one in files[self.processes.index :: self.processes.count]:
                tensors = read(folder / one["tensors"])
                if "sha256" in one:
                    checksum.compare(checksum.of_tensors(tensors), one["sha256"], folder / one["tensors"], FILE)
        except (ValueError, OSError) as error:
            failure = error
        told = [text for text in self.processes.objects(failure and str(failure)) if text]
        if failure is not None:
            raise failure
        if told:
            raise ValueError(f"resume: {told[0]}")

    def _regrouped(self, every: list[tuple[list[int], Path]]) -> dict[str, Tensor]:
        """This process's part of tensors that another number of processes wrote."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for i, ((first, after), path) in enumerate(every):
            start, stop = (min(max(k, first), after) - first for k in self.span)
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    kind = _kind(name, self.noise)
                    if kind == _SPLIT and start < stop:
                        found[name].append(file.get_slice(name)[start:stop])
                    elif (not i and kind in (_SUMMED, _COMMON)) or (self.processes.first and kind == _SUMMED):
                        found[name].append(file.get_tensor(name))
        joined = {}
        for name, tensors in found.items():
            if _kind(name, self.noise) == _SUMMED:
                joined[name] = torch.stack(tensors).sum(0) if self.processes.first else torch.zeros_like(tensors[0])
            else:
                joined[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return joined

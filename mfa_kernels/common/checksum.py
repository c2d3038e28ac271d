"""SHA-256 checksums of files, JSON and tensors, so that a flipped bit on disk is refused.

The checksum of a file of tensors is that of its content, not of its bytes: the header of safetensors lists its strings
in a random order, and tensors are best summed up in memory, before anything can go wrong on their way to the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

KEY = "checksum"  # the key of the checksum in JSON of ours, and in the header of a file of tensors
PIECE = 1 << 24  # bytes of a tensor that one thread sums up at once
_BUFFER = 1 << 20  # stays in a second-level cache between the read and the sum

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def of_file(path: Path) -> str:
    """Returns the checksum of the bytes of a file."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def of_json(content: Mapping[str, Any]) -> str:
    """Returns the checksum of a JSON value without `KEY`, for any order of keys and any white space."""
    kept = {key: value for key, value in content.items() if key != KEY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `content`, which JSON can hold, with its checksum."""
    return {**content, KEY: of_json(json.loads(json.dumps(content)))}  # as it will be read: tuples become lists


def check_json(content: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError where content that was read from `path` has a wrong checksum; one without passes."""
    if KEY in content:
        compare(of_json(content), content[KEY], path, f"its {KEY!r}", " (it is read as it is without that key)")


def compare(found: str, expected: Any, path: Path, where: str, hint: str = "") -> None:
    """Raises ValueError where the checksum found for `path` is not the one in `where`; the error ends with `hint`."""
    if found != expected:
        raise ValueError(
            f"{path} is corrupt, or was changed by hand: its content has the {KEY} {found[:16]}..., {where} says "
            f"{str(expected)[:16]}...{hint}"
        )


class Fact(NamedTuple):
    """The dtype, the shape and the number of pieces of a tensor, which its bytes do not tell."""

    dtype: str
    shape: list[int]
    pieces: int


def of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Returns the checksum of named tensors on the CPU and of their strings, without the string under `KEY`."""
    return combined(facts(tensors), threaded(_sha256, pieces(tensors)), metadata)


def facts(tensors: Mapping[str, Tensor]) -> dict[str, Fact]:
    """Returns the facts about tensors that `combined` takes."""
    return {name: fact(t.dtype, t.shape) for name, t in tensors.items()}


def fact(dtype: torch.dtype, shape: Sequence[int]) -> Fact:
    """Returns the fact about a tensor that `combined` takes."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return Fact(str(dtype).removeprefix("torch."), list(shape), -(-size // PIECE))


def pieces(tensors: Mapping[str, Tensor]) -> list[Any]:
    """Returns the bytes of tensors, by name, in pieces of `PIECE` bytes; views, where a tensor is contiguous."""
    parts: list[Any] = []
    for name in sorted(tensors):
        flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts += [flat[start : start + PIECE] for start in range(0, len(flat), PIECE)]
    return parts


def combined(of: Mapping[str, Fact], digests: Sequence[bytes], metadata: Mapping[str, str] | None = None) -> str:
    """Returns the checksum of tensors from the digests of their `pieces`."""
    content, first = [], 0
    for name in sorted(of):
        dtype, shape, count = of[name]
        digest = hashlib.sha256(b"".join(digests[first : first + count])).hexdigest()
        content.append([name, dtype, shape, digest])
        first += count
    strings = {key: value for key, value in (metadata or {}).items() if key != KEY}
    return hashlib.sha256(json.dumps([strings, content], sort_keys=True).encode()).hexdigest()


class Pieces:
    """Digests of the pieces of a tensor whose bytes arrive bit by bit."""

    def __init__(self) -> None:
        self._done: list[bytes] = []
        self._digest, self._filled = hashlib.sha256(), 0

    def add(self, data: bytes) -> None:
        """Takes the next bytes."""
        view = memoryview(data)
        while view:
            part, view = view[: PIECE - self._filled], view[PIECE - self._filled :]
            self._digest.update(part)
            self._filled += len(part)
            if self._filled == PIECE:
                self._done.append(self._digest.digest())
                self._digest, self._filled = hashlib.sha256(), 0

    def digests(self) -> list[bytes]:
        """Returns the digests of all pieces, also of a shorter last one."""
        return [*self._done, self._digest.digest()] if self._filled else self._done


def digests(parts: Iterable[Any]) -> list[bytes]:
    """Returns the digest of each piece."""
    return threaded(_sha256, list(parts))


def threaded(work: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
    """Returns `work` of every item, by as many threads as torch may use; hashlib releases the interpreter's lock."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _sha256(data: Any) -> bytes:
    return hashlib.sha256(data).digest()

"""Files that are either whole or absent: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

StrPath = str | os.PathLike[str]


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends, and vanishes when the block raises.

    The folder of `path` is made if it is missing. The data reaches the disk before the name does, so that a power cut
    does not leave a complete name on an incomplete file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the umask allows; safetensors makes files that only their owner can read
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: StrPath, data: bytes) -> None:
    """Writes `data` to `path`, replacing what is there."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: StrPath, text: str) -> None:
    """Writes `text` to `path` in UTF-8, line ends as they are, replacing what is there."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: StrPath, value: Any) -> None:
    """Writes `value` to `path` as indented JSON; raises ValueError for NaN and infinity, which JSON does not have."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def atomic_save_safetensors(
    tensors: Mapping[str, Tensor], path: StrPath, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named tensors (any device, any strides) to `path` in the safetensors format.

    Args:
        tensors: name -> tensor. Tensors that share memory are written as separate copies.
        path: the file, replaced if it exists.
        metadata: strings for the file's header.
    """
    from safetensors.torch import save_file

    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        if storage in storages:
            value = value.clone()
        storages.add(storage)
        separate[name] = value
    with atomic_path(path) as temporary:
        save_file(separate, temporary, metadata=None if metadata is None else dict(metadata))

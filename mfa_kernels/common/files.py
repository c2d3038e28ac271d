"""Files that are either whole or absent: written in a temporary folder, then renamed into place.

The temporary files of a process that is killed while it writes are removed by the next writer of a file of that name.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # without locks on this system, age alone tells which files were abandoned
    fcntl = None  # type: ignore[assignment]

StrPath = str | os.PathLike[str]

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp", re.DOTALL)
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
_ABANDONED = 3600.0  # seconds without a change, where no lock can tell


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """Yields a temporary path to write to, which becomes `path` when the block ends, and is removed if it raises.

    The folder of `path` is made if it is missing. The data reaches the disk before the name does, so that a power cut
    does not leave a complete name on an incomplete file. Files that killed writers of `path` have left are removed
    afterwards.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock is on a folder, because safetensors replaces a file by one that it has written under another name.
    with _named(path), temporary_folder(path) as folder:
        temporary = folder / f".{path.name}"
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # as the umask allows: safetensors makes files that only their owner can read
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sweep(path.parent, re.escape(path.name))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Makes errors of writing name `path`: the system names the temporary file, or none if a disk is full."""
    try:
        yield
    except OSError as error:
        own = f".{path.name}." in str(error.filename or "")
        if own or (error.filename is None and error.errno in _NO_ROOM):
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def check_writable(path: StrPath, name: str) -> None:
    """Raises where a file could not be written to `path`, before the work whose result it is to hold.

    Args:
        path: the path of a file, present or missing; the file and its folder are left as they are.
        name: the name of the argument, for messages.

    Raises:
        OSError: of the kind that writing met, naming the argument and the path.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{name}: {path} cannot be written (it is a folder)")
    try:
        missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path) as temporary:
            (temporary / path.name).write_bytes(b"\0")
        with suppress(OSError):  # another process may have begun to use them
            for folder in missing:
                folder.rmdir()
    except OSError as error:
        raise type(error)(error.errno, f"{name}: {path} cannot be written ({error.strerror or error})") from error


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yields a new locked folder next to `path`, removed after the block; `sweep` removes those of dead writers."""
    folder, lock = path, None
    try:
        while lock is None:
            folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
            folder.mkdir()
            if fcntl is None:
                break
            try:
                lock = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:  # swept away between its making and its lock
                continue
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():  # or while it waited for it
                closed, lock = lock, None
                os.close(closed)
        yield folder
    finally:
        if folder is not path:
            with suppress(OSError):
                _remove(folder)
        if lock is not None:
            os.close(lock)


def sweep(folder: StrPath, names: str) -> None:
    """Removes the temporary files that killed writers have left in a folder, as far as it can.

    It removes only files with a temporary name of ours that no writing process holds.

    Args:
        folder: the folder of the files.
        names: a regular expression of the names of the files that were being written.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            while found := _TEMPORARY.fullmatch(name):  # twice over where an earlier version wrote one through another
                name = found["name"]
            if name != entry.name and re.fullmatch(names, name):
                _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(path: Path) -> None:
    with suppress(OSError):
        if path.is_symlink():
            return
        if not path.is_dir():  # of an earlier version, which had no locks
            if _is_old(path):
                path.unlink()
            return
        with _lock_of_the_dead(path) as dead:
            if dead or (dead is None and all(map(_is_old, (path, *path.rglob("*"))))):
                _remove(path)


def _remove(folder: Path) -> None:
    """Removes a temporary folder and all that is in it.

    `shutil.rmtree` would close a descriptor twice when Ctrl-C comes in between, and raise OSError then.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        else:
            path.unlink()
    folder.rmdir()


@contextmanager
def _lock_of_the_dead(folder: Path) -> Iterator[bool | None]:
    """Yields True if no process holds a temporary folder, and holds it meanwhile; None where there are no locks."""
    if fcntl is None:
        yield None
        return
    dead: bool | None = True
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            dead = False
        except OSError:  # some network file systems
            dead = None
        yield dead
    finally:
        os.close(lock)


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _ABANDONED


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
    from safetensors.torch import save_file  # which imports torch

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
        try:
            save_file(separate, temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:  # raised for a full disk, among others
            raise OSError(f"{path}: {error}") from error

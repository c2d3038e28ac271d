"""Files that are either whole or absent: written in a temporary folder beside their place, then renamed.

What a process leaves that is killed while it writes is removed by the next one that writes a file of that name.
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

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # not on this system: age alone tells what was abandoned
    fcntl = None  # type: ignore[assignment]

StrPath = str | os.PathLike[str]

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp", re.DOTALL)
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
_ABANDONED = 3600.0  # seconds without a change, where no lock can tell


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends, and vanishes when the block raises.

    The folder of `path` is made if it is missing. The data reaches the disk before the name does, so that a power cut
    does not leave a complete name on an incomplete file. What killed writers of `path` have left is removed afterwards.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, whose lock stays whatever a library does to the file: safetensors writes under a name of its own.
    with _named(path), temporary_folder(path) as folder:
        temporary = folder / f".{path.name}"
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the umask allows; safetensors makes files that only their owner can read
        yield temporary
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sweep(path.parent, re.escape(path.name))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing name the file that is meant: the system names a temporary one, or none where a disk is full."""
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
        path: of a file, which is left as it is, as is its folder: whether they are missing or not.
        name: of the argument, for messages.

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
        with suppress(OSError):  # somebody else may have begun to use them
            for folder in missing:
                folder.rmdir()
    except OSError as error:
        raise type(error)(error.errno, f"{name}: {path} cannot be written ({error.strerror or error})") from error


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, gone with the block; others can tell it from one whose writer has died, and sweep."""
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
    """Removes what writers that were killed have left for files of a folder; what cannot be removed stays.

    Only what has a temporary name of ours goes, and only if no process that writes holds it.

    Args:
        folder: of the files.
        names: a regular expression of their names.
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

    Not `shutil.rmtree`, which closes a descriptor twice when Ctrl-C comes in between, and raises OSError then.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        else:
            path.unlink()
    folder.rmdir()


@contextmanager
def _lock_of_the_dead(folder: Path) -> Iterator[bool | None]:
    """Whether nobody holds a temporary folder, which is held meanwhile; None where there are no locks."""
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
    from safetensors import SafetensorError
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
        try:
            save_file(separate, temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:  # of a disk that is full, among others
            raise OSError(f"{path}: {error}") from error

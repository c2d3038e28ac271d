"""Locks on folders: one writer at a time; readers are never locked out."""

from __future__ import annotations

import errno
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from mfa_kernels.common.files import StrPath

LOCK = ".lock"
TURN = 1800.0  # seconds that `in_turn` waits for
SILENT = 5.0  # seconds of waiting that need no word
PATIENCE = 2.0  # seconds: a writer that ends has released the lock by then, one that works holds it for longer

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def hold(folder: StrPath, patience: float | None = None) -> BaseFileLock:
    """Locks a folder for one writer, until `release()` or the end of the object.

    The lock keeps out other processes, and other writers of this one. The kernel takes it back from a process that
    dies, and the file that stays does not lock anything. On a file system without locks, a warning says so.

    Args:
        folder: made if it is missing.
        patience: seconds to wait for another writer; None: `PATIENCE`.

    Raises:
        TimeoutError: naming the folder that another writer holds.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, thread_local=False)  # another thread may close a writer than the one that opened it
    try:
        lock.acquire(timeout=PATIENCE if patience is None else patience)
    except Timeout:
        raise TimeoutError(
            f"{folder}: another process, or a writer in this one that is not closed, is writing to this folder: give "
            "another folder, or wait for its end"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
            raise
        warnings.warn(f"{folder}: its file system has no locks, which would keep other writers out", stacklevel=2)
    return lock


@contextmanager
def alone(folder: StrPath) -> Iterator[None]:
    """Holds a folder, as `hold` does, until the block ends."""
    lock = hold(folder)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def in_turn(folder: StrPath, doing: str) -> Iterator[None]:
    """Holds a folder as `alone` does, and waits for another process that does the same long work; says so meanwhile.

    Args:
        folder: made if it is missing.
        doing: the work, for messages, as in "building the C++ kernels".

    Raises:
        TimeoutError: another process has held it for `TURN` seconds.
    """
    try:
        lock = hold(folder, SILENT)
    except TimeoutError:
        print(f"mfa_kernels: another process is {doing}, waiting for it ({folder})...", file=sys.stderr)
        try:
            lock = hold(folder, TURN)
        except TimeoutError:
            raise TimeoutError(f"another process has been {doing} in {folder} for {TURN:.0f} s: end it") from None
    try:
        yield
    finally:
        lock.release()

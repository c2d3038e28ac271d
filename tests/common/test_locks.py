"""One writer of a folder at a time, and a dead one is none."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mfa_kernels.common import locks

HOLD = (
    "import signal, sys, time\nfrom mfa_kernels.common.locks import hold\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # who runs tests in the background ignores it
    "lock = hold(sys.argv[1])\nprint('held', flush=True)\ntime.sleep(60)\n"
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)


def refused(folder: Path) -> bool:
    try:
        locks.hold(folder).release()
    except TimeoutError as error:
        return str(error).startswith(f"{folder}: another process")
    return False


def test_a_folder_has_one_holder(tmp_path: Path) -> None:
    lock = locks.hold(tmp_path / "new" / "folder")
    assert refused(tmp_path / "new" / "folder")
    assert not refused(tmp_path / "new")
    lock.release()
    with locks.alone(tmp_path):
        assert refused(tmp_path)
    assert not refused(tmp_path)
    lock = locks.hold(tmp_path)
    del lock
    assert not refused(tmp_path), "an object that is gone holds nothing"


def test_threads_shut_each_other_out_and_may_release_for_each_other(tmp_path: Path) -> None:
    held, found = [locks.hold(tmp_path)], []
    for work in (lambda: found.append(refused(tmp_path)), held[0].release, lambda: found.append(refused(tmp_path))):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [True, False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGKILL", signal.SIGTERM)])
def test_a_process_that_dies_lets_go(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert refused(tmp_path)
        child.send_signal(number)
        child.wait()
    assert not refused(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError()])
def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: object, timeout: float) -> None:
        raise error

    monkeypatch.setattr(locks.FileLock, "acquire", fail)
    with pytest.warns(UserWarning, match=f"{tmp_path}: its file system has no locks"):
        locks.hold(tmp_path).release()
    error = PermissionError(errno.EACCES, "not yours")
    with pytest.raises(PermissionError, match="not yours"):
        locks.hold(tmp_path)

"""Files are whole or absent."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mfa_kernels.common import files
from tests.helpers.mixtures import random_mfa


def test_bytes_text_and_json_replace_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    files.atomic_write_bytes(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    files.atomic_write_text(path, "µ\r\n")
    assert path.read_bytes() == b"\xc2\xb5\r\n"
    files.atomic_write_json(path, {"a": [1, "µ"]})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    "µ"\n  ]\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    with pytest.raises(ValueError, match="JSON"):
        files.atomic_write_json(path, {"loss": float("nan")})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with files.atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.is_relative_to(tmp_path)  # a rename across file systems would not be atomic
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_safetensors_of_views_shared_and_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    x = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    tensors = {"x": x, "transposed": x.T, "tail": x[1:], "again": x, "empty": torch.empty(0, 3), "bf16": x.bfloat16()}
    files.atomic_save_safetensors(tensors, path, {"note": "yes"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"note": "yes"}


@pytest.mark.skipif(os.name != "posix", reason="not applicable: permissions of POSIX")
def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.atomic_write_text(tmp_path / "text", "")
        files.atomic_save_safetensors({"x": torch.zeros(1)}, tmp_path / "tensors")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


def abandoned(folder: Path, name: str) -> Path:
    """Returns the folder that a killed writer leaves."""
    before = set(folder.iterdir())
    child = os.fork()
    if not child:
        with files.atomic_path(folder / name) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = set(folder.iterdir()) - before
    return left


@pytest.mark.skipif(os.name != "posix", reason="not applicable: locks of POSIX")
def test_what_killed_writers_left_is_removed_by_the_next(tmp_path: Path) -> None:
    others = [".file.txt.0af.tmp", "file.txt.tmp", ".tmpK3eXbq", f".other.{'0' * 32}.tmp", f".file.txt.{'0' * 31}g.tmp"]
    for name in others:
        (tmp_path / name).write_text("somebody else's")
    left = [abandoned(tmp_path, "file.txt"), abandoned(tmp_path, "file.txt")]
    other = abandoned(tmp_path, "another.txt")
    with files.atomic_path(tmp_path / "file.txt") as living:
        living.write_text("whole, in the end")
        files.atomic_write_text(tmp_path / "file.txt", "first")  # another writer, meanwhile
        assert living.exists(), "nobody may take what is being written"
        assert not any(path.exists() for path in left)
    assert (tmp_path / "file.txt").read_text() == "whole, in the end"
    assert {path.name for path in tmp_path.iterdir()} == {"file.txt", other.name, *others}


def test_a_folder_that_is_swept_away_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_, swept = os.open, []

    def late(path: Path, *args: int) -> int:
        if not swept:
            swept.append(path)
            path.rmdir()
        return open_(path, *args)

    monkeypatch.setattr(os, "open", late)
    files.atomic_write_text(tmp_path / "file", "new")
    assert swept
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_while_it_cleans_up_is_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "close", close)
        close(descriptor)
        raise KeyboardInterrupt

    def write() -> None:
        with files.atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("new")
            monkeypatch.setattr(os, "close", interrupted)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (tmp_path / "file").read_text() == "new"
    files.atomic_write_text(tmp_path / "file", "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_old_temporaries_of_earlier_versions_are_removed(tmp_path: Path) -> None:
    once, twice = (tmp_path / f".file.{'ab' * 16}.tmp", tmp_path / f"..file.{'ab' * 16}.tmp.{'cd' * 16}.tmp")
    for path in (once, twice):
        path.write_text("half")
    files.atomic_write_text(tmp_path / "file", "new")
    assert all(path.exists() for path in (once, twice)), "they may be somebody's who is writing"
    for path in (once, twice):
        os.utime(path, (0, 0))
    files.atomic_write_text(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_locks_age_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    left = tmp_path / f".file.{'ab' * 16}.tmp"
    left.mkdir()
    (left / ".file").write_text("half")
    os.utime(left, (0, 0))
    files.atomic_write_text(tmp_path / "file", "new")
    assert left.exists(), "what is in it is new"
    os.utime(left / ".file", (0, 0))
    files.atomic_write_text(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="not applicable: signals of POSIX")
def test_a_killed_save_of_a_mixture_leaves_nothing_for_long(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, safetensors.torch\nfrom tests.helpers.mixtures import random_mfa\n"
        "save = safetensors.torch.save_file\n"
        "def killed(tensors, path, metadata=None):\n"
        "    save(tensors, path, metadata)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "safetensors.torch.save_file = killed\nrandom_mfa().save_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert list(tmp_path.iterdir())
    random_mfa().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("place", ["file", "deep/deeper/file"])
def test_trying_a_path_leaves_nothing(tmp_path: Path, place: str) -> None:
    files.check_writable(tmp_path / place, "out")
    assert not any(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    files.check_writable(tmp_path / "file", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(OSError, match=r"out: .*/file/below/it cannot be written \("):
        files.check_writable(tmp_path / "file" / "below" / "it", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_told_with_the_file_that_is_meant(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limit[1]))
    try:
        with pytest.raises(OSError, match=f"'{tmp_path / 'file'}'$") as error:
            files.atomic_write_bytes(tmp_path / "file", bytes(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.filename == str(tmp_path / "file")
    assert not any(tmp_path.iterdir())


def test_a_folder_in_the_place_of_a_file_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match=r"out: .*file cannot be written \(it is a folder\)"):
        files.check_writable(tmp_path / "file", "out")


def test_an_error_of_the_caller_keeps_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error, files.atomic_path(tmp_path / "file"):
        open(tmp_path / "other")  # noqa: SIM115
    assert error.value.filename == str(tmp_path / "other")

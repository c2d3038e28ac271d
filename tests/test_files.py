"""Files are whole or absent."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mfa_kernels import files


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

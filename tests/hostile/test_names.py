"""A file that names others names files of its own folder, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mfa_kernels.common.checksum import sealed
from mfa_kernels.common.reading import member
from tests.hostile.kinds import KINDS, outcome

HOSTILE = [
    "../secret/{}",
    "/{}",
    "./{}",
    "",
    ".",
    "..",
    "a/{}",
    "a\\{}",
    "..\\{}",
    "{}\0",
    "\0",
    "\ud800",
    "x" * 300,
    None,
    3,
    ["{}"],
]


def place(content: dict, name: object) -> dict:
    """The content of a manifest or a checkpoint that names another file."""
    if "shards" in content:
        content["shards"][0]["file"] = name
    elif "ranks" in content:
        content["ranks"][0]["tensors"] = name
    else:
        content["tensors"] = name
    return content


@pytest.mark.parametrize(
    "name", ["manifest", "sgd checkpoint", "em checkpoint", "online checkpoint", "sharded checkpoint"]
)
def test_names_that_are_no_names(name, copied, tmp_path):
    kind, folder = KINDS[name], copied(name)
    kind.read(folder)
    path = kind.file(folder)
    content = json.loads(path.read_text())
    member_file = next(p.name for p in folder.glob("*.safetensors"))
    for where in (tmp_path / "secret", folder / "a"):  # what is named is there, and whole
        where.mkdir()
        shutil.copy(folder / member_file, where)
    for hostile in HOSTILE:
        given = hostile.format(member_file) if isinstance(hostile, str) else hostile
        given = f"{folder}/{member_file}" if hostile == "/{}" else given
        path.write_text(json.dumps(sealed(place(content, given))))
        how, result = outcome(lambda: kind.read(folder), folder)
        assert how == "refused", (given, result)
        assert path.name in result


@pytest.mark.parametrize("name", ["manifest", "sgd checkpoint", "sharded checkpoint"])
def test_links(name, copied, tmp_path):
    kind, folder = KINDS[name], copied(name)
    expected = kind.read(folder)
    file = next(folder.glob("*.safetensors"))
    file.rename(folder / "elsewhere")
    file.symlink_to("elsewhere")  # in the folder
    assert kind.read(folder) == expected
    (folder / "elsewhere").rename(tmp_path / "outside")
    file.unlink()
    file.symlink_to(tmp_path / "outside")
    how, result = outcome(lambda: kind.read(folder), folder)
    assert how == "refused", result
    assert "outside of its folder" in result
    file.unlink()
    shutil.move(tmp_path / "outside", file)
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    assert kind.read(tmp_path / "link") == expected


def test_member(tmp_path: Path) -> None:
    assert member(tmp_path, "a b-1.x", tmp_path / "m.json") == tmp_path / "a b-1.x"
    assert member(tmp_path, "...", tmp_path / "m.json").name == "..."
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises((ValueError, OSError), match=r"loop"):
        member(tmp_path, "loop", tmp_path / "m.json").read_bytes()

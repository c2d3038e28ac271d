"""Texts from files and folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfa_kernels.data import read_texts


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.txt").write_bytes("\ufeffgr\u00fc\u00dfe\r\n".encode())
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "sub" / "c.md").write_text("# c")
    (tmp_path / "sub" / "d.rst").write_text("d")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden" / "e.txt").write_text("hidden")
    assert list(read_texts(tmp_path)) == [
        (str(tmp_path / "a.py"), "x = 1\n"),
        (str(tmp_path / "b.txt"), "grüße\n"),
        (str(tmp_path / "sub" / "c.md"), "# c"),
        (str(tmp_path / "sub" / "d.rst"), "d"),
    ]


def test_records(tmp_path: Path) -> None:
    lines, entries = tmp_path / "r.jsonl", tmp_path / "r.json"
    lines.write_text('{"text": "one", "id": 1}\n\n"two"\n')
    entries.write_text(json.dumps([{"text": "three"}, "four"]))
    assert list(read_texts([lines, str(entries)])) == [
        (f"{lines}:1", "one"),
        (f"{lines}:3", "two"),
        (f"{entries}[0]", "three"),
        (f"{entries}[1]", "four"),
    ]


def test_a_file_that_is_named_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("plain")
    assert list(read_texts(str(tmp_path / "notes"))) == [(str(tmp_path / "notes"), "plain")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8, byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', 'a.jsonl:1: expected an object with a "text" field'),
        ("a.json", b'{"text": "x"}', "a.json: expected a list of texts, got dict"),
        ("a.json", b'["x", {"text": 3}]', r"a.json\[1\]: expected an object"),
        ("a.json", b"[", "a.json: not JSON"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(tmp_path / name))


def test_settings_in_a_folder_are_not_texts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    (tmp_path / "a.txt").write_text("one")
    assert [text for _, text in read_texts(tmp_path)] == ["one"]


def test_missing_paths_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_texts(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(read_texts("a text, not a path, that is longer than names of files may be " * 100))
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        list(read_texts(tmp_path))

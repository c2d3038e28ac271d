"""Texts from files and folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mfa_kernels.data import read_texts
from mfa_kernels.data.text import check_texts, is_finite, named_texts


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


TABLE = type("DataFrame", (), {"columns": ["text"], "__iter__": lambda self: iter(self.columns)})()


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["texts"], ValueError, r"nothing but .'texts'.: give a column by its values, as dataset.\"texts\"."),
        (("corpus",), ValueError, "nothing but"),
        (["id", "url", "text"], ValueError, "nothing but"),
        (["train", "test"], ValueError, "nothing but"),
        (np.array(["text", "label"]), ValueError, "nothing but"),
        ({"prompt": 1, "answer": 2}.keys(), ValueError, "nothing but"),
        ({"train": ["a text"]}, TypeError, "got a mapping: give one of its values"),
        (TABLE, TypeError, r"got a table \(DataFrame\): give one of its columns"),
        (b"a text", TypeError, "got bytes: decode it, and give a list of strings"),
        (bytearray(b"a text"), TypeError, "got bytearray"),
        (np.array("a text"), TypeError, "got ndarray"),
        (3, TypeError, "got int"),
        ("", TypeError, "texts must be a path, a string or a pathlib.Path, got ''"),
        ("a text, and no path", FileNotFoundError, "a text itself is given in a list"),
        (Path("nowhere"), FileNotFoundError, "nowhere"),
        (["a text", b"bytes"], TypeError, r"texts\[1\] must be a string, .* got bytes: decode it"),
        (["a text", None], TypeError, r"texts\[1\] must be .* got None"),
        ([[3, 4, 5]], TypeError, r"texts\[0\] must be .* got \[3, 4, 5\]"),
        (
            [[{"role": "user", "content": "hello"}]],
            TypeError,
            r"a conversation: give tokenizer.apply_chat_template\(messages, tokenize=False\)",
        ),
        ([{"messages": [{"role": "user", "content": "hello"}]}], TypeError, "a conversation: give"),
        ([{"text": ["a batch", "of rows"]}], TypeError, 'whose "text" is .*: give its rows one by one'),
        ([{"text": None}], TypeError, 'a mapping whose "text" is None'),
        (
            [{"content": "a text", "id": 3}],
            TypeError,
            r"a mapping with \['content', 'id'\]: give one column, as dataset.\"content\".",
        ),
    ],
)
def test_what_is_likely_to_be_meant_otherwise_is_refused(texts: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        check_texts(texts)
    assert "\n" not in str(raised.value)


def test_the_path_of_a_file_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a text")
    path = str(tmp_path / "a.txt")
    for texts in ([path], ["a text", path]):
        with pytest.raises(ValueError, match=r"texts\[.\] must be a text, got the path of a file: give pathlib.Path"):
            check_texts(texts)
    with pytest.raises(ValueError, match=r"texts\[0\] must be a text, got the path of a file"):
        list(named_texts(map(str, tmp_path.glob("*.txt")), None, 1))
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "books"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="nothing but .*corpus"):
        check_texts(["corpus", "books"])
    check_texts(["corpus", "books", "London"])
    for texts in ([Path(path)], [(path, "a text")], path, tmp_path, ["a text about " + path, "/no/such/file"]):
        check_texts(texts)
    assert list(named_texts([Path(path)], 0, 1)) == [(path, "a text")]


def test_words_that_are_texts_are_taken() -> None:
    vocabulary = [f"word{i}" for i in range(100)] + ["text", "label"]
    for texts in (
        ["Paris", "London"], [("word", "text")], ["texts in a list"], ["你好"], vocabulary, {"Paris", "London"},
        [{"text": "text"}], [], [""],
    ):  # fmt: skip
        check_texts(texts)
    assert list(named_texts([("word", "text")], 0, 1)) == [("word", "text")]


def test_a_stream_is_not_touched_by_the_checks() -> None:
    taken = []
    stream = (taken.append(i) or f"text number {i}" for i in range(5))
    check_texts(stream)
    assert not taken
    assert not is_finite(stream)
    assert len(list(named_texts(stream, 0, 2))) == 5


def test_which_texts_are_read_whole() -> None:
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[str]:
            return iter(["a"])

        def __len__(self) -> int:
            return 1

    for texts in (["a"], ("a",), "a", Path("a"), np.array(["a"])):
        assert is_finite(texts)
    for texts in (iter(["a"]), {"a"}, {"a": 1}.values(), Rows()):
        assert not is_finite(texts)


def test_the_buffer_gives_every_text_once_and_mixes() -> None:
    texts = [f"text number {i}" for i in range(200)]
    orders = {}
    for size in (1, 2, 50, 199, 200, 1000):
        orders[size] = [text for _, text in named_texts(iter(texts), 5, size)]
        assert sorted(orders[size]) == sorted(texts)
        assert orders[size] == [text for _, text in named_texts(iter(texts), 5, size)]
        # Nothing comes before it has been read.
        assert all(texts.index(text) <= place + size for place, text in enumerate(orders[size]))
    assert orders[1] == texts
    assert orders[200] == orders[1000] == [text for _, text in named_texts(texts, 5, 1)]
    displaced = sum(abs(texts.index(text) - place) for place, text in enumerate(orders[50])) / 200
    assert displaced > 20


@pytest.mark.parametrize("wrong", [3, None, b"path", {"a": 1}, [3]])
def test_what_is_no_path_is_named(wrong):
    with pytest.raises(TypeError, match="paths must be a path"):
        list(read_texts(wrong))

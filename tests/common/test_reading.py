"""Reading of files: errors that name the file and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfa_kernels.common import reading
from mfa_kernels.common.reading import check_fields, naming, read_json


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON .*can't decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b"NaN", "NaN is no number"),
        (b"1e999", "1e999 is too large"),
        (b"1" * 9999, "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_what_is_not_json(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"some.json.*{message}"):
        read_json(path)


def test_json_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    with path.open("wb") as file:
        file.truncate(1 << 42)  # takes no room
    with pytest.raises(ValueError, match=r"some.json has 4398046511104 bytes, expected JSON of at most"):
        read_json(path)


def test_numbers_that_are_none_where_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text("[NaN, -Infinity, 1e999]")
    assert repr(read_json(tmp_path / "some.json", finite=False)) == "[nan, -inf, inf]"


def test_kinds() -> None:
    kinds = {"n": reading.integer(1, 9), "x": reading.NUMBER, "s": reading.optional(reading.TEXT), "f": reading.FLAG}
    check_fields({"n": 1, "x": 2, "s": None, "f": True, "other": 3}, kinds, "file")
    for key, value, message in (
        ("n", True, "n must be an integer of at least 1 and at most 9, got True"),
        ("n", 0, "got 0"),
        ("n", 1.0, "got 1.0"),
        ("x", "2", "x must be a number, got '2'"),
        ("x", 10**30, "x must be a number"),
        ("s", 3, "s must be a string, or null, got 3"),
        ("f", 0, "f must be true or false, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^file: .*{message}"):
            check_fields({"n": 1, "x": 2, "s": None, "f": True, key: value}, kinds, "file")
    with pytest.raises(ValueError, match="file lacks n, x, s, f"):
        check_fields({}, kinds, "file")
    with pytest.raises(ValueError, match=r"file: expected an object, got \[\]"):
        check_fields([], kinds, "file")


@pytest.mark.parametrize(
    "error", [KeyError("a"), RecursionError(), RuntimeError("b"), OverflowError("c"), ValueError("d")]
)
def test_naming(error: Exception) -> None:
    with (
        pytest.raises(ValueError, match=r"^folder/file is not what it should be \("),
        naming(Path("folder/file"), "what it should be"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [ValueError("folder/file: says it"), FileNotFoundError(2, "none", "x"), KeyboardInterrupt()]
)
def test_naming_leaves_what_says_it(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, naming(Path("folder/file"), "what it should be"):
        raise error
    assert caught.value is error

"""Reading of files from any source: an error names the file and what is wrong with it.

A file is checked before it is used: it is a plain file in the folder that it should be in, its JSON has the keys and
kinds expected, and no memory is allocated because a file says so. No code in a file is run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfa_kernels.common.checks import shown

_MOST_JSON = 1 << 28  # bytes: a manifest of a million shards
_LARGEST = (1 << 63) - 1  # that an int64 holds


@contextmanager
def naming(path: Path, expected: str) -> Iterator[None]:
    """Turns errors of a `with` block into ValueError or OSError that name the file, and what it should have been."""
    try:
        yield
    except Exception as error:  # any kind: libraries fail in many ways on bytes that they do not expect
        if isinstance(error, OSError) and (error.filename is not None or str(path) in str(error)):
            raise
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        told = "nested too deeply" if isinstance(error, RecursionError) else str(error) or "no reason given"
        named = "" if isinstance(error, ValueError | RecursionError) else f"{type(error).__name__}: "
        raise ValueError(f"{path} is not {expected} ({named}{told})") from error


def check_file(path: Path, missing: str = "") -> None:
    """Raises unless `path` is a file that can be opened.

    Raises:
        FileNotFoundError: there is no file; with the sentence `missing`, if given.
        ValueError: it is a folder, a device, ...
        PermissionError: it may not be read.
    """
    try:
        with open(path, "rb", opener=_without_waiting):
            if not path.is_file():
                raise ValueError(f"{path} is not a file, but a {'folder' if path.is_dir() else 'device or a pipe'}")
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, expected a file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(missing or f"{path} is missing") from None


def _without_waiting(path: str, flags: int) -> int:
    """Opens a file, and a pipe without waiting for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def member(folder: Path, name: Any, told_by: Path) -> Path:
    """Returns the path of a file that another file names, which may not be outside of the folder.

    Args:
        folder: the folder in which it should be.
        name: the value found in `told_by`: it must be the name of a file, without a path.
        told_by: the file that names it, for the error.

    Raises:
        ValueError: it is no such name, or a link to outside of the folder.
    """
    plain = isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\\0")
    try:
        plain = plain and bool(os.fsencode(name))
    except UnicodeEncodeError:  # half of a pair of surrogates
        plain = False
    if not plain:
        raise ValueError(f"{told_by} names the file {shown(name)}, expected a plain name of a file in its folder")
    path = folder / name
    with naming(told_by, f"sound: {path}"):
        outside = path.resolve().parent != folder.resolve()
    if outside:
        raise ValueError(f"{path}, which {told_by.name} names, is a link to {path.resolve()}, outside of its folder")
    return path


def read_json(path: Path, *, finite: bool = True, says: str = " is not JSON") -> Any:
    """Returns the value in a file of JSON.

    Args:
        path: the file.
        finite: True to refuse NaN and infinity, which JSON does not have, and numbers that overflow.
        says: the words of the error after the name.

    Raises:
        FileNotFoundError, PermissionError: naming it.
        ValueError: naming it; it is not JSON in UTF-8, it is nested too deeply, or an object has a key twice.
    """
    check_file(path)
    size = path.stat().st_size
    if size > _MOST_JSON:
        raise ValueError(f"{path} has {size} bytes, expected JSON of at most {_MOST_JSON}")
    return parse_json(path.read_bytes(), path, says, finite=finite)


def parse_json(data: bytes | str, path: Path, says: str = " is not JSON", *, finite: bool = True) -> Any:
    """Returns the value of JSON that was found in `path`; see `read_json`."""
    options: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_unique, **options)
    except RecursionError:
        raise ValueError(f"{path}{says} (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path}{says} ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{shown(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def read_safetensors(path: Path, says: str = " is not a complete safetensors file") -> tuple[dict[str, Tensor], Any]:
    """Returns tensors by name, mapped from the file, and the strings of its header.

    The library compares the header with the size of the file before anything is mapped or allocated.

    Raises:
        FileNotFoundError, PermissionError: naming it.
        ValueError: naming it; it is incomplete, or of another kind.
    """
    with opened(path, says) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def opened(path: Path, says: str = " is not a complete safetensors file") -> Iterator[Any]:
    """Yields an open safetensors file; errors of the library become ValueErrors that name it."""
    check_file(path)
    try:
        with naming(path, "a safetensors file"), safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except ValueError as error:
        if isinstance(error.__cause__, SafetensorError):
            raise ValueError(f"{path}{says}: {error.__cause__}") from error.__cause__
        raise


class Kind(NamedTuple):
    """A kind of JSON values: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def integer(least: int = 0, most: int = _LARGEST) -> Kind:
    """Returns the kind of integers in a range, without true and false."""
    words = f"an integer of at least {least}" + ("" if most == _LARGEST else f" and at most {most}")
    return Kind(words, lambda value: type(value) is int and least <= value <= most)


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST)


def choice(*values: Any) -> Kind:
    """Returns the kind of some strings."""
    return Kind(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def optional(kind: Kind) -> Kind:
    """Returns the kind that allows null too."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def every(kind: Kind, length: int | None = None) -> Kind:
    """Returns the kind of lists of such values."""
    words = f"a list of {'' if length is None else f'{length} values, each '}{kind.words}"
    return Kind(
        words,
        lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(kind.holds, value)),
    )


def mapping(kind: Kind) -> Kind:
    """An object of such values."""
    return Kind(
        f"an object of values that are each {kind.words}",
        lambda value: isinstance(value, dict) and all(map(kind.holds, value.values())),
    )


COUNT = integer()
TEXT = Kind("a string", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
SHARE = Kind("a number of at least 0", lambda value: _is_number(value) and 0 <= value < math.inf)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
SHA256 = Kind(
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"),
)


def check_fields(content: Any, kinds: Mapping[str, Kind], where: str, needed: bool = True) -> None:
    """Raises ValueError, beginning with `where`, unless `content` is an object with values of these kinds.

    Args:
        content: any value of JSON; other entries are not checked.
        kinds: by key.
        where: the file, and the place in it.
        needed: whether all of these keys must be there.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, got {shown(content)}")
    missing = [key for key in kinds if key not in content]
    if missing and needed:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for key, kind in kinds.items():
        if key in content and not kind.holds(content[key]):
            raise ValueError(f"{where}: {key} must be {kind.words}, got {shown(content[key])}")

"""Named texts from files and folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mfa_kernels.files import StrPath

# A folder's .json files are mostly settings: name the one that holds texts.
IN_FOLDERS = (".txt", ".md", ".rst", ".py", ".jsonl")


def read_texts(paths: StrPath | Iterable[StrPath]) -> Iterator[tuple[str, str]]:
    """Reads (name, text) pairs, one file at a time.

    Args:
        paths: files and folders. Of a folder, every file below it that ends in .txt, .md, .rst, .py or .jsonl, in
            the order of names, those in hidden folders left out. A .jsonl file has an object with a "text" field
            (or a string) on each line, a .json file has a list of these; any other file is one text.

    Yields:
        The name of the file (with ":line" or "[index]" for a record), and the text.

    Raises:
        FileNotFoundError: naming the path.
        ValueError: naming the file, and the line or entry, that is not UTF-8, not JSON or has no text; or the folder
            that holds nothing to read.
    """
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        for file in _files(Path(path)):
            if file.suffix == ".jsonl":
                yield from _lines(file)
            elif file.suffix == ".json":
                yield from _entries(file)
            else:
                yield str(file), _decode(file.read_bytes(), str(file))


def _files(path: Path) -> list[Path]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{str(path)[:200]!r}: no such file or folder (a text itself is given in a list)")
    if path.is_file():
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in IN_FOLDERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ValueError(f"{path}: this folder holds no {', '.join(IN_FOLDERS)} file")
    return files


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                name = f"{file}:{number}"
                yield name, _text(_parse(_decode(line, name), name), name)


def _entries(file: Path) -> Iterator[tuple[str, str]]:
    entries = _parse(_decode(file.read_bytes(), str(file)), str(file))
    if not isinstance(entries, list):
        raise ValueError(f"{file}: expected a list of texts, got {type(entries).__name__}")
    for index, entry in enumerate(entries):
        name = f"{file}[{index}]"
        yield name, _text(entry, name)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8, byte 0x{data[error.start]:02x} at offset {error.start}") from error


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{name}: not JSON that can be read (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error})") from error


def _text(record: Any, name: str) -> str:
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise ValueError(f'{name}: expected an object with a "text" field, or a string')
    return text

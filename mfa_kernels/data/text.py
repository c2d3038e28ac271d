"""Named texts from files, folders, sequences and iterables, in order or shuffled."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, ValuesView
from pathlib import Path
from typing import Any

import torch

from mfa_kernels.common.checks import check_iterable, check_path, shown
from mfa_kernels.common.files import StrPath
from mfa_kernels.common.places import IN_FOLDERS

# Folders are not searched for .json files, which are mostly settings.

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
# Names of columns and splits in data sets on the Hugging Face hub.
_COLUMNS = {
    "text", "texts", "content", "contents", "document", "documents", "body", "article", "sentence", "title", "code",
    "prompt", "prompts", "completion", "response", "instruction", "input", "output", "question", "answer", "messages",
    "conversation", "conversations", "input_ids", "label", "train", "validation", "test",
}  # fmt: skip
_FEW = 64  # a list of more words than these does not hold names of columns


def named_texts(texts: Any, seed: int | None, buffer_size: int) -> Iterator[tuple[str, str]]:
    """Yields the (name, text) pairs of the texts that `harvest` is given.

    Args:
        texts: texts that `check_texts` lets pass.
        seed: seed of their order; None: as given.
        buffer_size: for texts that may have no end (`is_finite`), the number from which the next is drawn.
    """
    if seed is None:
        yield from _in_order(texts)
        return
    generator = torch.Generator().manual_seed(seed)
    buffer: list[tuple[str, str]] = []
    size = None if is_finite(texts) else buffer_size
    for text in _in_order(texts):
        if len(buffer) == size:
            place = int(torch.randint(size, (1,), generator=generator))
            text, buffer[place] = buffer[place], text
            yield text
        else:
            buffer.append(text)
    for place in torch.randperm(len(buffer), generator=generator).tolist():
        yield buffer[place]


def is_finite(texts: Any) -> bool:
    """True for a path or a sequence of texts, which can be read to its end before the first is used."""
    if isinstance(texts, str | os.PathLike | Sequence):
        return True
    # Arrays, columns and data sets pass; an IterableDataset of PyTorch only seems to have a __getitem__.
    sequence = hasattr(texts, "__len__") and hasattr(texts, "__getitem__")
    return sequence and not isinstance(texts, torch.utils.data.IterableDataset)


def check_texts(texts: Any) -> None:
    """Raises for values that are no texts, or are likely to be meant otherwise; reads nothing of a stream.

    Raises:
        TypeError: naming the value, or the entry of a list, and what to give instead.
        ValueError: a list holds the name of a column or of a file in place of texts.
        FileNotFoundError: there is nothing at a path.
    """
    if isinstance(texts, str | os.PathLike):
        _check_exists(check_path(texts, "texts"))
        return
    kind = None
    if isinstance(texts, Mapping):
        kind = 'a mapping: give one of its values, or a list of mappings with a "text" each'
    elif isinstance(texts, bytes | bytearray | memoryview):
        kind = f"{type(texts).__name__}: decode it, and give a list of strings"
    elif hasattr(texts, "columns"):
        kind = f"a table ({type(texts).__name__}): give one of its columns"
    elif not isinstance(texts, Iterable) or getattr(texts, "shape", None) == ():
        kind = type(texts).__name__
    if kind is not None:
        raise TypeError(f"texts must be a path, or an iterable of strings, of mappings or of paths, got {kind}")
    if isinstance(texts, list | tuple):
        for i, text in enumerate(texts):
            _check_text(i, text)
    if (is_finite(texts) or isinstance(texts, Set | ValuesView)) and 0 < len(texts) <= _FEW:
        _check_words(list(texts))


def _check_words(texts: list[Any]) -> None:
    """Raises where texts are likely to be names of columns, of splits or of a file."""
    if all(isinstance(text, str) and _WORD.fullmatch(text) for text in texts):
        if len(texts) > 1 and not _COLUMNS.intersection(texts) and not all(map(os.path.exists, texts)):
            return
        raise ValueError(
            f"texts must hold texts, got nothing but {shown(texts)}: give a column by its values, as "
            f'dataset["{texts[0]}"], a file as pathlib.Path({texts[0]!r}), and a word that is meant as it stands '
            f"with a name, as [({f'word {texts[0]}'!r}, {texts[0]!r})]"
        )


def _in_order(texts: Any) -> Iterator[tuple[str, str]]:
    if isinstance(texts, str | os.PathLike):
        yield from read_texts(texts)
        return
    for i, text in enumerate(texts):
        _check_text(i, text)
        if isinstance(text, str):
            yield f"text {i}", text
        elif isinstance(text, os.PathLike):
            yield from read_texts(text)
        elif isinstance(text, Mapping):
            yield f"text {i}", text["text"]
        else:
            yield text


def _check_text(i: int, text: Any) -> None:
    """Raises TypeError where entry i of texts is no text."""
    if isinstance(text, str):
        if _is_file(text):
            raise ValueError(
                f"texts[{i}] must be a text, got the path of a file: give pathlib.Path({text!r}), or "
                f"({text!r}, text) for a text of that name"
            )
        return
    if isinstance(text, os.PathLike):
        return
    if isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return
    if isinstance(text, Mapping) and isinstance(text.get("text"), str):
        return
    raise TypeError(
        f'texts[{i}] must be a string, a (name, string) pair, a mapping with "text" or a path, got {_instead(text)}'
    )


def _instead(text: Any) -> str:
    """Returns words for an entry that is no text, and what to give where that is known."""
    if isinstance(text, bytes | bytearray | memoryview):
        return f"{type(text).__name__}: decode it"
    turns = text if isinstance(text, list) else text.get("messages") if isinstance(text, Mapping) else None
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        return "a conversation: give tokenizer.apply_chat_template(messages, tokenize=False)"
    if isinstance(text, Mapping) and "text" in text:
        several = isinstance(text["text"], list | tuple)
        return f'a mapping whose "text" is {shown(text["text"])}{": give its rows one by one" if several else ""}'
    if isinstance(text, Mapping):
        return f'a mapping with {shown(list(text))}: give one column, as dataset["{next(iter(text), "text")}"]'
    return shown(text)


def _is_file(text: str) -> bool:
    """True for a text that looks like a path at which there is something."""
    if len(text) > 1024 or "\n" in text or "\0" in text:
        return False
    return ("/" in text or os.sep in text or text.endswith((*IN_FOLDERS, ".json"))) and os.path.exists(text)


def read_texts(paths: StrPath | Iterable[StrPath]) -> Iterator[tuple[str, str]]:
    """Yields (name, text) pairs, one file at a time.

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
    is_one = isinstance(paths, str | os.PathLike)
    for path in [paths] if is_one else check_iterable(paths, "paths", "a path or an iterable of paths"):
        for file in _files(check_path(path, "paths")):
            if file.suffix == ".jsonl":
                yield from _lines(file)
            elif file.suffix == ".json":
                yield from _entries(file)
            else:
                yield str(file), _decode(file.read_bytes(), str(file))


def check_files(paths: Iterable[StrPath]) -> None:
    """Raises where there is nothing at a path, or a folder holds nothing to read; nothing is read."""
    for path in paths:
        _files(Path(path))


def _check_exists(path: Path) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{str(path)[:200]!r}: no such file or folder (a text itself is given in a list)")


def _files(path: Path) -> list[Path]:
    _check_exists(path)
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

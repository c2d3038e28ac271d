"""Places that may be written to: an output replaces its own kind only, and never an input.

Stores, mixtures and checkpoints are folders with files of fixed names; curves, codes, pages, figures and the paper's
checkpoints are single files. All writers keep three rules:

- a folder of ours holds one kind of thing: a store is not written into a mixture's folder, nor the other way round;
- a single file lies in no store's folder, and has no name of a file of the mixture or checkpoint in the same folder;
- a file is replaced only by one of its own kind.

The kind of a file is told by its first bytes, so that a damaged store still counts as a store.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mfa_kernels.common.files import StrPath

IN_FOLDERS = (".txt", ".md", ".rst", ".py", ".jsonl")
"""Suffixes of the files that are read as texts where a folder is named."""

_HEAD = 1 << 16  # so many bytes tell the kind of a file


class Kind(NamedTuple):
    """A kind of output.

    Attributes:
        what: its name in words.
        holds: a function that returns True for the first bytes of its file.
        file: for a folder, the name of the file that tells its kind; None for a single file.
        names: for a folder, a regular expression of its files' names.
    """

    what: str
    holds: Callable[[bytes], bool]
    file: str | None = None
    names: str = ""


def _json(key: str, value: str) -> Callable[[bytes], bool]:
    mark = re.compile(rf'"{key}"\s*:\s*"{value}"'.encode())
    return lambda head: mark.search(head) is not None


def _begins(*marks: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.lstrip().lower().startswith(tuple(mark.lower() for mark in marks))


STORE = Kind(
    "a store of activations", _json("format", r"mfa_kernels\.activations"), "manifest.json",
    r"manifest\.json|activations-\d+\.safetensors|\.lock",
)  # fmt: skip
MIXTURE = Kind(
    "a mixture", _json("model_type", "mfa_kernels"), "config.json", r"config\.json|model\.safetensors"
)  # fmt: skip
CHECKPOINT = Kind(
    "the checkpoint of a fit", _json("format", r"mfa_kernels\.fit(_sharded)?"), "checkpoint.json",
    r"checkpoint\.json|state-.*\.safetensors|\.lock",
)  # fmt: skip
FOLDERS = (STORE, MIXTURE, CHECKPOINT)

CURVE = Kind("the curve of a fit", lambda head: re.match(rb'\s*\{.*"step":.*"held_out_nll":', head) is not None)
CODES = Kind("a file of codes", lambda head: b'"offsets":{' in head and b'"responsibilities":{' in head)
PAGE = Kind("an HTML page", _begins(b"<!doctype html", b"<html"))
TABLE = Kind("a table of regions", lambda head: b'"format": "mfa_kernels.regions"' in head)
LINES = Kind("a table of regions, comma-separated", lambda head: head.startswith(b"component,label,"))
FIGURE = Kind("a PNG image", _begins(b"\x89PNG"))
PAPER = Kind("a torch checkpoint", _begins(b"PK\x03\x04", b"\x80"))
RESULTS = Kind("results of localize", lambda head: b'"format": "mfa_kernels.localization"' in head)
SCORES = Kind("the scores of a mixture", lambda head: b'"nll":' in head)


def check_place(path: StrPath, kind: Kind, name: str) -> None:
    """Raises where an output of a kind may not be written, even if overwriting is allowed.

    Args:
        path: the path of the folder, or of the single file.
        kind: the kind of the output.
        name: the name of the argument, for messages.

    Raises:
        FileExistsError: naming the argument, the path, and the thing that is there.
    """
    path = Path(path)
    folder, file = (path, path / kind.file) if kind.file else (path.parent, path)
    for other in FOLDERS:
        if other is kind or not is_there(folder, other):
            continue
        if kind.file or other is STORE or re.fullmatch(other.names, path.name):
            there = f"{path} holds {other.what}" if kind.file else f"{path} is in the folder of {other.what}"
            raise FileExistsError(f"{name}: {there}, expected a place for {kind.what} alone: name another")
    check_replaced(file, kind, name)


def check_replaced(file: StrPath, kind: Kind, name: str) -> None:
    """Makes the last check of `check_place`, on the single file, or the file that tells the folder's kind."""
    file = Path(file)
    if _head(file) and not _is(file, kind):
        raise FileExistsError(
            f"{name}: {file} is there already, and is not {_of(kind)}: it is not replaced, name another place"
        )


def check_apart(outputs: Iterable[tuple[str, StrPath, Kind]]) -> None:
    """Raises where two outputs would have the same place, or be in each other's way.

    Args:
        outputs: for each, the name of its argument, its path and its kind.

    Raises:
        ValueError: naming two arguments and a path.
    """
    before: list[tuple[str, Path, Kind]] = []
    for name, given, kind in outputs:
        path = Path(given).resolve()
        for other_name, other, other_kind in before:
            if path == other or _claims(path, kind, other, other_kind) or _claims(other, other_kind, path, kind):
                raise ValueError(f"{name} and {other_name} must be different places, got {given} for both")
        before.append((name, path, kind))


def check_not_read(path: StrPath, kind: Kind, name: str, inputs: Iterable[StrPath], texts: Iterable[StrPath]) -> None:
    """Raises where an output lies in an input of the same work.

    Args:
        path, kind, name: as for `check_place`.
        inputs: stores, mixtures and checkpoints that are read; nothing is written into them or below.
        texts: files and folders of texts. A folder of texts may hold folders of ours, as the working directory does,
            but cannot become one, and gets no file that would be read as a text.

    Raises:
        ValueError: naming the argument and the input.
    """
    place = Path(path).resolve()
    for given in inputs:
        if Path(given).resolve() in (place, *place.parents):
            what = "what" if Path(given).resolve() == place else "in a folder that"
            raise ValueError(f"{name} must not be {what} is read, got {path}")
    for given in texts:
        source = Path(given).resolve()
        is_text = not kind.file and place.suffix in IN_FOLDERS and source in place.parents
        if place == source or is_text:
            raise ValueError(f"{name} must not be among the texts that are read ({given}), got {path}")


def _claims(folder: Path, kind: Kind, path: Path, other: Kind) -> bool:
    """True where a folder of ours needs the place of another output."""
    if not kind.file:
        return folder in path.parents  # a file where the other needs a folder
    return not other.file and path.parent == folder and re.fullmatch(kind.names, path.name) is not None


def is_there(folder: StrPath, kind: Kind) -> bool:
    """True where a folder holds a thing of that kind."""
    return _is(Path(folder) / str(kind.file), kind)


def _of(kind: Kind) -> str:
    return f"of {kind.what}" if kind.file else kind.what


def _is(path: Path, kind: Kind) -> bool:
    return kind.holds(_head(path))


def _head(path: Path) -> bytes:
    """Returns the first bytes of a file; none where there is no file, or it may not be read."""
    try:
        if not path.is_file():
            return b""
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""

"""Text that every Python installation has: the sources and docstrings of its standard library.

Nothing is imported or run: files are read as text, and the help topics (English prose) are read with `ast`.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 20  # about 5% of the modules, by hash of the name
TEST_SHARE = 0.35  # bytes of the `test` package, at most this share of the bytes of everything else
TABLE_SHARE = 0.18  # a file with more of its visible characters in numbers and escapes is a data table
TABLE_ROW_SHARE = 0.5  # so is a file where this share of the lines are `0x80: 0x20ac,  # EURO SIGN` rows
MAX_BYTES = 400_000  # no hand-written module is longer; generated ones are

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "lib-dynload", "_bundled", "tests", "idle_test", "data"}
_NUMBERS = re.compile(r"\\x[0-9a-fA-F]{2}|\\[uU][0-9a-fA-F]{4,8}|\\[0-7]{3}|0[xX][0-9a-fA-F]+|\d+")
_TABLE_ROW = re.compile(r"^\s*(?:0[xX][0-9a-fA-F]+\s*:|u?['\"]\\?[^'\"]{0,8}['\"]\s*#)", re.MULTILINE)
_TOPICS = "pydoc_data/topics.py"


def _hash(name: str) -> int:
    """Returns 64 bits that depend on the name alone (the same on every machine and Python)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _is_held_out(name: str) -> bool:
    # Help topics repeat each other's paragraphs, so holding some of them out would measure memory: all train.
    return not name.startswith(_TOPICS) and _hash(name) % HELD_OUT_ONE_IN == 0


def _is_table(text: str) -> bool:
    visible = sum(len(word) for word in text.split())
    numbers = sum(len(match) for match in _NUMBERS.findall(text))
    rows = len(_TABLE_ROW.findall(text))
    return numbers > TABLE_SHARE * visible or rows > TABLE_ROW_SHARE * (text.count("\n") + 1)


def _is_skipped(name: str) -> bool:
    *folders, last = name.split("/")
    if any(f in _SKIPPED_FOLDERS or f.startswith("config-") for f in folders):
        return True
    if "test" in folders[1:]:  # tests inside packages (older Pythons); the top-level `test` is counted apart
        return True
    # What a distribution or a site wrote is not the standard library (and may name this machine's paths).
    return last.startswith(("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize"))


def _topics(source: str) -> Iterator[tuple[str, str]]:
    """Yields the distinct texts of `help('topics')`: the string values of the one dict literal in the file."""
    try:
        dicts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict)]
    except (SyntaxError, ValueError):
        return
    seen: set[str] = set()
    for node in dicts:
        for key, value in zip(node.keys, node.values):
            if not (isinstance(key, ast.Constant) and isinstance(value, ast.Constant)):
                continue
            topic, text = key.value, value.value
            if isinstance(topic, str) and isinstance(text, str) and text not in seen:
                seen.add(text)
                yield f"{_TOPICS}:{topic}", text


def _read(root: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the files that are text: UTF-8, not empty, not a data table."""
    for name in names:
        try:
            text = (root / name).read_bytes().decode("utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):
            continue
        if name == _TOPICS:
            yield from _topics(text)
        elif text.strip() and len(text) <= MAX_BYTES and not _is_table(text):
            yield name, text


def stdlib_texts(split: str = "train") -> list[tuple[str, str]]:
    """Returns [(name, text)] of this Python's standard library, sorted by name.

    `split` is "train", "held_out" (about 5% of the modules, never from the `test` package) or "all" (both).
    A module is in the same split on every machine; which modules there are depends on the installation.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split must be 'train', 'held_out' or 'all', not {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    names = [name for name in names if not _is_skipped(name)]
    library = list(_read(root, (name for name in names if not name.startswith("test/"))))
    held_out = [item for item in library if _is_held_out(item[0])]
    if split == "held_out":
        return held_out
    train = [item for item in library if not _is_held_out(item[0])]
    room = TEST_SHARE * sum(len(text) for _, text in library)
    # By hash: a fixed sample of all the tests, and not those from "a" to "d".
    for name, text in _read(root, sorted((n for n in names if n.startswith("test/")), key=_hash)):
        room -= len(text)
        if room < 0:
            break
        train.append((name, text))
    return sorted(train if split == "train" else train + held_out)

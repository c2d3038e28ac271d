"""Texts of eight clearly different genres that ship with the package; README.md names their sources and licences."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_SEPARATOR = re.compile(r"^=== (\S+)\n\n", re.MULTILINE)


def genres() -> list[str]:
    """Returns the names of the genres, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.txt"))


def genre_texts() -> list[tuple[str, str]]:
    """Returns ("genre/document", text) of all documents, in one fixed order that takes from all genres alike.

    A document is a passage of some 2,500 characters, so that any stretch of the list is balanced, and its last part
    may be held out.
    """
    placed = []
    for genre in genres():
        whole = (Path(__file__).parent / f"{genre}.txt").read_text(encoding="utf-8")
        _, *parts = _SEPARATOR.split(whole)
        documents = [(f"{genre}/{name}", text.strip()) for name, text in zip(parts[::2], parts[1::2])]
        documents.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
        placed += [((i + 0.5) / len(documents), document) for i, document in enumerate(documents)]
    return [document for _, document in sorted(placed)]


def genre_of(source: str) -> str | None:
    """Returns the genre in the source of a document, its first folder; None where there is no folder."""
    folder, slash, _ = source.partition("/")
    return folder if slash and folder else None

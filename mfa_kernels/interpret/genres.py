"""Genres of documents, read from where they came from: a folder for each genre."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from mfa_kernels.common.checks import check_iterable, check_text

_MOST = 64  # folders that are more than this are no genres


def genres_of(sources: Sequence[str]) -> tuple[list[str], list[int]]:
    """Returns the names of the genres that sources tell, sorted, and the genre of each source; -1 for none.

    The genre of "texts/cooking/soup.txt" is the first folder in which sources differ: "cooking" beside
    "texts/sea/whale.txt". Sources without folders have none, and sources in more than 64 folders are not taken for
    genres.

    Args:
        sources: the origin of each document, as a store has them.
    """
    sources = list(check_iterable(sources, "sources", "the origins of documents"))
    for i, source in enumerate(sources):
        check_text(source, f"sources[{i}]")
    folders = [re.split(r"[/\\]+", source)[:-1] for source in sources]
    of_all = list(takewhile(lambda parts: len(set(parts)) == 1, zip(*folders))) if sources else []
    depth = len(of_all)
    found = [parts[depth] if len(parts) > depth else "" for parts in folders]
    names = sorted({name for name in found if name})
    if not 2 <= len(names) <= _MOST:
        return [], [-1] * len(sources)
    number = {name: i for i, name in enumerate(names)}
    return names, [number.get(name, -1) for name in found]

"""One progress bar, on standard error, and only where somebody watches it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

_quiet = False


def is_watched() -> bool:
    """Whether standard error is a terminal, or the cell of a notebook, and nobody asked for quiet."""
    return not _quiet and (sys.stderr.isatty() or "ipykernel" in sys.modules)


@contextmanager
def quiet(asked: bool = True) -> Iterator[None]:
    """No bars for the length of a `with` block, if it is asked for."""
    global _quiet
    before, _quiet = _quiet, _quiet or asked
    try:
        yield
    finally:
        _quiet = before


def progress_bar(*args: Any, progress: bool = True, **options: Any) -> tqdm[Any]:
    """A bar of tqdm; what is not watched, or not wanted (`progress`), counts and shows nothing."""
    from tqdm import tqdm

    return tqdm(*args, disable=not (progress and is_watched()), **options)

"""One progress bar, on standard error, and only where somebody watches it: ours, and those of libraries that load."""

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


@contextmanager
def of_libraries() -> Iterator[None]:
    """For loading from transformers and the hub: their bars are shown where ours are, and not shown elsewhere.

    Whoever has switched them off has them off; afterwards all is as it was.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    own, hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if is_watched() or not (own or hub):
        yield
        return
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if own:
            logging.enable_progress_bar()  # which switches on the hub's, too
        (enable_progress_bars if hub else disable_progress_bars)()


def progress_bar(*args: Any, progress: bool = True, **options: Any) -> tqdm[Any]:
    """A bar of tqdm; what is not watched, or not wanted (`progress`), counts and shows nothing."""
    from tqdm import tqdm

    return tqdm(*args, disable=not (progress and is_watched()), **options)

"""One progress bar, on standard error, and only where somebody watches it: ours, and those of libraries that load."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
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
    from transformers.utils import logging

    with of_the_hub():
        hidden = not is_watched() and logging.is_progress_bar_enabled()
        if hidden:
            _switch(logging.disable_progress_bar)
        try:
            yield
        finally:
            if hidden:
                _switch(logging.enable_progress_bar)  # the hub's too, which are put back after it


@contextmanager
def of_the_hub() -> Iterator[None]:
    """The same of the hub's alone, for downloads and uploads of ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if not is_watched():
        _switch(disable_progress_bars)
    try:
        yield
    finally:
        _switch(enable_progress_bars if shown else disable_progress_bars)


def _switch(function: Callable[[], Any]) -> None:
    """Calls it; where HF_HUB_DISABLE_PROGRESS_BARS decides instead, a warning would say so each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        function()


def progress_bar(*args: Any, progress: bool = True, **options: Any) -> tqdm[Any]:
    """A bar of tqdm; what is not watched, or not wanted (`progress`), counts and shows nothing."""
    from tqdm import tqdm

    return tqdm(*args, disable=not (progress and is_watched()), **options)

"""Progress bars, ours and those of libraries, shown on a terminal or in a notebook only."""

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
    """True where standard error is a terminal, or the cell of a notebook, and `quiet` is not on."""
    return not _quiet and (sys.stderr.isatty() or "ipykernel" in sys.modules)


@contextmanager
def quiet(asked: bool = True) -> Iterator[None]:
    """Turns bars off for a `with` block, if `asked`."""
    global _quiet
    before, _quiet = _quiet, _quiet or asked
    try:
        yield
    finally:
        _quiet = before


@contextmanager
def of_libraries() -> Iterator[None]:
    """Shows bars of transformers and the hub where ours are shown, and not elsewhere, for a `with` block.

    Bars that users have switched off stay off; afterwards all is as before.
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
    """Does the same for the hub's bars alone, for downloads and uploads of ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if not is_watched():
        _switch(disable_progress_bars)
    try:
        yield
    finally:
        _switch(enable_progress_bars if shown else disable_progress_bars)


def _switch(function: Callable[[], Any]) -> None:
    """Calls a function without the warning that HF_HUB_DISABLE_PROGRESS_BARS decides instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        function()


def progress_bar(*args: Any, progress: bool = True, **options: Any) -> tqdm[Any]:
    """Returns a bar of tqdm, which is not shown unless it is watched and wanted (`progress`)."""
    from tqdm import tqdm

    return tqdm(*args, disable=not (progress and is_watched()), **options)

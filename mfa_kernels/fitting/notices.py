"""Warnings of a fit, which do not end it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def warn(message: str) -> None:
    """Warns of the line that called the fit: the first outside of this package and of torch, which decorates it."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("mfa_kernels", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@contextmanager
def write_or_warn(what: str, then: str = "the fit goes on, and tries again") -> Iterator[None]:
    """Turns an OSError into a warning: a full disk, or one that is gone, costs the file and not the fit."""
    try:
        yield
    except OSError as error:
        warn(f"fit: {what} could not be written ({type(error).__name__}: {error}); {then}")

"""What a fit says on its way that is no reason to end it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def warn(message: str) -> None:
    """Of the line that called the fit: the first one outside of this package and of torch, whose decorators it has."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("mfa_kernels", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@contextmanager
def going_on(what: str, then: str = "the fit goes on, and tries again") -> Iterator[None]:
    """For writing something: a full disk, or one that is gone, costs the file and not the fit."""
    try:
        yield
    except OSError as error:
        warn(f"fit: {what} could not be written ({type(error).__name__}: {error}); {then}")

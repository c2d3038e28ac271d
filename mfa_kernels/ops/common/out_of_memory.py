"""Explains an out-of-memory error in the caller's terms: what was made, its size, and what shrinks it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def explain_out_of_memory(what: str, values: int, bytes_each: int, shrink: str) -> Iterator[None]:
    """Explains an out-of-memory error of the device in the block.

    Args:
        what: what the block makes, such as "the factors of 8192 components".
        values: how many values it holds at most at a time, about.
        bytes_each: of one value.
        shrink: which argument makes it smaller.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = values * bytes_each / 2**30
        raise torch.OutOfMemoryError(f"{what} need about {size:.1f} GiB: {shrink}. ({error})") from error

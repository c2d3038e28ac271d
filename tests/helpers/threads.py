"""The number of threads, for a while, and results that must not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs a block on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(run: Callable[[], Iterable[Tensor]], counts: Iterable[int]) -> list[Tensor]:
    """The results, the same bits for every one of these numbers of threads."""
    wanted = None
    for count in counts:
        with threads(count):
            found = list(run())
        wanted = found if wanted is None else wanted
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert torch.equal(a, b), f"result {i} on {count} threads"
    assert wanted is not None
    return wanted

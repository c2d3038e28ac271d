"""A uniform sample of a stream that is read once, in the memory of the sample."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mfa_kernels.fitting.source import as_source


@torch.no_grad()
def reservoir(batches: Iterable[Tensor], rows: int, *, seed: int = 0) -> Tensor:
    """At most `rows` of the rows of a stream, each subset of that many as likely as another.

    Every row draws a number, and the rows with the smallest numbers stay. What is held is the sample and one batch; the
    sample is in the order of the stream, and the same however the stream is cut into batches. For clusters of a stream
    that cannot be held: ``kmeans(reservoir(batches, 200_000), K)``.

    Args:
        batches: activations (..., D) of one width: tensors, arrays, or tuples that begin with one.
        rows: most rows of the sample.
        seed: of the numbers.

    Returns:
        (min(rows, N), D), in the dtype of the batches (float32 for halves), where they are.

    Raises:
        TypeError, ValueError: naming the argument; a stream without rows among it.
    """
    if int(rows) != rows or rows < 1:
        raise ValueError(f"rows must be an integer >= 1, got {rows!r}")
    generator = torch.Generator().manual_seed(seed)
    kept: Tensor | None = None
    numbers = torch.empty(0, dtype=torch.float64)
    for i, batch in enumerate(batches):
        source = as_source([batch], f"batches[{i}]")
        if kept is not None and source.n_features != kept.shape[1]:
            raise ValueError(f"batches[{i}] has width {source.n_features}, but batches[0] has width {kept.shape[1]}")
        mine = torch.rand(len(source), dtype=torch.float64, generator=generator)
        held = len(numbers)
        numbers = torch.cat([numbers, mine])
        index = numbers.topk(min(rows, len(numbers)), largest=False).indices.sort().values
        numbers = numbers[index]
        # Few rows of a late batch stay: only those are read.
        new = source.rows(index[index >= held] - held)
        kept = new if kept is None else torch.cat([kept[index[index < held].to(kept.device)], new.to(kept)])
    if kept is None:
        raise ValueError("batches is an iterable without batches (an iterator can be read only once)")
    return kept

"""Sums of rows by the segment that they belong to."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding_bag


def segment_sums(values: Tensor, owner: Tensor, segments: int, weights: Tensor | None = None) -> Tensor:
    """Sums of the rows of values (n, m) by owner (n,): (segments, m). Owners from `segments` on are left out."""
    order = owner.argsort(stable=True)
    counts = owner.bincount(minlength=segments + 1)
    # A last bag takes the rows without an owner.
    offsets = (counts.cumsum(0) - counts)[: segments + 1]
    ordered = None if weights is None else weights[order].to(values.dtype)
    return embedding_bag(order, values, offsets, mode="sum", per_sample_weights=ordered)[:segments]

"""Stage 0 of the first level of the scan on a CPU: the rows of A in int8, and bounds of what that rounds away."""

from __future__ import annotations

import torch

from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.woodbury.types import Int8Rows, Woodbury


def pays(woodbury: Woodbury) -> bool:
    """Whether the scan of a mixture gains by it: served by the C++ kernels, on a processor that multiplies int8 faster
    than float32, in float32, with loadings, and with no more features than a sum in int32 holds."""
    rows = woodbury.rows  # only those of the C++ kernels are tiled
    if rows.dim() != 4 or rows.dtype is not torch.float32 or not woodbury.cholesky.shape[-1]:
        return False
    library = cpp.library()
    return library.multiplies_int8 and woodbury.center.shape[0] <= library.int8_features


def int8_rows(woodbury: Woodbury) -> Int8Rows:
    """The terms in int8, on any processor that the C++ kernels run on; float32, R >= 1."""
    rows, scale, center = woodbury.rows, woodbury.scale, woodbury.center
    if woodbury.per_component:  # tokens are scaled once for all: by the root mean square
        scale = rows[:, :, -1].flatten(1)[:, : len(center)].square().mean(0).sqrt()
    else:
        scale = scale.clone()
    quantised, means, starts, terms = cpp.library().int8_rows(rows, scale, center, woodbury.per_component)
    return Int8Rows(quantised, means, starts, terms, scale)


def allocate(woodbury: Woodbury) -> Int8Rows:
    """Terms of the right sizes, to be written."""
    (count, blocks, row_count, width), rank = woodbury.rows.shape, woodbury.cholesky.shape[-1]
    padded, empty = blocks * width, woodbury.rows.new_empty
    return Int8Rows(
        empty(count, padded // 4, rank, 4, dtype=torch.int8),
        empty(count, row_count - rank, padded),
        empty(count, rank, dtype=torch.int32),
        empty(count, 2 * rank + 5),
        torch.empty_like(woodbury.scale),
    )

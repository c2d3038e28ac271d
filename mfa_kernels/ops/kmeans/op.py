"""K-means assignment registered: ``torch.ops.mfa_kernels.nearest``. No gradient: an owner has none."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.kmeans import portable
from mfa_kernels.ops.precision import full_precision

torch.library.define(
    "mfa_kernels::nearest", "(Tensor x, Tensor centroids, Tensor center) -> (Tensor owner, Tensor distance)"
)


@torch.no_grad()
def nearest(x: Tensor, centroids: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every row, and the squared distance to it.

    Args:
        x: (N, D), any float dtype.
        centroids: (K, D), float32 or float64, less the centre: near the origin, so that |x - center|^2 does not drown
            the differences.
        center: (D,), subtracted from every row, in the dtype of the centroids; zero when None.

    Returns:
        owner: (N,) int64. Of centroids at the same distance, the one with the lowest index; where distances differ
            by less than the rounding of the centroids' dtype, one of them. K for a row whose distance is not finite.
        distance: (N,), in the dtype of the centroids, computed by difference: 0 where the row is the centroid. NaN for
            a row whose distance is not finite.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    center = centroids.new_zeros(centroids.shape[-1]) if center is None else center
    if centroids.dim() != 2 or not len(centroids):
        raise ValueError(f"centroids must have shape (K, D) with K >= 1, got {tuple(centroids.shape)}")
    if x.dim() != 2 or x.shape[1] != centroids.shape[1]:
        raise ValueError(f"x must have shape (N, D) = (N, {centroids.shape[1]}), got {tuple(x.shape)}")
    if center.shape != centroids.shape[1:]:
        raise ValueError(f"center must have shape (D,) = ({centroids.shape[1]},), got {tuple(center.shape)}")
    if centroids.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"centroids must be float32 or float64, got {centroids.dtype}")
    return torch.ops.mfa_kernels.nearest(x, centroids, center)


def _nearest(x, centroids, center):
    center = center.to(centroids.dtype)
    with full_precision(centroids):
        return portable.nearest(x, centroids, center)


for _device in ("CPU", "CUDA"):
    torch.library.impl("mfa_kernels::nearest", _device)(_nearest)


@torch.library.register_fake("mfa_kernels::nearest")
def _(x, centroids, center):
    return x.new_empty(len(x), dtype=torch.long), centroids.new_empty(len(x))

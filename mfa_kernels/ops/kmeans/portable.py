"""K-means in plain PyTorch: a GEMM per tile of rows, the distance to the winner by difference, sums by segments."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.common.segments import segment_sums
from mfa_kernels.ops.kmeans.types import ClusterSums

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # of rows and scores while a tile is compared: a CPU's cache


def nearest(x: Tensor, centroids: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """See `mfa_kernels.ops.kmeans.op.nearest`."""
    owner = torch.empty(len(x), dtype=torch.long, device=x.device)
    distance = torch.empty(len(x), dtype=centroids.dtype, device=x.device)
    half_norm = centroids.square().sum(1) / 2
    transposed = centroids.t()
    elements = TILE_ELEMENTS.get(x.device.type, 1 << 22)
    rows = max(64, elements // sum(centroids.shape))
    for start in range(0, len(x), rows):
        tile = x[start : start + rows].to(centroids.dtype) - center
        index = torch.addmm(half_norm, tile, transposed, beta=-1).max(1).indices
        # By difference: the expanded square would leave the rounding of |x|^2 where the distance is 0.
        gap = tile - centroids[index]
        owner[start : start + rows] = index
        distance[start : start + rows] = torch.linalg.vecdot(gap, gap)
    lost = ~distance.isfinite()
    return owner.masked_fill_(lost, len(centroids)), distance.masked_fill_(lost, torch.nan)


def cluster_sums(
    x: Tensor, center: Tensor, owner: Tensor, distance: Tensor, weights: Tensor | None, out: ClusterSums
) -> None:
    """See `mfa_kernels.ops.kmeans.op.cluster_sums`."""
    clusters = len(out.sums)
    out.sums.add_(segment_sums(x.to(center.dtype) - center, owner, clusters, weights))
    pair = torch.stack([distance, torch.ones_like(distance)], dim=1).double()
    totals = segment_sums(pair, owner, clusters, weights)
    out.inertia.add_(totals[:, 0])
    out.mass.add_(totals[:, 1])

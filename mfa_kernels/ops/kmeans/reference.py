"""Nearest centroids, and sums over clusters, by their definition: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(x: Tensor, centroids: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Owner (N,) int64 and squared distance (N,), every difference written out: see `mfa_kernels.ops.kmeans.op`."""
    distance = (x.unsqueeze(1) - center - centroids).square().sum(-1)  # (N, K)
    least, owner = distance.nan_to_num(torch.inf, torch.inf).min(1)
    lost = least.isinf()
    return owner.masked_fill(lost, len(centroids)), least.masked_fill(lost, torch.nan)


def cluster_sums(
    x: Tensor, center: Tensor, owner: Tensor, distance: Tensor, weights: Tensor, clusters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """sums (K, D), mass (K,) and inertia (K,) of the rows that have an owner."""
    member = owner.unsqueeze(0) == torch.arange(clusters, device=owner.device).unsqueeze(1)  # (K, N)
    weighted = member * weights
    owned = (owner < clusters).unsqueeze(1)
    return (
        weighted @ torch.where(owned, x - center, 0),
        weighted.sum(1),
        weighted @ torch.where(owned.squeeze(1), distance, 0),
    )

"""The sums over each cluster, from which centroids are updated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClusterSums(NamedTuple):
    """Sums over the rows x_n of each cluster, with weights w: float64.

    Attributes:
        sums: of w (x - center), (K, D).
        mass: of w, (K,).
        inertia: of w times the squared distance to the centroid, (K,).
    """

    sums: Tensor
    mass: Tensor
    inertia: Tensor

    @classmethod
    def zeros(cls, centroids: Tensor) -> ClusterSums:
        """The sums of no row, for centroids (K, D), on their device."""
        clusters, features = centroids.shape
        shapes = ((clusters, features), (clusters,), (clusters,))
        return cls(*(centroids.new_zeros(shape, dtype=torch.float64) for shape in shapes))

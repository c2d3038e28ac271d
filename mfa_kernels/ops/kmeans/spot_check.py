"""How far K-means' kernels are from float64 on a few rows: what `mfa_kernels.ops.common.first_use` asks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.ops.common.first_use import spread, worst
from mfa_kernels.ops.kmeans.types import ClusterSums

_ALLOWED = 256 * 2.0**-23  # of the squared lengths behind a distance
_ROWS = 2048  # of a cluster, in float64 at once


def of_nearest(found: tuple[Tensor, Tensor], x: Tensor, centroids: Tensor, center: Tensor) -> float | None:
    """The largest error of owners and distances over what is allowed, on some rows."""
    few = spread(len(x), x.device)
    y = x[few].double() - center.double()
    finite = y.isfinite().all(1)
    y, few = y[finite], few[finite]
    if not len(few):
        return None
    owner, distance = found[0][few], found[1][few]
    if int(owner.min()) < 0 or int(owner.max()) >= len(centroids):
        return math.inf
    c = centroids.double()
    every = torch.cdist(y, c, compute_mode="donot_use_mm_for_euclid_dist").square()
    own = every.gather(1, owner.unsqueeze(1)).squeeze(1)
    allowed = _ALLOWED * (y.square().sum(1) + c[owner].square().sum(1) + 1e-30)
    return max(worst(distance, own, allowed), worst(own, every.amin(1), allowed))


def of_sums(
    x: Tensor, center: Tensor, owner: Tensor, distance: Tensor, weights: Tensor | None, out: ClusterSums,
    before: ClusterSums,
) -> float | None:  # fmt: skip
    """The largest error of what was added to `before` over what is allowed, in one cluster."""
    clusters = len(out.mass)
    owned = owner.bincount(minlength=clusters + 1)[:clusters]
    few = torch.where(owned <= _ROWS, owned, 0)
    if not int(owned.max()):
        return None
    k = int(few.argmax() if int(few.max()) else owned.where(owned > 0, owned.max()).argmin())
    own = (owner == k).nonzero().squeeze(1)
    weight = torch.ones(len(own), dtype=torch.float64, device=x.device) if weights is None else weights[own]
    y = x[own].double() - center.double()
    size = (weight.sum() * (weight * y.square().sum(1)).sum()).sqrt()
    gap = (out.sums[k] - before.sums[k] - weight @ y).norm()
    inertia = (weight * distance[own].double()).sum()
    return max(
        worst(gap, torch.zeros_like(gap), _ALLOWED * (size + 1e-30)),
        worst(out.mass[k] - before.mass[k], weight.sum(), _ALLOWED * (weight.sum() + 1e-30)),
        worst(out.inertia[k] - before.inertia[k], inertia, _ALLOWED * (inertia.abs() + 1e-30)),
    )

"""Lists of components that can be active together: the work of a screened token hardly grows with K."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.kmeans.op import nearest
from mfa_kernels.ops.screen.types import Neighbors

LONGEST = 512
"""Neighbors per component at most."""

LEAST_COMPONENTS = 1024
"""Fewer are bounded one by one in about the same time (`python -m bench.bench_screen --curve`)."""

AT_ONCE = 4096
"""Components whose lists take no longer than a second or so on two cores: made without being asked for."""

ROWS_PER_COMPONENT = 64
"""Rows per component above which the lists save more than they cost (`python -m bench.bench_screen`)."""

FEATURES = 64
"""Coordinates at least, where lists are to be made: with fewer they grow long, and a token bounds few components."""

_LLOYD = 6  # iterations that group the means
_CHUNK = 4096  # components at a time, in float64


def flat(neighbors: Neighbors | None) -> tuple[list[Tensor], float]:
    """The tensors and the threshold of the lists, as an operator takes them."""
    return ([], 0.0) if neighbors is None else (list(neighbors[:-1]), neighbors.threshold)


def length_of_lists(components: int) -> int:
    """M: a longer list would cost a token more than the bounds of all components."""
    return min(components - 1, 32 + components // 8, LONGEST)


def find(
    projections: Tensor, sizes: Tensor, constants: Tensor, known: Tensor, norm: float, features: int, threshold: float
) -> Neighbors:
    """Lists of all components. K^2 p (R^2 + 7 R) multiply-adds.

    Args:
        projections: {m_k, V_k^T} (K, R+1, p) float64, the marginals on p directions.
        sizes: lengths of the whitened loadings W~_k, all together, at least; (K,) float64.
        constants: raised by their rounding, (K,), in the dtype of the mixture.
        known: True where a component has a bound, (K,) bool; one without is in every list, and has none.
        norm: largest eigenvalue of Q^T Q, at most.
        features: D.
        threshold: nats.
    """
    count, rows, kept = projections.shape
    rank, dtype = rows - 1, constants.dtype
    means = projections[:, 0].to(dtype).contiguous()
    whitened = means.new_empty(count, rank, kept)
    cholesky = means.new_empty(count, rank, rank)
    identity = torch.eye(rank, dtype=torch.float64)
    for begin in range(0, count, _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        loadings = projections[chunk, 1:]
        lower, failed = torch.linalg.cholesky_ex(loadings @ loadings.mT + 2 * identity)
        usable = ((failed == 0) & known[chunk])[:, None, None]
        lower = torch.where(usable, lower, identity)
        whitened[chunk] = torch.linalg.solve_triangular(lower, loadings, upper=False)
        cholesky[chunk] = torch.where(usable, lower, math.nan)
    # What V^T u may be off by: its sums and those of E and L here, and V in float64 there (README.md, "Rounding").
    length = cholesky.double().square().sum((1, 2)).sqrt()
    unit = torch.finfo(dtype).eps
    offs = rank**0.5 * ((kept + 2 * rank + 8) * unit * length + 2 * features * torch.finfo(torch.float64).eps * sizes)
    neighbors, onsets, horizons = cpp.library().screen_neighbors(
        means, whitened, cholesky, constants, offs.to(dtype) * (1 + unit), norm, threshold, length_of_lists(count)
    )
    return Neighbors(*_groups(means), neighbors, onsets, horizons, threshold)


def _groups(means: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first six tensors of `Neighbors`: sqrt(K) groups by a few iterations of K-means."""
    means = means.nan_to_num(0, 0, 0)
    count = len(means)
    groups = max(1, math.isqrt(count))
    center = means.mean(0)
    centers = means[torch.arange(groups) * count // groups]
    owner = torch.zeros(count, dtype=torch.long)
    for _ in range(_LLOYD):
        owner = nearest(means, centers - center, center)[0].clamp_max(groups - 1)  # K where distances overflow
        sizes = owner.bincount(minlength=groups).unsqueeze(-1)
        sums = torch.zeros_like(centers).index_add_(0, owner, means)
        centers = torch.where(sizes > 0, sums / sizes.clamp_min(1), centers)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), owner.bincount(minlength=groups).cumsum(0)])
    members = owner.argsort(stable=True)
    means = means[members]
    return (
        centers,
        centers.square().sum(-1) / 2,
        starts.int(),
        members.int(),
        means,
        means.square().sum(-1) / 2,
    )

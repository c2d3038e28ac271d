"""Neighbours of regions: broad concepts are tiled by neighbourhoods of regions (arXiv 2602.02464)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_choice, check_components, check_flag, check_integer, check_mixture
from mfa_kernels.common.precision import full_precision
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.mixture.functional import compute_dtype
from mfa_kernels.ops.woodbury.reference import woodbury

if TYPE_CHECKING:
    from mfa_kernels.mixture.mfa import MFA

_BLOCK_NUMBERS = 1 << 24  # in the largest temporary, 128 MiB in float64


@torch.no_grad()
def neighbors(
    mfa: MFA, n: int = 10, metric: str = "centroid", *, components: Sequence[int] | None = None, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns the n nearest regions of every region, or of some.

    Computed in blocks of rows of the distances to all K regions, and in float64 but for the products of the "subspace"
    metric, which are in the mixture's dtype: in float32 its distances are good to 1e-3.

    Args:
        mfa: the mixture, on any device.
        n: neighbours, in [1, K).
        metric: "centroid", |mu_j - mu_k|;
            "mahalanobis", sqrt((mu_j - mu_k)^T C_k^-1 (mu_j - mu_k)), how many standard deviations of region k the
            centroid of j is away: not symmetric;
            "subspace", |P_j - P_k|_F / sqrt(2) with P the projector on the span of W: 0 for equal spans, sqrt(R) for
            orthogonal ones. It does not depend on where the regions are, nor on a rotation of their loadings.
        components: the B regions whose neighbours are wanted; all K when None.
        progress: show a progress bar.

    Returns:
        indices (B, n) int64 and distances (B, n) float64, nearest first, in the order of `components`, on the mixture's
        device. A region is not its own neighbour.
    """
    check_choice(metric, ("centroid", "mahalanobis", "subspace"), "metric")
    progress, n = check_flag(progress, "progress"), check_integer(n, "n")
    count = check_mixture(mfa).n_components
    if not 1 <= n < count:
        raise ValueError(f"n must be in [1, {count}), one less than there are regions, got {n!r}")
    chosen = list(range(count)) if components is None else check_components(components, count)
    if metric == "subspace" and mfa.rank == 0:
        raise ValueError('metric="subspace" needs loadings, and this mixture has rank 0')
    metrics: dict[str, type[Metric]] = {"centroid": Centroids, "mahalanobis": _Mahalanobis, "subspace": _Subspaces}
    rows = metrics[metric](mfa)
    with full_precision(mfa.means):
        return nearest(rows, chosen, n, mfa, progress)


def nearest(rows: Metric, chosen: Sequence[int], n: int, mfa: MFA, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Returns `neighbors` of some regions, given a metric that is prepared already."""
    count = mfa.n_components
    size = max(1, min(count, _BLOCK_NUMBERS // rows.numbers_per_row))
    asked = torch.tensor(chosen, dtype=torch.long, device=mfa.means.device)
    indices = asked.new_empty(len(asked), n)
    distances = torch.empty(len(asked), n, dtype=torch.float64, device=mfa.means.device)
    with progress_bar(total=len(asked), desc="neighbours", unit="region", progress=progress) as bar:
        for start in range(0, len(asked), size):
            block = asked[start : start + size]
            squared = rows.squared(block)
            squared.scatter_(1, block.unsqueeze(1), torch.inf)
            best, index = squared.topk(n, largest=False)
            indices[start : start + size], distances[start : start + size] = index, best.clamp_min(0).sqrt()
            bar.update(len(block))
    return indices, distances


class Metric(Protocol):
    """Squared distances between regions, prepared for one mixture."""

    numbers_per_row: int  # of the largest temporary, for each region of a block

    def __init__(self, mfa: MFA): ...

    def squared(self, block: Tensor) -> Tensor:
        """Squared distances from the regions in block (B,) to all, (B, K)."""


class Centroids(Metric):
    """|mu_j - mu_k|^2."""

    def __init__(self, mfa: MFA):
        means = mfa.means.double()
        self.means = means - means.mean(0)  # a common offset would cost digits
        self.numbers_per_row = mfa.n_components
        self.norms = self.means.square().sum(-1)

    def squared(self, block: Tensor) -> Tensor:
        return self.norms[block, None] - 2 * self.means[block] @ self.means.T + self.norms


class _Mahalanobis(Metric):
    """d^2 = |lam v|^2 - |A lam v|^2 with v = mu_j - mu_k (Woodbury), lam and A = L^-1 W~^T those of region k."""

    def __init__(self, mfa: MFA):
        means = mfa.means.double()
        self.means = means - means.mean(0)
        self.loadings = mfa.loadings
        self.precision = mfa.noise_variance.double().reciprocal()
        self.numbers_per_row = max(mfa.n_components, mfa.n_features) * max(1, mfa.rank)

    def squared(self, block: Tensor) -> Tensor:
        means, loadings = self.means[block], self.loadings[block].double()
        precision = self.precision.expand_as(self.means)[block]
        outside = precision @ self.means.square().T - 2 * (precision * means) @ self.means.T
        outside += (precision * means.square()).sum(-1, keepdim=True)
        noise = precision.reciprocal()
        rows = woodbury(loadings, noise)[0] * precision.sqrt().unsqueeze(1)  # A_k lam_k, (B, R, D)
        inside = rows @ self.means.T - rows @ means.unsqueeze(-1)  # (B, R, K)
        return outside - inside.square().sum(1)


class _Subspaces(Metric):
    """|P_j - P_k|_F^2 / 2 = (rank P_j + rank P_k) / 2 - |Q_j^T Q_k|_F^2, Q orthonormal bases of the loadings."""

    def __init__(self, mfa: MFA):
        (loadings,) = compute_dtype(mfa.loadings)
        self.basis = torch.empty_like(loadings.mT, memory_format=torch.contiguous_format)  # (K, R, D)
        self.dimensions = torch.empty(mfa.n_components, dtype=torch.float64, device=loadings.device)
        for part in torch.arange(mfa.n_components, device=loadings.device).split(256):
            basis, values, _ = torch.linalg.svd(loadings[part].double(), full_matrices=False)
            # Directions that the loadings do not span are no part of the subspace.
            span = values > values[:, :1] * mfa.n_features * torch.finfo(mfa.loadings.dtype).eps
            self.basis[part] = (basis * span.unsqueeze(1)).mT.to(loadings)
            self.dimensions[part] = span.sum(-1).double()
        self.numbers_per_row = mfa.n_components * mfa.rank**2

    def squared(self, block: Tensor) -> Tensor:
        products = self.basis[block].flatten(0, 1) @ self.basis.flatten(0, 1).T
        overlap = products.square_().unflatten(1, (-1, self.basis.shape[1])).sum(-1)
        overlap = overlap.unflatten(0, (len(block), -1)).sum(1).double()
        return (self.dimensions[block, None] + self.dimensions) / 2 - overlap

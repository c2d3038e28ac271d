"""K-means registered: ``torch.ops.mfa_kernels.nearest`` and ``.cluster_sums``. No gradient: an owner has none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision
from mfa_kernels.ops.common import backends, configs, cpp, first_use
from mfa_kernels.ops.common.register import operator
from mfa_kernels.ops.common.trust import check_range
from mfa_kernels.ops.kmeans import portable, spot_check
from mfa_kernels.ops.kmeans.types import ClusterSums


@torch.no_grad()
def nearest(
    x: Tensor, centroids: Tensor, center: Tensor | None = None, basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every row, and the squared distance to it.

    Args:
        x: (N, D), any float dtype.
        centroids: (K, D), float32 or float64, finite, less the centre: near the origin, so that |x - center|^2 does
            not drown the differences.
        center: (D,), subtracted from every row, in the dtype of the centroids; zero when None.
        basis: (D, P), orthonormal columns along which the rows and the centroids differ most, P < D
            (`mfa_kernels.ops.kmeans.basis`). It changes the time that the C++ kernels take, and no result.

    Returns:
        owner: (N,) int64. Of centroids at the same distance, the one with the lowest index; where distances differ
            by less than the rounding of the centroids' dtype, one of them. K for a row whose distance is not finite.
        distance: (N,), in the dtype of the centroids, computed by difference: 0 where the row is the centroid. NaN for
            a row whose distance is not finite.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if centroids.dim() != 2 or not len(centroids):
        raise ValueError(f"centroids must have shape (K, D) with K >= 1, got {tuple(centroids.shape)}")
    if centroids.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"centroids must be float32 or float64, got {centroids.dtype}")
    features = centroids.shape[1]
    center = centroids.new_zeros(features) if center is None else center
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(f"x must have shape (N, D) = (N, {features}), got {tuple(x.shape)}")
    if center.shape != (features,):
        raise ValueError(f"center must have shape (D,) = ({features},), got {tuple(center.shape)}")
    if basis is not None and (basis.dim() != 2 or len(basis) != features):
        raise ValueError(f"basis must have shape (D, P) = ({features}, P), got {tuple(basis.shape)}")
    return torch.ops.mfa_kernels.nearest(x, centroids, center, basis)


@torch.no_grad()
def cluster_sums(
    x: Tensor, center: Tensor, owner: Tensor, distance: Tensor, weights: Tensor | None, out: ClusterSums
) -> None:
    """Adds the sums of these rows that the centroids' update needs to the last argument.

    Args:
        x: (N, D), any float dtype.
        center: (D,), float32 or float64: the dtype that computes.
        owner, distance: from `nearest`, (N,); a row of owner K is left out.
        weights: (N,) float64, or None: all 1.
        out: what is added to, float64.
    """
    torch.ops.mfa_kernels.cluster_sums(x, center, owner, distance, weights, *out)


def screened(x: Tensor, centroids: Tensor, center: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
    """`nearest` by the C++ kernels, and how many pairs they measured one by one: at least one a row."""
    x, centroids, center = x.to(centroids.dtype).contiguous(), centroids.contiguous(), center.to(centroids).contiguous()
    width = cpp.library().vector_bytes // centroids.element_size()
    columns = 0 if basis is None else basis.shape[1] // width * width
    projected, slack = None, _rounding(centroids, centroids.shape[1])
    if basis is None or columns == 0 or columns >= centroids.shape[1]:
        basis = None
    else:
        basis = basis[:, :columns].to(centroids).contiguous()
        wide = basis.double()
        projected = (centroids.double() @ wide).to(centroids).contiguous()
        uneven = torch.linalg.matrix_norm(wide.T @ wide - torch.eye(columns, dtype=torch.float64))
        slack = 2 * float(uneven) + _rounding(centroids, columns) * math.sqrt(columns)
    return cpp.library().nearest(x, centroids, center, basis, projected, slack)


def _rounding(centroids: Tensor, coordinates: int) -> float:
    """Error of a product y . m + r r_k of that many coordinates, at most, relative to |v| |c_k| (README)."""
    features = centroids.shape[1]
    return 8 * torch.finfo(centroids.dtype).eps * (256 + features / 256 + features / 8 + coordinates / 256 + 64)


@operator(
    "nearest",
    "-> (Tensor owner, Tensor distance)",
    {"x": "any(N, D)", "centroids": "real(K, D)", "center": "any(D)", "basis": "any(D, P)"},
    last=("x",),
    optional=("basis",),
    where={"centroids": "K > 0"},
    fake=lambda given: (given.x.new_empty(len(given.x), dtype=torch.long), given.centroids.new_empty(len(given.x))),
)
def _nearest(x: Tensor, centroids: Tensor, center: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if backends.serving(centroids, 0) == "cpp":
        return screened(x, centroids, center, basis)[:2]
    with full_precision(centroids):
        if backends.serving(centroids, 0) == "triton":
            from mfa_kernels.ops.common import triton_probe
            from mfa_kernels.ops.kmeans import triton_nearest

            rows = (x if x.dtype != torch.float64 else x.float()).contiguous()
            points, origin = centroids.contiguous(), center.float().contiguous()

            def error(found: tuple[Tensor, Tensor], before: Sequence[Tensor]) -> float | None:
                spots = spot_check.of_nearest(found, rows, points, origin)
                return None if spots is None else max(spots, triton_probe.of_device(x.device, x.shape[1]))

            trial = first_use.Trial(
                lambda: triton_nearest.nearest(rows, points, origin),
                lambda: portable.nearest(x, centroids, center.to(centroids.dtype)),
                error,
                careful=True,
            )
            shape = configs.bucket(min(len(x), 128)), configs.bucket(len(points)), x.shape[1], rows.dtype
            return first_use.served("nearest", rows, shape, trial)
        return portable.nearest(x, centroids, center.to(centroids.dtype))


@operator(
    "cluster_sums",
    "-> ()",
    {
        "x": "any(N, D)", "center": "real(D)", "owner": "int64(N)", "distance": "any(N)", "weights": "any(N)",
        "sums": "double(K, D)", "mass": "double(K)", "inertia": "double(K)",
    },
    last=("x", "owner", "distance", "weights"),
    optional=("weights",),
    written=ClusterSums._fields,
)  # fmt: skip
def _cluster_sums(
    x: Tensor, center: Tensor, owner: Tensor, distance: Tensor, weights: Tensor | None, out: ClusterSums
) -> None:
    weights = None if weights is None else weights.double()
    if backends.serving(center, 0) == "cpp":
        x, distance = x.to(center.dtype).contiguous(), distance.to(center.dtype).contiguous()
        weights = None if weights is None else weights.contiguous()
        cpp.library().cluster_sums(x, center.contiguous(), owner.contiguous(), distance, weights, *out)
        return
    check_range("cluster_sums", "owner", owner, 0, len(out.mass) + 1)
    if backends.serving(center, 0) == "triton":
        from mfa_kernels.ops.kmeans import triton_clusters

        x, distance = (x if x.dtype != torch.float64 else x.float()).contiguous(), distance.float()
        trial = first_use.Trial(
            lambda: triton_clusters.cluster_sums(x, center.contiguous(), owner, distance, weights, out),
            lambda: portable.cluster_sums(x, center, owner, distance, weights, out),
            lambda found, before: spot_check.of_sums(x, center, owner, distance, weights, out, ClusterSums(*before)),
            out,
        )
        first_use.served("cluster sums", x, (x.shape[1], x.dtype, weights is None), trial)
    else:
        portable.cluster_sums(x, center, owner, distance, weights, out)

"""Directions along which rows differ most: `nearest` reads rows along them before it reads whole rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.common import backends
from mfa_kernels.ops.common.finite import finite_rows
from mfa_kernels.ops.kmeans.op import screened

_TRIAL_ROWS = 512  # that decide how many of them pay
_PAIR_COST = 4  # of a pair measured alone, in units of a pair in a tile
WIDTHS = (16, 32, 48, 96)


@torch.no_grad()
def leading_directions(x: Tensor, center: Tensor) -> Tensor | None:
    """(D, P): the leading principal directions of the rows x (N, D) less the centre, roughly, P at most 96 and D / 2.

    None where there are too few features or rows for that.
    """
    width = min(WIDTHS[-1], x.shape[1] // 2)
    if width < WIDTHS[0]:
        return None
    x = x - center
    x = x[finite_rows(x)]
    if len(x) < 2 * width:
        return None
    # Subspace iteration: two rounds find the directions well enough, and D x D is never formed.
    generator = torch.Generator().manual_seed(0)  # whatever it draws, owners are the same
    basis = torch.randn(x.shape[1], width, generator=generator, dtype=torch.float64).to(x)
    for _ in range(2):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    # In order of variance, so that the first columns are the ones to keep.
    projected = x @ basis
    order = torch.linalg.eigh((projected.T @ projected).double()).eigenvectors.flip(1)
    return torch.linalg.qr(basis @ order.to(basis)).Q


@torch.no_grad()
def fitting_width(basis: Tensor | None, x: Tensor, centroids: Tensor, center: Tensor) -> Tensor | None:
    """The leading columns of the basis that make `nearest` fastest for rows such as x, by trial; None where none do.

    They serve the C++ kernels only.
    """
    if basis is None or backends.serving(centroids, 0) != "cpp":
        return None
    x = x[:: -(-len(x) // _TRIAL_ROWS)]
    clusters, features = centroids.shape
    least, best = float(clusters * features), None
    for width in (w for w in WIDTHS if w <= basis.shape[1]):
        pairs = screened(x, centroids, center, basis[:, :width])[2] / len(x)
        cost = features * width + clusters * (width + 1) + _PAIR_COST * features * pairs
        if cost < least:
            least, best = cost, basis[:, :width]
    return best

"""The p coordinates that the bounds read: any basis gives valid bounds, a good one gives tight ones."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.woodbury.types import Woodbury, unpack_rows

MEANS = 0.3
"""Weight of the covariance of the means beside the Gram matrix of the loadings: a choice that matters little."""


def basis(woodbury: Woodbury, weights: Tensor, features: int) -> Tensor:
    """Leading eigenvectors of 0.3 x covariance of the whitened means + Gram of the loadings, each of trace one.

    Args:
        woodbury: of a mixture with shared noise.
        weights: pi, (K,).
        features: p, coordinates to keep, at most D.

    Returns:
        Q (D, p) float64, columns orthonormal up to rounding. Costs a D x D eigenproblem: for training, keep it over
        many steps (`screen` takes it).
    """
    center = woodbury.center
    rows = unpack_rows(woodbury.rows, center.shape[0])
    means = ((rows[:, 0] - center) * woodbury.scale).nan_to_num(0, 0, 0)  # a component that is not finite has no say
    scatter = _normalised(means.mT @ (means * weights.to(means).unsqueeze(-1)))
    loadings = rows[:, 1:].flatten(0, 1).nan_to_num(0, 0, 0)
    if loadings.shape[0]:
        scatter = MEANS * scatter + _normalised(loadings.mT @ loadings)
    return torch.linalg.eigh(scatter)[1][:, -features:].flip(1).contiguous()


def _normalised(scatter: Tensor) -> Tensor:
    scatter = scatter.double()
    return scatter / scatter.trace().clamp_min(torch.finfo(torch.float64).tiny)

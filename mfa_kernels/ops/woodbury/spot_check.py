"""How far the terms of a few components are from float64: what `mfa_kernels.ops.common.first_use` asks."""

from __future__ import annotations

from torch import Tensor

from mfa_kernels.ops.common.first_use import spread, worst
from mfa_kernels.ops.woodbury.portable import portable

_ALLOWED = 256 * 2.0**-23  # of the length of a component's rows; its Cholesky factor is computed in float64


def of_factors(found: tuple[Tensor, Tensor, Tensor], means: Tensor, loadings: Tensor, noise_variance: Tensor) -> float:
    """The largest error of rows (K, Q, D), Cholesky factors (K, R, R) and log-determinants over what is allowed."""
    few = spread(len(means), means.device)
    noise = noise_variance if noise_variance.dim() == 1 else noise_variance[few]
    expected = portable(means[few].double(), loadings[few].double(), noise.double())
    errors = []
    for own, exact in zip(found, expected):
        size = 1 + (exact.abs() if exact.dim() == 1 else exact.norm(dim=-1, keepdim=True))
        errors.append(worst(own[few], exact, (_ALLOWED * size).expand_as(exact)))
    return max(errors)

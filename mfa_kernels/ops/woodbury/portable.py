"""Stage 0 in plain PyTorch, and the residuals that the plain PyTorch of other stages computes from it."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.woodbury import reference
from mfa_kernels.ops.woodbury.types import Woodbury

_CHUNK = 1 << 26  # loadings in float64 at a time


def portable(means: Tensor, loadings: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, its rows in the portable layout: mu, A, and lam where it is per component.

    In float64, as the C++ kernels: nearly collinear loadings cost M its definiteness in float32.
    """
    step = max(1, _CHUNK // max(1, loadings[0].numel()))
    noise = noise_variance.double()
    parts = [
        [t.to(means.dtype) for t in reference.woodbury(part.double(), noise if noise.dim() == 1 else own)]
        for part, own in zip(loadings.split(step), noise.expand_as(means).split(step))
    ]
    a, cholesky, log_det = (torch.cat(column) for column in zip(*parts))
    rows = [means.unsqueeze(1), a]
    if noise_variance.dim() == 2:
        rows.append(noise_variance.rsqrt().unsqueeze(1))
    return torch.cat(rows, dim=1), cholesky.contiguous(), log_det


CHUNK = 1 << 23
"""Largest number of values of any temporary."""


def residuals(x: Tensor, components: Tensor, woodbury: Woodbury) -> Tensor:
    """v = (x - mu_k) lam for pairs: x (P, D), components (P,) -> (P, D)."""
    scale = woodbury.rows[components, -1] if woodbury.per_component else woodbury.scale
    return (x - woodbury.rows[components, 0]) * scale


def explained(v: Tensor, components: Tensor, woodbury: Woodbury) -> Tensor:
    """t = A_k v for pairs: (P, D), (P,) -> (P, R)."""
    rank = woodbury.cholesky.shape[-1]
    return torch.einsum("prd,pd->pr", woodbury.rows[components, 1 : rank + 1], v)

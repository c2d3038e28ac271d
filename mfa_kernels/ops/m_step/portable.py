"""The M-step in plain PyTorch, in float64: its definition, and what serves other devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfa_kernels.ops.statistics.types import SufficientStatistics
from mfa_kernels.ops.woodbury.reference import woodbury as exact_factors
from mfa_kernels.ops.woodbury.types import Parameters


def solve(
    s: SufficientStatistics, parameters: Parameters, covariance: Tensor, strength: float, least: float,
    chunks: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Change of the means, loadings, and what they leave, as `mfa_kernels.ops.m_step.op.solve` has them."""
    rank, noise = parameters.loadings.shape[2], parameters.noise_variance.double()
    change, loadings = torch.empty_like(s.shift), torch.empty_like(parameters.loadings)
    left = torch.zeros_like(s.squares)
    identity = torch.eye(rank, dtype=torch.float64, device=noise.device)
    for k in chunks:
        old = parameters.loadings[k].double()
        scaled = old / (noise if noise.dim() == 1 else noise[k]).unsqueeze(-1)
        posterior = torch.linalg.inv(identity + old.mT @ scaled)  # M^-1
        gain = posterior @ scaled.mT  # E[z | y] = gain y
        spread = gain @ covariance
        products = torch.cat([s.cross[k] + strength * spread, s.shift[k].unsqueeze(1)], 1)  # (k, R+1, D)
        gram = torch.empty(len(k), rank + 1, rank + 1, dtype=torch.float64, device=noise.device)
        gram[:, :rank, :rank] = s.second[k] + strength * (spread @ gain.mT + posterior)
        gram[:, :rank, rank] = gram[:, rank, :rank] = s.latent[k]
        gram[:, rank, rank] = s.mass[k]
        own = s.mass[k] > least
        fitted = torch.cat([old.mT, torch.zeros_like(products[:, :1])], 1)
        fitted[own] = torch.cholesky_solve(products[own], torch.linalg.cholesky(gram[own]))
        rest = -(fitted * (2 * products - gram @ fitted)).sum(1)
        if left.dim() == 1:
            left += rest.sum(0)
        else:
            left[k] += rest
        change[k] = fitted[:, rank]
        loadings[k] = fitted[:, :rank].mT.to(loadings)
    return change, loadings, left


def explained_traces(parameters: Parameters, covariance: Tensor, chunks: Sequence[Tensor]) -> Tensor:
    """The part of tr(Psi^-1 S) that the loadings explain, (K,) float64."""
    noise, found = parameters.noise_variance.double(), []
    for k in chunks:
        psi = noise if noise.dim() == 1 else noise[k]
        rows, _, _ = exact_factors(parameters.loadings[k].double(), psi)
        rows = rows * psi.rsqrt().unsqueeze(-2)
        found.append(((rows @ covariance) * rows).sum((1, 2)))
    return torch.cat(found)

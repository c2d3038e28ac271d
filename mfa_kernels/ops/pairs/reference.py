"""Stage 2, the formulas in plain PyTorch: the oracle of tests."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.woodbury.reference import woodbury


def latents(
    x: Tensor, tokens: Tensor, components: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor
) -> Tensor:
    """E[z | x_n, k] = M_k^-1 W_k^T Psi^-1 (x_n - mu_k) for the pairs (tokens[p], components[p]).

    Args:
        x: (N, D).
        tokens, components: (P,), integer.
        means: (K, D).
        loadings: (K, D, R).
        noise_variance: (D,) or (K, D).

    Returns:
        (P, R).
    """
    rows, cholesky, _ = woodbury(loadings, noise_variance)
    scale = noise_variance.rsqrt().expand_as(means)[components]
    residual = (x[tokens] - means[components]) * scale
    explained = torch.einsum("prd,pd->pr", rows[components], residual)
    return torch.linalg.solve_triangular(cholesky[components].mT, explained.unsqueeze(-1), upper=True).squeeze(-1)


def decode(components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor) -> Tensor:
    """sum_c r_c (mu_c + W_c z_c); an empty slot has component -1.

    Args:
        components: (N, C), integer.
        responsibilities: (N, C).
        latents: (N, C, R).
        means: (K, D).
        loadings: (K, D, R).

    Returns:
        (N, D).
    """
    weight = torch.where((components < 0) & ~responsibilities.isnan(), 0, responsibilities)
    index = components.clamp_min(0)
    point = means[index] + torch.einsum("ncdr,ncr->ncd", loadings[index], latents)
    return torch.einsum("nc,ncd->nd", weight, point)

"""Stage 1, the formula in plain PyTorch: the oracle, and what ``precision="reference"`` runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.ops.woodbury.reference import woodbury


def component_log_prob(x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor) -> Tensor:
    """log N(x; mu_k, C_k) for every token and component, by Woodbury, with the N x K x D differences written out.

    Args:
        x: (N, D).
        means: (K, D).
        loadings: (K, D, R).
        noise_variance: (D,) or (K, D).

    Returns:
        (N, K).
    """
    rows, _, log_det = woodbury(loadings, noise_variance)
    residual = (x.unsqueeze(1) - means) * noise_variance.rsqrt()  # (N, K, D)
    explained = torch.einsum("nkd,krd->nkr", residual, rows)
    distance = residual.square().sum(-1) - explained.square().sum(-1)
    return -0.5 * (x.shape[-1] * math.log(2 * math.pi) + log_det + distance)


def log_prob(x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor, log_weights: Tensor) -> Tensor:
    """log p(x) (N,), by the dense N x K matrix."""
    return torch.logsumexp(log_weights + component_log_prob(x, means, loadings, noise_variance), dim=-1)

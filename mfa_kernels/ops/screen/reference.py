"""The bounds and the marginals behind them, in plain PyTorch: the oracle. See README.md in this folder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.ops.scan import reference


def bounds(
    x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor, log_weights: Tensor, basis: Tensor
) -> Tensor:
    """Upper bounds of every log pi_k + log p(x | k), from p coordinates: (N, K).

    Args:
        x: (N, D), float64.
        means: (K, D).
        loadings: (K, D, R).
        noise_variance: (D,).
        log_weights: (K,).
        basis: Q, (D, p), columns orthonormal.
    """
    scale = noise_variance.rsqrt().unsqueeze(-1)
    projection = scale * basis  # (D, p)
    marginal = (means @ projection, projection.mT @ loadings, torch.ones_like(basis[0]))
    log_det = 2 * torch.linalg.cholesky(_gram(loadings * scale)).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_det_marginal = 2 * torch.linalg.cholesky(_gram(marginal[1])).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    features, kept = basis.shape
    # log N of the marginal, its log-determinant and dimension exchanged for those of the whole.
    constants = log_det_marginal - log_det - noise_variance.log().sum() - (features - kept) * math.log(2 * math.pi)
    return log_weights + 0.5 * constants + reference.component_log_prob(x @ projection, *marginal)


def rest_bounds(
    x: Tensor,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
    basis: Tensor,
    nu: Tensor,
) -> Tensor:
    """Upper bounds of the same, (N, K), from p coordinates and the length of what is outside of them: those of the C++
    kernels before anything is rounded.

    Args:
        x, means, loadings, noise_variance, log_weights, basis: as `bounds` takes them.
        nu: larger than the part of |A_k|^2 that is outside of the basis, (K,).
    """
    scale = noise_variance.rsqrt()
    w = (loadings * scale.unsqueeze(-1)).mT
    identity = torch.eye(w.shape[1], dtype=w.dtype)
    cholesky = torch.linalg.cholesky(w @ w.mT + identity)
    a = torch.linalg.solve_triangular(cholesky, w, upper=False)
    b = a @ basis
    rest = a @ a.mT - b @ b.mT
    t = torch.linalg.solve_triangular(torch.linalg.cholesky(identity - rest / nu[:, None, None]), b, upper=False)
    log_det = 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1) + noise_variance.log().sum()
    v = (x.unsqueeze(1) - means) * scale
    inside = v @ basis
    explained = torch.einsum("nkp,krp->nkr", inside, t).square().sum(-1)
    inside = inside.square().sum(-1)
    distance = inside + (1 - nu) * (v.square().sum(-1) - inside) - explained
    return log_weights - 0.5 * (x.shape[1] * math.log(2 * math.pi) + log_det + distance)


def _gram(loadings: Tensor) -> Tensor:
    """I + W^T W, (K, R, R)."""
    return loadings.mT @ loadings + torch.eye(loadings.shape[-1], dtype=loadings.dtype, device=loadings.device)

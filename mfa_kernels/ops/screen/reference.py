"""The bounds and the marginals behind them, in plain PyTorch: the oracle. See README.md in this folder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.ops.scan import reference
from mfa_kernels.ops.woodbury.types import Woodbury


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


def _gram(loadings: Tensor) -> Tensor:
    """I + W^T W, (K, R, R)."""
    return loadings.mT @ loadings + torch.eye(loadings.shape[-1], dtype=loadings.dtype, device=loadings.device)


def marginals(
    means: Tensor, loadings: Tensor, noise_variance: Tensor, woodbury: Woodbury, basis: Tensor, rounding: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The marginals of all components on p directions, as csrc/cpu/screen/marginals.h computes them.

    Args:
        means: (K, D).
        loadings: (K, D, R).
        noise_variance: (D,).
        woodbury: of these parameters.
        basis: Q, (D, p).
        rounding: what tau is multiplied by (README.md, "Rounding").

    Returns:
        {m_k, B_k} (K, R+1, p), |lam (mu_k - c)| (K,) and the slack of B_k (K,), infinite where nothing is known of it;
        all float64.
    """
    scale = noise_variance.double().rsqrt()
    projection = scale.unsqueeze(-1) * basis.double()
    centred = means.double() - woodbury.center.double()
    sizes = woodbury.cholesky.double().square().sum(-1)  # of the whole: (L L^T)_rr = 1 + |W~_r|^2
    b, slack = _marginal(loadings.mT.double() @ projection, sizes, rounding)
    return torch.cat([(centred @ projection).unsqueeze(1), b], 1), (centred * scale).norm(dim=-1), slack


def _marginal(v: Tensor, sizes: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """B of the marginals whose loadings are v^T, both (K, R, p), and its rounding in float64 as slack (K,)."""
    count, rank, _ = v.shape
    identity = torch.eye(rank, dtype=v.dtype).expand(count, rank, rank)
    cholesky, failed = torch.linalg.cholesky_ex(v @ v.mT + identity)
    usable = (failed == 0) & cholesky.isfinite().flatten(1).all(-1) & v.isfinite().flatten(1).all(-1)
    cholesky = torch.where(usable[:, None, None], cholesky, identity)
    inverse = torch.linalg.solve_triangular(cholesky, identity, upper=False)
    # tau (README): what rounding is multiplied by when loadings are nearly collinear. Where it leaves nothing, or there
    # is no factorisation, nothing is known of the component, and it is never dropped.
    tau = (sizes * inverse.square().sum(1)).sum(-1)
    usable &= rounding * tau < 0.5
    v = torch.where(usable[:, None, None], v, 0)
    b = torch.linalg.solve_triangular(cholesky, v, upper=False)
    return b, torch.where(usable, rounding * tau, torch.inf)

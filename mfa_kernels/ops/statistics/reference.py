"""EM's sufficient statistics by their definition, with every covariance written out: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def statistics(
    x: Tensor, responsibilities: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor
) -> tuple[Tensor, ...]:
    """mass, shift, latent, second, cross, squares: see `mfa_kernels.ops.statistics.op.Statistics`.

    Args:
        x: (N, D).
        responsibilities: (N, K), times the weight of the token where tokens have one.
        means: (K, D).
        loadings: (K, D, R).
        noise_variance: (D,) or (K, D).
    """
    shared = noise_variance.dim() == 1
    covariance = loadings @ loadings.mT + torch.diag_embed(noise_variance.expand_as(means))  # (K, D, D)
    gain = torch.cholesky_solve(loadings, torch.linalg.cholesky(covariance)).mT  # W^T C^-1, (K, R, D)
    y = x.unsqueeze(1) - means  # (N, K, D)
    z = torch.einsum("krd,nkd->nkr", gain, y)
    posterior = torch.eye(loadings.shape[2], dtype=x.dtype, device=x.device) - gain @ loadings  # Cov[z | x, k]
    mass = responsibilities.sum(0)
    return (
        mass,
        torch.einsum("nk,nkd->kd", responsibilities, y),
        torch.einsum("nk,nkr->kr", responsibilities, z),
        torch.einsum("nk,nkr,nks->krs", responsibilities, z, z) + mass[:, None, None] * posterior,
        torch.einsum("nk,nkr,nkd->krd", responsibilities, z, y),
        torch.einsum("nk,nkd->d" if shared else "nk,nkd->kd", responsibilities, y.square()),
    )

"""Stage 0, the formula in plain PyTorch: the oracle. See README.md in this folder."""

from __future__ import annotations

import torch
from torch import Tensor


def factors(loadings: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Woodbury factors of C_k = W_k W_k^T + Psi.

    Args:
        loadings: W, (K, D, R).
        noise_variance: Psi, (D,) or (K, D), positive.

    Returns:
        A = L^-1 W^T Psi^-1/2 (K, R, D), the Cholesky factor L of I + W^T Psi^-1 W (K, R, R), and log|C| (K,).
    """
    components, _, rank = loadings.shape
    whitened = loadings * noise_variance.rsqrt().unsqueeze(-1)
    gram = whitened.mT @ whitened
    cholesky = torch.linalg.cholesky(gram + torch.eye(rank, dtype=gram.dtype, device=gram.device))
    rows = torch.linalg.solve_triangular(cholesky, whitened.mT, upper=False)
    log_noise = noise_variance.log().sum(-1).expand(components)
    log_det = log_noise + 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return rows, cholesky, log_det

"""Stage 0, the formula in plain PyTorch: the oracle. See README.md in this folder."""

from __future__ import annotations

import torch
from torch import Tensor

_LOST = 2.0**-14
"""Largest share of a pivot of M that rounding may have; beyond it, L comes from the loadings themselves."""


def woodbury(loadings: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the Woodbury terms of C_k = W_k W_k^T + Psi.

    Args:
        loadings: W, (K, D, R).
        noise_variance: Psi, (D,) or (K, D), positive.

    Returns:
        A = L^-1 W^T Psi^-1/2 (K, R, D), the Cholesky factor L of I + W^T Psi^-1 W (K, R, R), and log|C| (K,).
    """
    components, _, rank = loadings.shape
    whitened = loadings * noise_variance.rsqrt().unsqueeze(-1)
    gram = whitened.mT @ whitened
    gram = gram + torch.eye(rank, dtype=gram.dtype, device=gram.device)
    if torch.compiler.is_compiling():  # which takes no branch that depends on values
        cholesky = torch.linalg.cholesky(gram)
        rows = torch.linalg.solve_triangular(cholesky, whitened.mT, upper=False)
    else:
        rows, cholesky = _factorised(whitened, gram)
    log_noise = noise_variance.log().sum(-1).expand(components)
    log_det = log_noise + 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return rows, cholesky, log_det


def _factorised(whitened: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """A and L, from W~ (K, D, R) and M (K, R, R).

    Where loadings are nearly collinear, little is left of a pivot: whether M has a Cholesky factor is then a matter of
    rounding, which differs between machines. There, L^T is the triangle of a QR decomposition of W~ on top of I, whose
    Gram matrix M is, and A^T the upper part of its orthonormal columns: nothing cancels, and nothing fails.
    """
    rank = gram.shape[-1]
    cholesky, failed = torch.linalg.cholesky_ex(gram)
    with torch.no_grad():
        pivots = cholesky.diagonal(dim1=-2, dim2=-1).square()
        kept = (torch.finfo(gram.dtype).eps * gram.diagonal(dim1=-2, dim2=-1) < _LOST * pivots).all(-1) & (failed == 0)
    if kept.all():
        return torch.linalg.solve_triangular(cholesky, whitened.mT, upper=False), cholesky
    some = ~kept
    identity = torch.eye(rank, dtype=gram.dtype, device=gram.device).expand(int(some.sum()), rank, rank)
    columns, triangle = torch.linalg.qr(torch.cat([whitened[some], identity], 1))
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(gram.dtype)  # L has a positive diagonal
    others, _ = torch.linalg.cholesky_ex(gram[kept])
    rows, lower = torch.empty_like(whitened.mT), torch.empty_like(gram)
    rows = rows.index_put((kept,), torch.linalg.solve_triangular(others, whitened[kept].mT, upper=False))
    lower = lower.index_put((kept,), others)
    rows = rows.index_put((some,), (columns[:, : whitened.shape[1]] * signs.unsqueeze(1)).mT)
    return rows, lower.index_put((some,), (triangle * signs.unsqueeze(-1)).mT)

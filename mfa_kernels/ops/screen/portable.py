"""Stage 0 of screening in plain PyTorch, float64: what csrc/cpu/screen/marginals.h computes, and is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.woodbury.types import Woodbury

_CHUNK = 1 << 23  # largest number of values of a temporary


def marginals(
    means: Tensor, loadings: Tensor, noise_variance: Tensor, woodbury: Woodbury, basis: Tensor, rounding: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The marginals of all components on p directions.

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
    count, features, rank = loadings.shape
    scale = noise_variance.double().rsqrt()
    projection = scale.unsqueeze(-1) * basis.double()
    rows = basis.new_empty(count, rank + 1, basis.shape[1], dtype=torch.float64)
    radii, slack = torch.empty(2, count, dtype=torch.float64)
    step = max(1, _CHUNK // (features * (rank + 1)))
    for begin in range(0, count, step):
        chunk = slice(begin, begin + step)
        centred = means[chunk].double() - woodbury.center.double()
        v = loadings[chunk].mT.flatten(0, 1).double() @ projection
        sizes = woodbury.cholesky[chunk].double().square().sum(-1)  # of the whole: (L L^T)_rr = 1 + |W~_r|^2
        rows[chunk, 0] = centred @ projection
        rows[chunk, 1:], slack[chunk] = _marginal(v.unflatten(0, sizes.shape), sizes, rounding)
        radii[chunk] = (centred * scale).norm(dim=-1)
    return rows, radii, slack


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

"""Stage 0 in Triton, for GPUs whose machine has no nvcc: parameters -> rows, Cholesky factors, log-determinants.

Symbols as in csrc/cuda/woodbury.cuh: M = I + W~^T W~ = L L^T, A = L^-1 W~^T, W~ = lam W. A program owns a component.
Products, factorisation and substitution are in float64: nearly collinear loadings cost M its definiteness otherwise.
M and L (R x R, padded to a power of two) stay in registers; one of their rows or columns is a masked sum, since Triton
has no indices into a block. The loadings are read twice, and a column at a time once more from the first-level cache.

Floor: K D (3 R + 2) values, read and written; 2 K D R P double multiply-adds, P the padded rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST_WIDTH, _WIDTH = 16, 64  # features at a time


@triton.jit
def woodbury_kernel(
    p_means,  # (K, D) fp32
    p_loadings,  # (K, D, R)
    p_noise,  # (D,) or (K, D)
    p_rows,  # (K, R + 1 (+ 1), D)
    p_cholesky,  # (K, R, R)
    p_log_det,  # (K,)
    D,
    R: tl.constexpr,
    RP: tl.constexpr,
    BD: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    p_means += k * D
    p_loadings += k * D * R
    p_noise += k * D * PER_COMPONENT
    p_rows += k * (R + 1 + PER_COMPONENT) * D
    o_r = tl.arange(0, RP)
    m_r = o_r < R
    is_diagonal = o_r[:, None] == o_r[None, :]

    b_gram = is_diagonal.to(tl.float64)
    b_log = tl.zeros([BD], tl.float64)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m_d = o_d < D
        b_noise = tl.load(p_noise + o_d, m_d, 1.0).to(tl.float64)
        b_log += tl.log(b_noise)
        b_w = tl.load(p_loadings + o_d[:, None] * R + o_r[None, :], m_d[:, None] & m_r[None, :], 0.0)
        b_w = b_w.to(tl.float64) / b_noise[:, None]
        for s in range(R):
            b_column = tl.load(p_loadings + o_d * R + s, m_d, 0.0).to(tl.float64)
            b_sums = tl.sum(b_w * b_column[:, None], 0)
            b_gram += tl.where(o_r[:, None] == s, b_sums[None, :], 0.0)

    # M = L L^T, a column after the other. A pivot below 1 is rounding; one that is NaN stays so.
    b_lower = tl.zeros([RP, RP], tl.float64)
    b_log_det = tl.sum(b_log, 0)
    for j in range(R):
        b_column = tl.sum(tl.where(o_r[None, :] == j, b_gram, 0.0), 1)
        square = tl.sum(tl.where(o_r == j, b_column, 0.0), 0)
        pivot = tl.sqrt(tl.where(square < 1.0, 1.0, square))
        b_log_det += 2 * tl.log(pivot)
        b_column = tl.where(o_r > j, b_column / pivot, tl.where(o_r == j, pivot, 0.0))
        b_row = tl.sum(tl.where(is_diagonal, b_column[:, None], 0.0), 0)  # the same along the other axis
        b_gram -= b_column[:, None] * b_row[None, :]
        b_lower += tl.where(o_r[None, :] == j, b_column[:, None], 0.0)
    tl.store(p_log_det + k, b_log_det)
    m_lower = m_r[:, None] & m_r[None, :]
    tl.store(p_cholesky + k * R * R + o_r[:, None] * R + o_r[None, :], b_lower, m_lower)

    # L^-1, a row after the other.
    b_inverse = tl.zeros([RP, RP], tl.float64)
    for j in range(R):
        b_row = tl.sum(tl.where(o_r[:, None] == j, b_lower, 0.0), 0)
        pivot = tl.sum(tl.where(o_r == j, b_row, 0.0), 0)
        b_factor = tl.sum(tl.where(is_diagonal & (o_r[None, :] < j), b_row[None, :], 0.0), 1)
        b_solved = ((o_r == j).to(tl.float64) - tl.sum(b_factor[:, None] * b_inverse, 0)) / pivot
        b_inverse += tl.where(o_r[:, None] == j, b_solved[None, :], 0.0)

    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m_d = o_d < D
        b_lam = 1 / tl.sqrt(tl.load(p_noise + o_d, m_d, 1.0).to(tl.float64))
        b_a = tl.zeros([RP, BD], tl.float64)
        for s in range(R):
            b_factor = tl.sum(tl.where(o_r[None, :] == s, b_inverse, 0.0), 1)
            b_column = tl.load(p_loadings + o_d * R + s, m_d, 0.0).to(tl.float64) * b_lam
            b_a += b_factor[:, None] * b_column[None, :]
        p_own = p_rows + (1 + o_r[:, None]) * D + o_d[None, :]
        tl.store(p_own, b_a.to(tl.float32), m_r[:, None] & m_d[None, :])
        tl.store(p_rows + o_d, tl.load(p_means + o_d, m_d, 0.0), m_d)
        if PER_COMPONENT:
            tl.store(p_rows + (R + 1) * D + o_d, b_lam.to(tl.float32), m_d)


def woodbury(means: Tensor, loadings: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows in the portable layout (K, R + 1 (+ 1), D), Cholesky factors (K, R, R), log-determinants (K,).

    Args:
        means: (K, D), float32.
        loadings: (K, D, R), R from 1 to `TRITON_RANK`.
        noise_variance: (D,) or (K, D).
    """
    components, features, rank = loadings.shape
    per_component = noise_variance.dim() == 2
    rows = means.new_empty(components, rank + 1 + per_component, features)
    cholesky, log_det = means.new_empty(components, rank, rank), means.new_empty(components)
    padded = max(4, triton.next_power_of_2(rank))  # less comes out with spills for sm_80
    operands = (t.contiguous() for t in (means, loadings, noise_variance))
    with torch.cuda.device_of(means):
        woodbury_kernel[(components,)](
            *operands, rows, cholesky, log_det, features, R=rank, RP=padded,
            BD=max(_LEAST_WIDTH, min(_WIDTH, 1024 // padded)), PER_COMPONENT=per_component, num_warps=4,
        )  # fmt: skip
    return rows, cholesky, log_det

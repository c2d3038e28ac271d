"""Coordinates for screening: y = sigma Q^T lam (x - c), from tokens and a basis in fp16.

A program owns BN tokens x BP coordinates. The basis *is* its fp16 values, whatever it was rounded from (screen/GPU.md),
and how far the tokens are from theirs was measured (common/triton_tokens.py); what is left is the rounding of sums of
D' products. It enters a bound times |Q|_F, so sums are kept short: each product of BD features is added to the result
by itself, outside of the matrix unit's accumulator:

    |y^ - y|  <=  sigma |Q|_2 eta + 2^-23 (BD + D' / BD + 8) sigma |Q|_F (a + eta)

Never materialised: whitened tokens in fp32. Floor: 2 N D p flops, p / (K (R + 1)) of the dense scan; tokens read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common.triton_tokens import Tokens

FEATURES = 64
"""BD, features between additions to the result; D' and p' are multiples of it."""
_TOKENS = 64
"""BN, fewer where there are fewer tokens."""


@triton.jit
def project_kernel(
    p_tokens,  # (N, D') fp16
    p_basis,  # (p', D') fp16: Q^T
    p_scales,  # (N,): powers of two
    p_sigma,  # (1,)
    p_y,  # (N, p')
    N,
    PADDED,
    KEPT,
    BN: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    i_n, i_p = tl.program_id(0), tl.program_id(1)
    # Tokens beyond the end repeat the last one, so that the loop needs no mask.
    o_n = tl.minimum(i_n * BN + tl.arange(0, BN), N - 1).to(tl.int64)
    o_p = i_p * BP + tl.arange(0, BP)
    b_s = tl.load(p_scales + o_n)[:, None]  # [BN, 1]
    b_y = tl.zeros([BN, BP], tl.float32)
    for d in range(0, PADDED, BD):
        o_d = d + tl.arange(0, BD)
        b_x = tl.load(p_tokens + o_n[:, None] * PADDED + o_d[None, :])  # [BN, BD]
        b_q = tl.load(p_basis + o_p.to(tl.int64)[:, None] * PADDED + o_d[None, :])  # [BP, BD]
        # The factor, which is exact, keeps the compiler from adding up inside of the matrix unit.
        b_y += b_s * tl.dot(b_x, tl.trans(b_q), out_dtype=tl.float32)
    m_n = i_n * BN + tl.arange(0, BN) < N
    tl.store(p_y + o_n[:, None] * KEPT + o_p[None, :], b_y * tl.load(p_sigma), m_n[:, None])


def project(tokens: Tokens, basis: Tensor, sigma: Tensor) -> Tensor:
    """Returns y (N, p') float32, for a basis (p', D') fp16 and sigma (1,)."""
    count, padded = tokens.tokens.shape
    kept = basis.shape[0]
    y = tokens.scales.new_empty(count, kept)
    block = min(_TOKENS, max(16, triton.next_power_of_2(count)))
    sizes = {"N": count, "PADDED": padded, "KEPT": kept, "BN": block, "BP": FEATURES, "BD": FEATURES}
    project_kernel[(triton.cdiv(count, block), kept // FEATURES)](
        tokens.tokens, basis, tokens.scales, sigma, y, **sizes, num_warps=4, num_stages=3
    )
    return y


def sum_error(padded: int) -> float:
    """Error of a coordinate, relative to |Q|_F (a + eta): additions, of at most 2^-23 each, and the scaling."""
    return (FEATURES + padded // FEATURES + 8) * 2.0**-23

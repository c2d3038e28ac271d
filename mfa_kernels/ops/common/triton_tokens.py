"""Tokens for the GPU scan: centred, whitened, scaled and rounded to fp16; the rounding is measured.

    y_n = s (x_n - c);    tokens_n = fp16(y_n / s_n),  s_n the power of two that brings the largest |y| into [32, 64)
    a_n >= |y_n|,   eta_n >= |y_n - s_n tokens_n|,   psi_n >= sum_d |y^2 - s_n^2 squares|

A program owns one token. Floor: x read twice, half its size written. That is little next to the scan, whose inner loop
then needs no masks, scales or conversions. A token that is not finite gets a_n = NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common.triton_fp16 import TINY, power_of_two, slack


class Tokens(NamedTuple):
    """The scan's view of the tokens.

    Attributes:
        tokens: (N, D') fp16.
        squares: (N, D') fp16, tokens^2; None unless the noise is per component.
        scales: s_n, (N,).
        norms: (3, N): a, eta, psi.
        length: |y_n|^2, (N,), as float32 sums it.
    """

    tokens: Tensor
    squares: Tensor | None
    scales: Tensor
    norms: Tensor
    length: Tensor


@triton.jit
def tokens_kernel(
    p_x,  # (N, D)
    p_scale,  # (D,)
    p_center,  # (D,)
    p_tokens,  # (N, D') fp16
    p_squares,  # (N, D') fp16
    p_scales,  # (N,)
    p_norms,  # (3, N)
    p_length,  # (N,)
    N,
    D,
    PADDED,
    SLACK: tl.constexpr,
    TINY: tl.constexpr,
    BD: tl.constexpr,
    SQUARES: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    b_largest = tl.zeros([BD], tl.float32)
    b_length = tl.zeros([BD], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_x = tl.load(p_x + i_n * D + o_d, m_d, 0.0).to(tl.float32)
        b_y = tl.load(p_scale + o_d, m_d, 0.0) * (b_x - tl.load(p_center + o_d, m_d, 0.0))
        b_largest = tl.maximum(b_largest, tl.abs(b_y))
        b_length += b_y * b_y  # the sum keeps NaN and infinity, which a maximum could drop
    b_s = power_of_two(tl.max(b_largest, 0))

    b_eta = tl.zeros([BD], tl.float32)
    b_psi = tl.zeros([BD], tl.float32)
    for i_d in range(0, PADDED, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_x = tl.load(p_x + i_n * D + o_d, m_d, 0.0).to(tl.float32)
        b_y = tl.load(p_scale + o_d, m_d, 0.0) * (b_x - tl.load(p_center + o_d, m_d, 0.0))
        b_y16 = (b_y / b_s).to(tl.float16)
        tl.store(p_tokens + i_n * PADDED + o_d, b_y16, o_d < PADDED)
        b_error = b_y - b_y16.to(tl.float32) * b_s
        b_eta += b_error * b_error
        if SQUARES:
            b_square = (b_y16.to(tl.float32) * b_y16.to(tl.float32)).to(tl.float16)
            tl.store(p_squares + i_n * PADDED + o_d, b_square, o_d < PADDED)
            b_psi += tl.abs(b_y * b_y - b_square.to(tl.float32) * (b_s * b_s))
    b_length = tl.sum(b_length, 0)
    b_a = tl.sqrt(b_length) * SLACK
    tl.store(p_scales + i_n, b_s)
    tl.store(p_length + i_n, b_length)
    tl.store(p_norms + i_n, b_a)
    # TINY covers the two roundings of y in float32, before the one to fp16.
    tl.store(p_norms + N + i_n, tl.sqrt(tl.sum(b_eta, 0)) * SLACK + b_a * TINY)
    tl.store(p_norms + 2 * N + i_n, tl.sum(b_psi, 0) * SLACK + b_a * b_a * TINY)


def scan_tokens(x: Tensor, scale: Tensor, center: Tensor, padded: int, squares: bool) -> Tokens:
    """Rounds x (N, D), contiguous, of any float dtype; `scale` is s and `padded` is D' of the rows."""
    count, features = x.shape
    new = scale.new_empty
    out = Tokens(
        x.new_empty(count, padded, dtype=torch.float16),
        x.new_empty(count, padded, dtype=torch.float16) if squares else None,
        new(count),
        new(3, count),
        new(count),
    )
    sizes = {"N": count, "D": features, "PADDED": padded, "BD": min(1024, triton.next_power_of_2(padded))}
    room = (out.tokens, out.squares if squares else out.tokens, *out[2:])
    tokens_kernel[(count,)](
        x, scale, center, *room, **sizes, SLACK=slack(features), TINY=TINY, SQUARES=squares, num_warps=4
    )
    return out

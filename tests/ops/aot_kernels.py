"""Kernels with known machine code, for the test of bench.aot: on the matrix units, off them, spilling, broken."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def scan_kernel(p_a, p_b, p_out, D, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    o_n, o_k = tl.arange(0, BN), tl.arange(0, BK)
    b_out = tl.zeros([BN, BK], tl.float32)  # [BN, BK]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_a = tl.load(p_a + o_n[:, None] * D + o_d[None, :])  # [BN, BD]
        b_b = tl.load(p_b + o_k[:, None] * D + o_d[None, :])  # [BK, BD]
        b_out = tl.dot(b_a, b_b.T, b_out)
    tl.store(p_out + o_n[:, None] * BK + o_k[None, :], b_out)


@triton.jit
def scan_in_fp32_kernel(p_a, p_b, p_out, D, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    o_n, o_k, o_d = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BD)
    b_a = tl.load(p_a + o_n[:, None] * D + o_d[None, :])  # [BN, BD]
    b_b = tl.load(p_b + o_k[:, None] * D + o_d[None, :])  # [BK, BD]
    tl.store(p_out + o_n[:, None] * BK + o_k[None, :], tl.dot(b_a, b_b.T, input_precision="ieee"))


@triton.jit
def forgotten_kernel(p_out):
    tl.store(p_out, 1.0)


def launch(kernel, dtype, tokens, components, features, warps, stages):
    a = torch.empty(tokens, 4096, dtype=dtype, device="meta")
    b, out = a.new_empty(components, 4096), a.new_empty(tokens, components, dtype=torch.float32)
    tiles = {"BN": tokens, "BK": components, "BD": features}
    kernel[(1,)](a, b, out, D=4096, **tiles, num_warps=warps, num_stages=stages)


def calls(*shape):
    call, bfloat16 = functools.partial, torch.bfloat16
    return {
        "": call(launch, scan_kernel, bfloat16, 128, 128, 64, warps=8, stages=4),
        "float32": call(launch, scan_in_fp32_kernel, torch.float32, 16, 16, 32, warps=4, stages=1),
        # 32 K accumulators on 128 threads: every register there is.
        "spilling": call(launch, scan_kernel, bfloat16, 256, 128, 64, warps=4, stages=1),
        "too large": call(launch, scan_kernel, bfloat16, 64, 128, 512, warps=8, stages=2),
        "broken": call(launch, scan_kernel, bfloat16, 128, 128, 48, warps=8, stages=4),
    }

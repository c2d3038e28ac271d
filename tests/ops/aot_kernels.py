"""Kernels with known machine code, for the test of bench.aot: on the matrix units, beside them, spilling, broken."""

from __future__ import annotations

import triton
import triton.language as tl

from mfa_kernels.ops.common.configs import Scan


@triton.jit
def product(p_a, p_b, p_out, D, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    o_n, o_k = tl.arange(0, BN), tl.arange(0, BK)
    b_out = tl.zeros([BN, BK], tl.float32)  # [BN, BK]
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_a = tl.load(p_a + o_n[:, None] * D + o_d[None, :])  # [BN, BD]
        b_b = tl.load(p_b + o_k[:, None] * D + o_d[None, :])  # [BK, BD]
        b_out = tl.dot(b_a, b_b.T, b_out)
    tl.store(p_out + o_n[:, None] * BK + o_k[None, :], b_out)


@triton.jit
def exact_product(p_a, p_b, p_out, D, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    o_n, o_k, o_d = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BD)
    b_a = tl.load(p_a + o_n[:, None] * D + o_d[None, :])  # [BN, BD]
    b_b = tl.load(p_b + o_k[:, None] * D + o_d[None, :])  # [BK, BD]
    tl.store(p_out + o_n[:, None] * BK + o_k[None, :], tl.dot(b_a, b_b.T, input_precision="ieee"))


@triton.jit
def unlisted(p_out):
    tl.store(p_out, 1.0)


def launch(a, b, out):
    product[(1,)](a, b, out, a.shape[1], 128, 128, 64)
    unlisted[(1,)](out)


def ahead_of_time(config: Scan):
    types = {"p_a": "*bf16", "p_b": "*bf16", "p_out": "*fp32", "D": "i32:16"}
    narrow = types | {"p_a": "*fp32", "p_b": "*fp32", "D": "i32"}
    tiles = {"BN": 128, "BK": 128, "BD": 64}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return [
        ("scan_product", product, types, tiles, options),
        ("scan_in_fp32", exact_product, narrow, {"BN": 16, "BK": 16, "BD": 32}, {"num_warps": 4, "num_stages": 1}),
        # 32 K accumulators on 128 threads: every register there is.
        ("spilling", product, types, {"BN": 256, "BK": 128, "BD": 64}, {"num_warps": 4, "num_stages": 1}),
        ("too_large", product, types, tiles | {"BN": 64, "BD": 512}, {"num_warps": 8, "num_stages": 2}),
        ("broken", product, types, tiles | {"BD": 48}, options),
    ]

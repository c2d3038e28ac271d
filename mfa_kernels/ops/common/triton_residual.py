"""Residuals of some tokens against one component, and z = L^-T t: the inner loop of pair kernels.

    v = (x_n - mu_k) lam_k,   |v|^2,   t = A_k v

Never materialised: v, which lives in registers. x - mu is formed in float32 before anything is scaled or squared, so
nothing cancels wherever a region lies. A tile is [tokens, rows, features], with every thread of the program along the
features: a thread multiplies the values that it loaded itself, in float32, without a matrix unit, and the lanes are
added as a tree at the end (pairs/README.md).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mfa_kernels.ops.common import configs

_ACCUMULATORS = 64
"""Registers per thread that may hold partial sums: a quarter of all."""


def rank_tile(rank: int, tokens: int, features: int, warps: int) -> int:
    """Rows of A_k per pass, a power of two: as many as keep the partial sums of a tile in registers."""
    lanes = max(1, features // (32 * warps))
    room = max(1, _ACCUMULATORS // (tokens * lanes))
    return min(triton.next_power_of_2(max(1, rank)), 1 << (room.bit_length() - 1))


def vector(features: int, warps: int) -> int:
    """Neighbouring features per thread: at most a load of 16 bytes, and few enough to give every thread some."""
    return max(1, min(4, features // (32 * warps)))


def project_tiles(config: configs.Pairs | configs.AllLogits, rank: int, tokens: int) -> dict[str, int]:
    """Constants of a kernel that calls `project` for so many tokens at a time."""
    rows = rank_tile(rank, tokens, config.features, config.warps)
    tiles = {"BR": rows, "BD": config.features, "VEC": vector(config.features, config.warps)}
    return {**tiles, "STAGES": config.stages, "num_warps": config.warps}


def component_tiles(config: configs.Pairs, rank: int) -> dict[str, int]:
    """Tiles for the registers, which hold all R rows of a component: more rows mean fewer features and pairs."""
    rows = triton.next_power_of_2(max(1, rank))
    features = min(config.features, 32 * config.warps * max(1, 32 // rows))
    pairs = max(1, min(config.pairs, 64 // rows))
    return {"BP": pairs, "BR": rows, "BD": features, "VEC": vector(features, config.warps), "num_warps": config.warps}


@triton.jit
def load_residual(
    p_x,  # [B, 1, 1] addresses of rows of x
    m_x,  # [B, 1, 1]
    p_rows,  # mu_k, A_k (and lam_k) of one component
    p_scale,  # (D,) lam, where the components share it
    o_d,  # [1, 1, BD]
    D,
    R: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
):
    """v = (x - mu_k) lam_k [B, 1, BD] and lam_k [1, 1, BD]; both zero beyond D."""
    m_d = o_d < D
    b_mean = tl.load(p_rows + o_d, mask=m_d, other=0.0)  # [1, 1, BD]
    if PER_COMPONENT:
        p_scale = p_rows + (R + 1) * D
    b_scale = tl.load(p_scale + o_d, mask=m_d, other=0.0)  # [1, 1, BD]
    b_x = tl.load(p_x + o_d, mask=m_x & m_d, other=0.0).to(tl.float32)  # [B, 1, BD]
    return (b_x - b_mean) * b_scale, b_scale


@triton.jit
def load_explaining(p_rows, o_r, o_d, D, R: tl.constexpr):
    """Rows o_r [1, BR, 1] of A_k at features o_d [1, 1, BD]: [1, BR, BD], zero beyond R and D."""
    return tl.load(p_rows + (1 + o_r) * D + o_d, mask=(o_r < R) & (o_d < D), other=0.0)


@triton.jit
def feature_offsets(d0, BD: tl.constexpr, VEC: tl.constexpr):
    """d0, ..., d0 + BD - 1 as [1, 1, BD].

    The hint keeps loads of every dtype equally wide: bfloat16 loads would otherwise be twice as wide as float32 ones,
    and their tiles would have to be carried from one thread to another.
    """
    return tl.max_contiguous(d0 + tl.arange(0, BD), VEC)[None, None, :]


@triton.jit
def project(
    p_x,  # [B, 1, 1] addresses of rows of x
    m_x,  # [B, 1, 1]
    p_rows,  # mu_k, A_k (and lam_k) of one component
    p_scale,  # (D,)
    r0,
    D,
    R: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
    B: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """|v|^2 [B], and rows r0, ..., r0 + BR - 1 of t [B, BR], zero beyond R."""
    o_r = r0 + tl.arange(0, BR)[None, :, None]  # [1, BR, 1]
    b_square = tl.zeros([B, 1, BD], dtype=tl.float32)
    b_t = tl.zeros([B, BR, BD], dtype=tl.float32)
    for d0 in tl.range(0, D, BD, num_stages=STAGES):
        o_d = feature_offsets(d0, BD, VEC)
        b_v, _ = load_residual(p_x, m_x, p_rows, p_scale, o_d, D, R, PER_COMPONENT)  # [B, 1, BD]
        b_square += b_v * b_v
        b_t += b_v * load_explaining(p_rows, o_r, o_d, D, R)
    return tl.sum(tl.sum(b_square, axis=2), axis=1), tl.sum(b_t, axis=2)


@triton.jit
def back_substitute(b, p_cholesky, o_r, R: tl.constexpr):
    """Solves L^T z = b along the middle axis of a tile [X, BR, Y]: the same recurrence as Z L = B by rows.

    By substitution in the dtype of b, which is as accurate as the factor itself, instead of through an inverse. The
    diagonal of L is at least 1. p_cholesky points to L_k, or to one per row, [X, 1, 1]; o_r is [1, BR, 1]; b is zero
    beyond R.
    """
    for i in range(0, R):
        r = R - 1 - i
        p_row = p_cholesky + r * R
        b_z = tl.sum(tl.where(o_r == r, b, 0.0), axis=1, keep_dims=True)  # [X, 1, Y]
        b_z *= 1.0 / tl.load(p_row + r).to(b.dtype)
        b = tl.where(o_r == r, b_z, b - tl.load(p_row + o_r, mask=o_r < r, other=0.0) * b_z)
    return b

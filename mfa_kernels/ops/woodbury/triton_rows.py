"""Rows of every component in fp16 for the GPU scan, and the distances that rounding moved them.

Symbols (component k, centre c, reference scale s; shared noise: s = lam, rho = 1; else rho_k = lam_k / s):

    m_k = s (mu_k - c)          whitened mean                       (D)
    B_k = rho_k A_k             rows of the explained part          (R, D)
    w_k = rho_k^2               weights of the squares              (D), noise per component only

    |v|^2 = sum_d w y^2 - 2 (w m).y + sum_d w m^2,    t = B y - B m,    y = s (x - c)

`rows` holds, for every tile of 64 components, B_0 .. B_{R-1}, then w m, then w: 64 rows each, so that several products
of one tile are one block of memory and one matrix product. They are divided by powers of two, so that fp16 neither
overflows nor loses small values. fp16 rather than bf16: whitened and scaled values need no range, and three more bits
make every bound eight times tighter. The distances to the fp32 values are measured here, not assumed: `bounds` is what
makes the scan rigorous (scan/triton_scan.py). Products with m are summed in float64.

A program owns one row each of 8 components, and reads it once (w m and w twice: their largest values are needed first).
Floor: the rows read as fp32 and written as fp16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common.triton_fp16 import FEATURES, TINY, power_of_two, slack, sum_error
from mfa_kernels.ops.woodbury.types import ScanRows, Woodbury

TILE = 64  # components
BOUNDS = 7
_BLOCK = 8  # components of a program


@triton.jit
def _load(p_k, p_scale, p_reciprocal, p_center, g, o_d, m_k, D, R: tl.constexpr, PER_COMPONENT: tl.constexpr):
    """Row g of the scan (B_g, w m or w) and m: [BK, BD] each, 0 beyond D. p_k is [BK, 1], o_d [1, BD]."""
    m_d = o_d < D
    m = m_k & m_d
    b_scale = tl.load(p_scale + o_d, m_d, 0.0)
    b_m = (tl.load(p_k + o_d, m, 0.0) - tl.load(p_center + o_d, m_d, 0.0)) * b_scale
    b_rho = m.to(tl.float32)
    if PER_COMPONENT:
        b_rho = tl.load(p_k + (R + 1) * D + o_d, m, 0.0) * tl.load(p_reciprocal + o_d, m_d, 0.0)
    b_a = tl.load(p_k + (1 + g) * D + o_d, m & (g < R), 0.0)
    b_w = b_rho * b_rho
    return tl.where(g < R, b_a * b_rho, tl.where(g == R, b_w * b_m, b_w)), b_m


@triton.jit
def rows_kernel(
    p_rows,  # (K, R + 1 (+ 1), D) fp32
    p_scale,  # (D,) s
    p_reciprocal,  # (D,) 1 / s
    p_center,  # (D,)
    p_beta,  # (K,): the scales of B
    p_out,  # (tiles, G, TILE, D') fp16
    p_scales,  # (G, K)
    p_errors,  # (2, G, K): |row - value|, max_d |row - value|
    p_sizes,  # (2, G, K): |value|, max_d |value|
    p_products,  # (G, K) fp64: value . m
    p_lengths,  # (K,): |m|
    K,
    D,
    PADDED,
    TILE: tl.constexpr,
    R: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
):
    GROUPS: tl.constexpr = R + 1 + PER_COMPONENT
    g = tl.program_id(0) % GROUPS
    o_k = tl.program_id(0) // GROUPS * BK + tl.arange(0, BK)  # [BK]
    m_k = o_k < K
    p_k = p_rows + o_k.to(tl.int64)[:, None] * (GROUPS * D)  # [BK, 1]
    p_own = p_out + ((o_k // TILE * GROUPS + g) * TILE + o_k % TILE).to(tl.int64)[:, None] * PADDED

    b_scale = tl.load(p_beta + o_k, m_k, 1.0)
    if g >= R:
        b_largest = tl.zeros([BK, BD], tl.float32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)[None, :]
            b_value, b_m = _load(p_k, p_scale, p_reciprocal, p_center, g, o_d, m_k[:, None], D, R, PER_COMPONENT)
            b_largest = tl.maximum(b_largest, tl.abs(b_value))
        b_scale = power_of_two(tl.max(b_largest, 1))

    b_error = tl.zeros([BK, BD], tl.float32)
    b_error_max = tl.zeros([BK, BD], tl.float32)
    b_size = tl.zeros([BK, BD], tl.float32)
    b_size_max = tl.zeros([BK, BD], tl.float32)
    b_product = tl.zeros([BK, BD], tl.float64)
    b_length = tl.zeros([BK, BD], tl.float32)
    for d in range(0, PADDED, BD):
        o_d = d + tl.arange(0, BD)[None, :]
        b_value, b_m = _load(p_k, p_scale, p_reciprocal, p_center, g, o_d, m_k[:, None], D, R, PER_COMPONENT)
        b_half = (b_value / b_scale[:, None]).to(tl.float16)
        tl.store(p_own + o_d, b_half, m_k[:, None] & (o_d < PADDED))
        b_off = tl.abs(b_value - b_half.to(tl.float32) * b_scale[:, None])
        b_error += b_off * b_off
        b_error_max = tl.maximum(b_error_max, b_off)
        b_size += b_value * b_value
        b_size_max = tl.maximum(b_size_max, tl.abs(b_value))
        b_product += b_value.to(tl.float64) * b_m.to(tl.float64)
        b_length += b_m * b_m
    o = g * K + o_k
    tl.store(p_scales + o, b_scale, m_k)
    tl.store(p_errors + o, tl.sqrt(tl.sum(b_error, 1)), m_k)
    tl.store(p_errors + GROUPS * K + o, tl.max(b_error_max, 1), m_k)
    tl.store(p_sizes + o, tl.sqrt(tl.sum(b_size, 1)), m_k)
    tl.store(p_sizes + GROUPS * K + o, tl.max(b_size_max, 1), m_k)
    tl.store(p_products + o, tl.sum(b_product, 1), m_k)
    if g == R:
        tl.store(p_lengths + o_k, tl.sqrt(tl.sum(b_length, 1)), m_k)


def reference_scale(woodbury: Woodbury) -> Tensor:
    """s (D,): lam, or the geometric mean of the lam_k for noise per component."""
    return woodbury.rows[:, -1].log().mean(0).exp() if woodbury.per_component else woodbury.scale


def allocate(rows: Tensor, rank: int, per_component: bool) -> ScanRows:
    """Room for the scan's view of rows (K, R + 1 (+ 1), D)."""
    components, _, features = rows.shape
    groups, tiles = rank + 1 + per_component, -(-components // TILE)
    return ScanRows(
        rows.new_empty(tiles, groups, TILE, -(-features // FEATURES) * FEATURES, dtype=torch.float16),
        rows.new_empty(3, tiles * TILE),
        rows.new_empty(tiles, rank, TILE),
        rows.new_empty(components, dtype=torch.float64),
        rows.new_empty(BOUNDS, tiles * TILE),
        rows.new_empty(5),
        rows.new_empty(features),
    )


def scan_rows(woodbury: Woodbury) -> ScanRows:
    """Rounds the rows (K, R + 1, D), or (K, R + 2, D), of the portable layout for the scan; see `ScanRows`."""
    rows, rank, per_component = woodbury.rows, woodbury.cholesky.shape[-1], woodbury.per_component
    components, groups, features = rows.shape
    out = allocate(rows, rank, per_component)
    padded = out.rows.shape[-1]
    scale = out.scale.copy_(reference_scale(woodbury))
    # |A_rd| <= 1, so B is brought into [0, 64) with noise per component too.
    beta = rows.new_full((components,), 2.0**-5)
    if per_component:
        beta *= (rows[:, -1] / scale).amax(-1).log2().ceil().clamp(-90, 90).nan_to_num(0).exp2()
    scales, (errors, sizes) = rows.new_empty(groups, components), rows.new_empty(2, 2, groups, components)
    products, lengths = rows.new_empty(groups, components, dtype=torch.float64), rows.new_empty(components)
    out.rows[-1, :, components % TILE or TILE :] = 0
    with torch.cuda.device_of(rows):
        operands = (rows, scale, scale.reciprocal(), woodbury.center, beta)
        shape = {"K": components, "D": features, "PADDED": padded, "R": rank, "PER_COMPONENT": per_component}
        tiles = {"TILE": TILE, "BK": _BLOCK, "BD": min(128, triton.next_power_of_2(padded)), "num_warps": 4}
        rows_kernel[(triton.cdiv(components, _BLOCK) * groups,)](
            *operands, out.rows, scales, errors, sizes, products, lengths, **shape, **tiles
        )

    def pad(values: Tensor) -> Tensor:  # zeros, since the padding of the last tile of components must be finite
        return torch.nn.functional.pad(values, (0, out.scales.shape[1] - components))

    w = rank + 1 if per_component else rank
    out.scales.copy_(pad(torch.stack([beta, scales[rank], scales[w]])))
    out.offsets.copy_(pad(products[:rank] / beta).view(rank, out.offsets.shape[0], TILE).transpose(0, 1))
    out.squares.copy_(products[rank])
    # The fp32 values m, B and w carry a few roundings of their own: 2^-20 of their size covers them.
    over, g = slack(features), sum_error(features)
    mu, phi = sizes[0, rank] * over, sizes[0, :rank].norm(dim=0) * over
    eps_m, eps_b = errors[0, rank] * over + mu * TINY, errors[0, :rank].norm(dim=0) * over + phi * TINY
    omega = sizes[1, w] if per_component else torch.zeros_like(mu)
    eps_w = errors[1, w] + omega * TINY if per_component else omega
    e1 = eps_b + g * (phi + eps_b)
    m1, m2, e3 = eps_m + g * (mu + eps_m), (1 + g) * (mu + eps_m), TINY * over * phi * lengths
    n1, n2 = 0.5 * (eps_w + (g + 4 * TINY) * (omega + eps_w)), 0.5 * (1 + g) * (omega + eps_w)
    out.bounds.copy_(pad(torch.stack([m1, m2, e1, phi + e1, e3, n1, n2])))
    # A component that is not finite has infinite bounds itself, and must not spoil the bounds of others.
    worst = torch.stack([m1 / m2, e1, phi + e1, e3 / m2, n1 / n2])
    out.worst.copy_(torch.where(worst.isfinite(), worst, 0).amax(-1))
    return out

"""EM's sufficient statistics on a GPU: sums over the active pairs, one writer per value (README.md).

With w the weight of a pair, y = x_n - mu_k and z = L_k^-T t = E[z | x_n, k], summed over the pairs of component k in
order and added to what the outputs hold, in float64:

    mass sum w     shift sum w y     latent sum w z     second sum w (z z^T + M_k^-1)     cross sum w z y^T
    squares sum w y^2, of each component or of all together

A program of `feature_kernel` owns BD features and BR latents of one component: it walks over the pairs BP at a time,
sums their products in float32 and adds these sums up in float64, in registers. Where all components share the noise it
walks over OWN components, so that their part of `squares` leaves the chip once per OWN; PyTorch adds these parts up. A
program of `latent_kernel` owns what a component has without features; M_k^-1 comes from L_k by substitution in float64.
t and z come from triton_pairs.py. Never materialised: y, or anything else with P x D or P x R^2.

Exact: y, t and z are rounded to float32 as in the plain formula, and a sum over BP pairs once more; the error of a sum
does not grow with the number of pairs. Float64 throughout would be no slower on a chip with half-rate float64, but w z
of BP pairs and 16 latents, which every thread holds, would take 128 of its registers.
Deterministic: a stable sort, one writer per value, sums in a fixed order, no atomics. Nothing asks the device how many
pairs there are, and a component without one is neither read nor written.
Floor: the sums of the components that own a pair, read and written once (README.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.triton_groups import group, load_pairs, load_range, put
from mfa_kernels.ops.common.triton_residual import back_substitute, feature_offsets, vector
from mfa_kernels.ops.pairs import triton_pairs
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.statistics.types import Sums
from mfa_kernels.ops.woodbury.types import Woodbury

_LATENTS = 16
"""Latents per program of `feature_kernel`, at most: their sums fill a thread's registers."""
_SHARED = 8
"""Components per program where they share the noise: an eighth of the K x D partial sums, and still enough programs."""
_MANY = 1024
"""With at least this many components, there are enough programs for that."""


@triton.jit
def feature_kernel(
    p_x,  # (N, D)
    p_tokens,  # (P,)
    p_weights,  # (P,)
    p_z,  # (P, R)
    p_order,  # (P,)
    p_starts,  # (K + 1,)
    p_rows,  # (K, R + 1 or R + 2, D)
    p_shift,  # (K, D) float64, added to
    p_cross,  # (K, R, D) float64, added to
    p_squares,  # (K, D) float64, added to; where the components share the noise (K / OWN, D), written
    K,
    D,
    R: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
    OWN: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    feature_blocks = tl.cdiv(D, BD)
    LATENT_BLOCKS: tl.constexpr = (R + BR - 1) // BR if R > 0 else 1
    i_r = tl.program_id(0) % LATENT_BLOCKS
    i_d = tl.program_id(0) // LATENT_BLOCKS % feature_blocks
    i_c = tl.program_id(0) // LATENT_BLOCKS // feature_blocks
    o_d = feature_offsets(i_d * BD, BD, VEC)  # [1, 1, BD]
    m_d = o_d < D
    o_r = i_r * BR + tl.arange(0, BR)[None, :, None]  # [1, BR, 1]
    b_squares = tl.zeros([1, 1, BD], dtype=tl.float64)
    for i_k in range(i_c * OWN, tl.minimum(i_c * OWN + OWN, K)):
        first, last = load_range(p_starts, i_k)
        if first < last:
            k = tl.cast(i_k, tl.int64)
            b_mean = tl.load(p_rows + k * (R + 1 + PER_COMPONENT) * D + o_d, mask=m_d, other=0.0)  # [1, 1, BD]
            b_shift = tl.zeros([1, 1, BD], dtype=tl.float64)
            b_cross = tl.zeros([1, BR, BD], dtype=tl.float64)
            for i in tl.range(first, last, BP, num_stages=STAGES):
                o_p, m_i = load_pairs(p_order, i, last, BP)  # [BP, 1, 1]
                o_n = tl.load(p_tokens + o_p, mask=m_i, other=0).to(tl.int64)
                b_w = tl.load(p_weights + o_p, mask=m_i, other=0.0)  # [BP, 1, 1]
                b_x = tl.load(p_x + o_n * D + o_d, mask=m_i & m_d, other=0.0).to(tl.float32)  # [BP, 1, BD]
                b_y = b_x - b_mean
                b_wy = b_w * b_y
                b_shift += tl.sum(b_wy, axis=0, keep_dims=True).to(tl.float64)
                b_squares += tl.sum(b_wy * b_y, axis=0, keep_dims=True).to(tl.float64)
                if R > 0:
                    b_z = tl.load(p_z + o_p * R + o_r, mask=m_i & (o_r < R), other=0.0)  # [BP, BR, 1]
                    b_cross += tl.sum((b_w * b_z) * b_y, axis=0, keep_dims=True).to(tl.float64)
            if i_r == 0:
                p_out = p_shift + k * D + o_d
                put(p_out, b_shift, m_d, True)
            if R > 0:
                p_out = p_cross + (k * R + o_r) * D + o_d
                put(p_out, b_cross, (o_r < R) & m_d, True)
    p_out = p_squares + tl.cast(i_c, tl.int64) * D + o_d
    if i_r == 0:
        put(p_out, b_squares, m_d, PER_COMPONENT)  # OWN is 1 then


@triton.jit
def latent_kernel(
    p_weights,  # (P,)
    p_z,  # (P, R)
    p_order,  # (P,)
    p_starts,  # (K + 1,)
    p_cholesky,  # (K, R, R)
    p_mass,  # (K,) float64, added to, as the next two
    p_latent,  # (K, R) float64
    p_second,  # (K, R, R) float64
    R: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
):
    i_k = tl.program_id(0).to(tl.int64)
    first, last = load_range(p_starts, i_k)
    if first == last:
        return
    o_r = tl.arange(0, BR)[None, :, None]  # [1, BR, 1]
    o_s = tl.arange(0, BR)[None, None, :]  # [1, 1, BR]
    b_mass = tl.zeros([1, 1, 1], dtype=tl.float64)
    b_latent = tl.zeros([1, BR, 1], dtype=tl.float64)
    b_second = tl.zeros([1, BR, BR], dtype=tl.float64)
    for i in range(first, last, BP):
        o_p, m_i = load_pairs(p_order, i, last, BP)  # [BP, 1, 1]
        b_w = tl.load(p_weights + o_p, mask=m_i, other=0.0).to(tl.float64)  # [BP, 1, 1]
        b_mass += tl.sum(b_w, axis=0, keep_dims=True)
        if R > 0:
            b_z = tl.load(p_z + o_p * R + o_r, mask=m_i & (o_r < R), other=0.0).to(tl.float64)  # [BP, BR, 1]
            b_row = tl.load(p_z + o_p * R + o_s, mask=m_i & (o_s < R), other=0.0).to(tl.float64)  # [BP, 1, BR]
            b_latent += tl.sum(b_w * b_z, axis=0, keep_dims=True)
            b_second += tl.sum((b_w * b_z) * b_row, axis=0, keep_dims=True)
    p_out = p_mass + i_k + tl.zeros([1, 1, 1], dtype=tl.int32)
    put(p_out, b_mass, b_mass == b_mass, True)
    if R > 0:
        b_inverse = tl.where((o_r == o_s) & (o_r < R), 1.0, 0.0).to(tl.float64)  # [1, BR, BR]
        p_own = p_cholesky + i_k * R * R
        b_inverse = back_substitute(b_inverse, p_own, o_r, R)  # L^-T
        b_inverse = back_substitute(tl.permute(b_inverse, (0, 2, 1)), p_own, o_r, R)  # M^-1 = L^-T L^-1
        b_inverse = 0.5 * (b_inverse + tl.permute(b_inverse, (0, 2, 1)))  # symmetric to the bit
        p_out = p_latent + i_k * R + o_r
        put(p_out, b_latent, o_r < R, True)
        p_out = p_second + (i_k * R + o_r) * R + o_s
        put(p_out, b_second + b_mass * b_inverse, (o_r < R) & (o_s < R), True)


def accumulate(x: Tensor, components: Tensor, weights: Tensor, woodbury: Woodbury, out: Sums) -> None:
    """Adds the sums over the pairs in the slots to `out`, of tensors that the operator has checked. Does not wait.

    Args:
        x: (N, D) contiguous, bfloat16, float16 or float32.
        components: (N, S) int32, N S < 2^31; -1 marks an empty slot.
        weights: (N, S) float32; a slot of weight 0 is no pair.
        woodbury: in the portable layout, float32.
        out: contiguous.
    """
    (count, _, features), rank = woodbury.rows.shape, woodbury.cholesky.shape[-1]
    pairs = components.numel()
    if pairs == 0:
        return
    flat = components.masked_fill(weights == 0, -1).flatten()
    tokens = torch.arange(pairs, dtype=torch.int32, device=x.device) // components.shape[1]
    config = configs.configured(configs.Statistics, x, x.shape[0], count)
    groups = group(flat, count, configs.configured(configs.Pairs, x, x.shape[0], count).pairs)
    z = triton_pairs.latents(Pairs(x, tokens, flat), woodbury, groups=groups)
    tiles = _feature_tiles(config, count, rank, woodbury.per_component)
    own = triton.cdiv(count, tiles["OWN"])
    parts = out.squares if woodbury.per_component else out.squares.new_empty(own, features)
    blocks = own * triton.cdiv(features, tiles["BD"]) * triton.cdiv(max(1, rank), tiles["BR"])
    with torch.cuda.device_of(x):
        of = (weights, z, groups.order, groups.starts)
        sizes = {"K": count, "D": features, "R": rank, "PER_COMPONENT": woodbury.per_component}
        feature_kernel[(blocks,)](x, tokens, *of, woodbury.rows, out.shift, out.cross, parts, **sizes, **tiles)
        latent_kernel[(count,)](*of, woodbury.cholesky, out.mass, out.latent, out.second, R=rank, **_latent_tiles(rank))
    if not woodbury.per_component:
        out.squares.add_(parts.sum(0))


def _feature_tiles(config: configs.Statistics, count: int, rank: int, per_component: bool) -> dict[str, int]:
    rows = min(_LATENTS, triton.next_power_of_2(max(1, rank)))
    own, width = _SHARED if count >= _MANY and not per_component else 1, vector(config.features, config.warps)
    tiles = {"OWN": own, "BP": config.pairs, "BR": rows, "BD": config.features, "VEC": width}
    return {**tiles, "STAGES": config.stages, "num_warps": config.warps}


def _latent_tiles(rank: int) -> dict[str, int]:
    """Tiles for the registers, which hold z z^T of the pairs of a tile."""
    rows = triton.next_power_of_2(max(1, rank))
    warps = 1 if rank <= 16 else 4 if rank <= 32 else 8
    return {"BP": max(1, min(16, 1024 // rows**2)), "BR": rows, "num_warps": warps}

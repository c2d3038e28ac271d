"""Decoding on a GPU: sum_c r_c (mu_c + W_c z_c) over the slots of a code, and its gradients.

A program of `decode_kernel` owns one token and BD features and walks over the slots; of `slots_kernel`, one slot; of
`parameters_kernel`, one component and BD features, with the slots of that component in order. Never materialised:
mu_c + W_c z_c of every slot, N x C x D. Deterministic: one writer per value, sums in a fixed order, float32, no
atomics. Slots are visited by component in `slots_kernel`, so that loadings are found in the second-level cache.
Floor: the loadings of every slot, read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.triton_groups import group, load_pairs, load_range
from mfa_kernels.ops.common.triton_residual import component_tiles, feature_offsets

_RANK_TILE = 16
"""Columns of W_k per pass, at most."""


@triton.jit
def decode_kernel(
    p_components,  # (N, C)
    p_responsibilities,  # (N, C)
    p_latents,  # (N, C, R)
    p_means,  # (K, D)
    p_loadings,  # (K, D, R)
    p_out,  # (N, D)
    K,
    C,
    D,
    R: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    feature_blocks = tl.cdiv(D, BD)
    i_n = (tl.program_id(0) // feature_blocks).to(tl.int64)
    o_d = tl.program_id(0) % feature_blocks * BD + tl.arange(0, BD)  # [BD]
    m_d = o_d < D
    b_out = tl.zeros([BD], dtype=tl.float32)
    for c in range(0, C):
        i_c = i_n * C + c
        k = tl.load(p_components + i_c).to(tl.int64)
        weight = tl.load(p_responsibilities + i_c)
        if (k >= 0) & (k < K):
            b_point = tl.load(p_means + k * D + o_d, mask=m_d, other=0.0)  # [BD]
            for r0 in range(0, R, BR):
                o_r = r0 + tl.arange(0, BR)  # [BR]
                b_z = tl.load(p_latents + i_c * R + o_r, mask=o_r < R, other=0.0)  # [BR]
                m_w = m_d[:, None] & (o_r < R)[None, :]
                b_w = tl.load(p_loadings + (k * D + o_d[:, None]) * R + o_r[None, :], mask=m_w, other=0.0)  # [BD, BR]
                b_point += tl.sum(b_w * b_z[None, :], axis=1)
            b_out += weight * b_point
        elif weight != weight:
            b_out += weight  # a token that is not finite: NaN, though it holds no component
    tl.store(p_out + i_n * D + o_d, b_out, mask=m_d)


@triton.jit
def slots_kernel(
    p_grad,  # (N, D)
    p_components,  # (N C,)
    p_responsibilities,  # (N C,)
    p_latents,  # (N C, R)
    p_means,  # (K, D)
    p_loadings,  # (K, D, R)
    p_order,  # (N C,)
    p_grad_responsibilities,  # (N C,)
    p_grad_latents,  # (N C, R)
    K,
    C,
    D,
    R: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    i_c = tl.load(p_order + tl.program_id(0)).to(tl.int64)
    k = tl.load(p_components + i_c).to(tl.int64)
    m_k = (k >= 0) & (k < K)
    k = tl.where(m_k, k, 0)
    weight = tl.load(p_responsibilities + i_c)
    grad_weight = 0.0
    for r0 in range(0, R if R > 0 else 1, BR):
        o_r = r0 + tl.arange(0, BR)  # [BR]
        m_r = o_r < R
        b_dot = tl.zeros([BD], dtype=tl.float32)
        b_back = tl.zeros([BD, BR], dtype=tl.float32)
        for d0 in range(0, D, BD):
            o_d = d0 + tl.arange(0, BD)  # [BD]
            m_d = (o_d < D) & m_k
            b_g = tl.load(p_grad + (i_c // C) * D + o_d, mask=m_d, other=0.0)  # [BD]
            m_w = m_d[:, None] & m_r[None, :]
            b_w = tl.load(p_loadings + (k * D + o_d[:, None]) * R + o_r[None, :], mask=m_w, other=0.0)  # [BD, BR]
            b_back += b_w * b_g[:, None]
            b_dot += b_g * tl.load(p_means + k * D + o_d, mask=m_d & (r0 == 0), other=0.0)
        b_z = tl.load(p_latents + i_c * R + o_r, mask=m_r & m_k, other=0.0)  # [BR]
        b_sum = tl.sum(b_back, axis=0)  # [BR]
        grad_weight += tl.sum(b_dot, axis=0) + tl.sum(b_sum * b_z, axis=0)
        tl.store(p_grad_latents + i_c * R + o_r, tl.where(m_k, weight * b_sum, 0.0), mask=m_r)
    tl.store(p_grad_responsibilities + i_c, grad_weight)


@triton.jit
def parameters_kernel(
    p_grad,  # (N, D)
    p_responsibilities,  # (N C,)
    p_latents,  # (N C, R)
    p_order,  # (N C,)
    p_starts,  # (K + 1,)
    p_grad_means,  # (K, D)
    p_grad_loadings,  # (K, D, R)
    C,
    D,
    R: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
):
    feature_blocks = tl.cdiv(D, BD)
    i_k = (tl.program_id(0) // feature_blocks).to(tl.int64)
    o_d = feature_offsets(tl.program_id(0) % feature_blocks * BD, BD, VEC)  # [1, 1, BD]
    o_r = tl.arange(0, BR)[None, :, None]  # [1, BR, 1]
    m_d = o_d < D
    first, last = load_range(p_starts, i_k)
    b_means = tl.zeros([1, 1, BD], dtype=tl.float32)
    b_loadings = tl.zeros([1, BR, BD], dtype=tl.float32)
    for i in range(first, last, BP):
        o_c, m_i = load_pairs(p_order, i, last, BP)  # [BP, 1, 1]
        b_weight = tl.load(p_responsibilities + o_c, mask=m_i, other=0.0)  # [BP, 1, 1]
        b_z = tl.load(p_latents + o_c * R + o_r, mask=m_i & (o_r < R), other=0.0)  # [BP, BR, 1]
        b_g = b_weight * tl.load(p_grad + (o_c // C) * D + o_d, mask=m_i & m_d, other=0.0)  # [BP, 1, BD]
        b_means += tl.sum(b_g, axis=0, keep_dims=True)
        b_loadings += tl.sum(b_g * b_z, axis=0, keep_dims=True)
    tl.store(p_grad_means + i_k * D + o_d, b_means, mask=m_d)
    tl.store(p_grad_loadings + (i_k * D + o_d) * R + o_r, b_loadings, mask=m_d & (o_r < R))


def decode(components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor) -> Tensor:
    """Returns sum_c r_c (mu_c + W_c z_c), (N, D) float32. Does not wait for the device.

    Args:
        components: (N, C) int32; a value outside [0, K) marks an empty slot. All arguments are contiguous.
        responsibilities: (N, C) float32; where one of them is NaN, the token's row is NaN.
        latents: (N, C, R) float32.
        means: (K, D) float32.
        loadings: (K, D, R) float32.
    """
    (tokens, slots), (_, features, rank) = components.shape, loadings.shape
    out = means.new_empty(tokens, features)
    if out.numel():
        config = configs.configured(configs.Gradient, means, tokens, means.shape[0])
        with torch.cuda.device_of(means):
            sizes = {"K": means.shape[0], "C": slots, "D": features, "R": rank}
            decode_kernel[(tokens * triton.cdiv(features, config.features),)](
                components, responsibilities, latents, means, loadings, out, **sizes, **_tiles(config, rank)
            )
    return out


def decode_backward(
    grad: Tensor, components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor,
    needs: Sequence[bool] = (True, True),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `decode` to responsibilities and latents and, of size 0 where neither is needed, to means and
    loadings; grad is (N, D) float32, contiguous."""
    of_parameters = any(needs)
    grad_r, grad_z = torch.empty_like(responsibilities), torch.empty_like(latents)
    grad_means, grad_loadings = (torch.empty_like(t) if of_parameters else t.new_empty(0) for t in (means, loadings))
    count, features, rank = loadings.shape
    slots = components.shape[-1]
    config = configs.configured(configs.Gradient, means, components.shape[0], count)
    groups = group(components.flatten(), count, 1)
    sizes = {"C": slots, "D": features, "R": rank}
    with torch.cuda.device_of(means):
        if components.numel():
            code = (components, responsibilities, latents, means, loadings)
            slots_kernel[(components.numel(),)](
                grad, *code, groups.order, grad_r, grad_z, K=count, **sizes, **_tiles(config, rank)
            )
        if of_parameters:
            tiles = component_tiles(config, rank)
            parameters_kernel[(count * triton.cdiv(features, tiles["BD"]),)](
                grad,
                responsibilities,
                latents,
                groups.order,
                groups.starts,
                grad_means,
                grad_loadings,
                **sizes,
                **tiles,
            )
    return grad_r, grad_z, grad_means, grad_loadings


def _tiles(config: configs.Gradient, rank: int) -> dict[str, int]:
    columns = min(_RANK_TILE, triton.next_power_of_2(max(1, rank)))
    return {"BR": columns, "BD": config.features, "num_warps": config.warps}

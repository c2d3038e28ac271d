"""Gradients from weighted pairs on a GPU, in closed form (README.md), each with one writer.

With v = (x_n - mu_k) lam_k, t = A_k v, q = v - A_k^T t and S = sum w, summed over the pairs of component k in order:

    d mu   = lam sum w q          d W   = lam (sum w q t^T - S A^T) L^-1
    d Psi  = lam^2 (sum w q^2 - S (1 - sum_r A_r^2)) / 2          d log pi = S          d x_n = -sum_k w lam q

A program of `gradient_kernel` owns one component and BD features. It keeps A_k and the sums of its features in
registers, walks over the pairs BP at a time, and applies L^-1 at the end, by substitution: once per component, not per
pair. t comes from triton_pairs.py. Never materialised: q, z, anything else with P x D, or a gradient of the rows. A
program of `token_kernel` owns one token and BD features. The noise that all components share is summed over K from
partial sums (K, D).

Deterministic: a stable sort, one writer per value, sums in a fixed order, float32, no atomics. Nothing asks the device
how many pairs there are. Floor: rows read once, gradients read and written once (README.md). The worst case is one
component that owns every token: only D / BD programs have work then, and each of them walks over all P pairs, P / BP
times three loads that wait for one another; at a microsecond each time, 16 ms for 65536 pairs four at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.triton_groups import group, load_pairs, load_range, put
from mfa_kernels.ops.common.triton_residual import (
    back_substitute,
    component_tiles,
    feature_offsets,
    load_explaining,
    load_residual,
    rank_tile,
    vector,
)
from mfa_kernels.ops.pairs.triton_pairs import explain
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.woodbury.types import Woodbury


@triton.jit
def gradient_kernel(
    p_x,  # (N, D)
    p_tokens,  # (P,)
    p_weights,  # (P,)
    p_t,  # (P, R)
    p_order,  # (P,)
    p_starts,  # (K + 1,)
    p_rows,  # (K, R + 1 or R + 2, D)
    p_scale,  # (D,)
    p_cholesky,  # (K, R, R)
    p_means,  # (K, D), added to or written; None where it is not wanted, like the next three
    p_loadings,  # (K, D, R), added to or written
    p_noise,  # (K, D), added to or written
    p_log_weights,  # (K,), added to or written
    D,
    R: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
    ADD: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    feature_blocks = tl.cdiv(D, BD)
    i_k = tl.program_id(0) // feature_blocks
    i_d = tl.program_id(0) % feature_blocks
    first, last = load_range(p_starts, i_k)
    if ADD and first == last:
        return
    i_k = i_k.to(tl.int64)
    o_d = feature_offsets(i_d * BD, BD, VEC)  # [1, 1, BD]
    o_r = tl.arange(0, BR)[None, :, None]  # [1, BR, 1]
    p_rows += i_k * (R + 1 + PER_COMPONENT) * D
    b_a = load_explaining(p_rows, o_r, o_d, D, R)  # [1, BR, BD]
    b_weight = tl.zeros([1, 1, 1], dtype=tl.float32)
    b_q = tl.zeros([1, 1, BD], dtype=tl.float32)  # sum w q
    b_q2 = tl.zeros([1, 1, BD], dtype=tl.float32)  # sum w q^2
    b_qt = tl.zeros([1, BR, BD], dtype=tl.float32)  # sum w q t^T
    for i in tl.range(first, last, BP, num_stages=STAGES):
        o_p, m_i = load_pairs(p_order, i, last, BP)  # [BP, 1, 1]
        o_n = tl.load(p_tokens + o_p, mask=m_i, other=0).to(tl.int64)
        b_w = tl.load(p_weights + o_p, mask=m_i, other=0.0)  # [BP, 1, 1]
        b_t = tl.load(p_t + o_p * R + o_r, mask=m_i & (o_r < R), other=0.0)  # [BP, BR, 1]
        b_v, _ = load_residual(p_x + o_n * D, m_i, p_rows, p_scale, o_d, D, R, PER_COMPONENT)  # [BP, 1, BD]
        b_v -= tl.sum(b_a * b_t, axis=1, keep_dims=True)
        b_weight += tl.sum(b_w, axis=0, keep_dims=True)
        b_q += tl.sum(b_w * b_v, axis=0, keep_dims=True)
        if p_noise is not None:
            b_q2 += tl.sum(b_w * b_v * b_v, axis=0, keep_dims=True)
        if p_loadings is not None:
            b_qt += tl.sum((b_w * b_v) * b_t, axis=0, keep_dims=True)

    m_d = o_d < D
    p_lam = p_rows + (R + 1) * D if PER_COMPONENT else p_scale
    b_scale = tl.load(p_lam + o_d, mask=m_d, other=0.0)  # [1, 1, BD]
    if p_log_weights is not None:
        m_first = (i_d + tl.zeros([1, 1, 1], dtype=tl.int32)) == 0
        p_out = p_log_weights + i_k + tl.zeros([1, 1, 1], dtype=tl.int32)
        put(p_out, b_weight, m_first, ADD)
    if p_means is not None:
        p_out = p_means + i_k * D + o_d
        put(p_out, b_scale * b_q, m_d, ADD)
    if p_noise is not None:
        b_prior = b_weight * (1.0 - tl.sum(b_a * b_a, axis=1, keep_dims=True))  # S diag(I - A^T A)
        p_out = p_noise + i_k * D + o_d
        put(p_out, 0.5 * b_scale * b_scale * (b_q2 - b_prior), m_d, ADD)
    if p_loadings is not None:
        b_loadings = back_substitute(b_qt - b_weight * b_a, p_cholesky + i_k * R * R, o_r, R)  # [1, BR, BD]
        p_out = p_loadings + (i_k * D + o_d) * R + o_r
        m_out = (o_r < R) & m_d
        put(p_out, b_scale * b_loadings, m_out, ADD)


@triton.jit
def token_kernel(
    p_x,  # (N, D)
    p_components,  # (P,)
    p_weights,  # (P,)
    p_t,  # (P, R)
    p_ranges,  # (N + 1,): the pairs of token n are ranges[n], ..., ranges[n + 1] - 1
    p_rows,  # (K, R + 1 or R + 2, D)
    p_scale,  # (D,)
    p_grad_x,  # (N, D), added to or written
    K,
    D,
    R: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
    ADD: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
):
    feature_blocks = tl.cdiv(D, BD)
    i_n = tl.program_id(0) // feature_blocks
    o_d = feature_offsets(tl.program_id(0) % feature_blocks * BD, BD, VEC)  # [1, 1, BD]
    m_d = o_d < D
    p_x += i_n.to(tl.int64) * D
    b_grad = tl.zeros([1, 1, BD], dtype=tl.float32)
    first = tl.load(p_ranges + i_n)
    for i in range(0, tl.load(p_ranges + i_n + 1) - first):
        p = first.to(tl.int64) + i
        k = tl.load(p_components + p).to(tl.int64)
        w = tl.load(p_weights + p)
        if (k >= 0) & (k < K):
            p_own = p_rows + k * (R + 1 + PER_COMPONENT) * D
            b_q, b_scale = load_residual(p_x, m_d, p_own, p_scale, o_d, D, R, PER_COMPONENT)  # [1, 1, BD]
            for r0 in range(0, R, BR):
                o_r = r0 + tl.arange(0, BR)[None, :, None]  # [1, BR, 1]
                b_t = tl.load(p_t + p * R + o_r, mask=o_r < R, other=0.0)  # [1, BR, 1]
                b_q -= tl.sum(b_t * load_explaining(p_own, o_r, o_d, D, R), axis=1, keep_dims=True)
            b_grad += w * (b_scale * b_q)
    p_out = p_grad_x + i_n.to(tl.int64) * D + o_d
    put(p_out, -b_grad, m_d, ADD)


def backward(
    pairs: Pairs, weights: Tensor, woodbury: Woodbury, gradients: list[Tensor | None], add: bool = True
) -> None:
    """Adds sum_p w_p d logit_p / d parameter to the gradients given. Does not wait for the device.

    Args:
        pairs: x contiguous, bfloat16, float16 or float32; tokens ascending, int32 too, P < 2^31; a component outside
            [0, K) marks a slot without a pair.
        weights: (P,) float32; a pair of weight 0 is skipped.
        woodbury: in the portable layout, float32.
        gradients: of x (N, D), means, loadings, noise and log_weights in their shapes; float32, contiguous, or None.
        add: False overwrites the gradients: half the traffic of zeroing them and adding.
    """
    grad_x, grad_means, grad_loadings, grad_noise, grad_log_weights = gradients
    x, tokens, components = pairs
    (count, _, features), rank = woodbury.rows.shape, woodbury.cholesky.shape[-1]
    if not len(components):
        if not add:
            for gradient in gradients:
                if gradient is not None:
                    gradient.zero_()
        return
    tokens, weights = tokens.contiguous(), weights.contiguous()
    components = components.masked_fill(weights == 0, -1).contiguous()
    blocks = configs.configured(configs.Pairs, x, x.shape[0], count)
    config = configs.configured(configs.Gradient, x, x.shape[0], count)
    groups = group(components, count, blocks.pairs)
    _, t = explain(Pairs(x, tokens, components), woodbury, groups=groups)
    shared = None  # each component's part of the noise that they share
    if grad_noise is not None and not woodbury.per_component:
        shared = torch.empty_like(woodbury.rows[:, 0], memory_format=torch.contiguous_format)
        if add:
            shared.zero_()
    noise = grad_noise if shared is None else shared
    if rank == 0:
        grad_loadings = None
    sizes = {"D": features, "R": rank, "PER_COMPONENT": woodbury.per_component, "ADD": add}
    with torch.cuda.device_of(x):
        if any(g is not None for g in (grad_means, grad_loadings, noise, grad_log_weights)):
            tiles = {**component_tiles(config, rank), "STAGES": config.stages}
            by_component = (x, tokens, weights, t, groups.order, groups.starts)
            terms = (woodbury.rows, woodbury.scale, woodbury.cholesky)
            gradient_kernel[(count * triton.cdiv(features, tiles["BD"]),)](
                *by_component, *terms, grad_means, grad_loadings, noise, grad_log_weights, **sizes, **tiles
            )
        if grad_x is not None:
            edges = torch.arange(x.shape[0] + 1, dtype=tokens.dtype, device=tokens.device)
            ranges = torch.searchsorted(tokens, edges, out_int32=True)
            tiles = _token_tiles(config, rank)
            by_token = (x, components, weights, t, ranges)
            token_kernel[(x.shape[0] * triton.cdiv(features, tiles["BD"]),)](
                *by_token, woodbury.rows, woodbury.scale, grad_x, K=count, **sizes, **tiles
            )
    if grad_noise is not None and shared is not None:
        grad_noise.copy_(grad_noise + shared.sum(0) if add else shared.sum(0))


def _token_tiles(config: configs.Gradient, rank: int) -> dict[str, int]:
    rows = rank_tile(rank, 1, config.features, config.warps)
    width = vector(config.features, config.warps)
    return {"BR": rows, "BD": config.features, "VEC": width, "num_warps": config.warps}

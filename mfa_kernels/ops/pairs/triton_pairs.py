"""Pairs on a GPU: logits, the explained part t of their residuals, and latents.

    v = (x_n - mu_k) lam_k,   t = A_k v,   logit = constant_k - (|v|^2 - |t|^2) / 2,   z = L_k^-T t = E[z | x_n, k]

A program owns up to BP pairs of one component (triton_groups.py), so the rows of a component are read once per BP
pairs; the inner loop is in triton_residual.py. Never materialised: v, or anything else with P x D. Exact: differences
and sums in float32, as the plain formula has them. Several passes over the features where R rows times BP tokens do
not fit the registers; a pass reads its own rows of A_k, and x and mu_k again, from the caches.

The host knows only a bound on the number of blocks: a program without one stops, and one may have several.
Floor: the rows of the components that own a pair, read once (README.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.triton_groups import Groups, group
from mfa_kernels.ops.common.triton_residual import back_substitute, project, project_tiles
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.woodbury.types import Woodbury

_PROGRAMS = 1 << 14
"""Programs of `explain_kernel`, at most: more than run at a time, few enough to stop unused ones quickly."""
_SOLVED = 32
"""Pairs per program of `latents_kernel`."""


@triton.jit
def owner(i_b, p_blocks, K):
    """The component that block i_b belongs to: the last k with blocks[k] <= i_b."""
    low, high = 0, K
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(p_blocks + middle) <= i_b
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def explain_kernel(
    p_x,  # (N, D)
    p_tokens,  # (P,)
    p_order,  # (P,)
    p_starts,  # (K + 1,)
    p_blocks,  # (K + 1,)
    p_rows,  # (K, R + 1 or R + 2, D)
    p_scale,  # (D,)
    p_constants,  # (K,) or None
    p_logits,  # (P,) or None
    p_t,  # (P, R) or None
    K,
    D,
    R: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    for i_b in range(tl.program_id(0), tl.load(p_blocks + K), tl.num_programs(0)):
        i_k = owner(i_b, p_blocks, K)
        o_i = tl.load(p_starts + i_k) + (i_b - tl.load(p_blocks + i_k)) * BP + tl.arange(0, BP)  # [BP]
        m_p = o_i < tl.load(p_starts + i_k + 1)
        o_p = tl.load(p_order + o_i, mask=m_p, other=0)
        o_n = tl.load(p_tokens + o_p, mask=m_p, other=0).to(tl.int64)
        p_own = p_rows + i_k.to(tl.int64) * (R + 1 + PER_COMPONENT) * D
        p_n, m_n = p_x + o_n[:, None, None] * D, m_p[:, None, None]  # [BP, 1, 1]
        b_square = tl.zeros([BP], dtype=tl.float32)
        b_explained = tl.zeros([BP], dtype=tl.float32)
        for r0 in range(0, R if R > 0 else 1, BR):
            b_square, b_t = project(  # [BP], [BP, BR]
                p_n, m_n, p_own, p_scale, r0, D, R, PER_COMPONENT, BP, BR, BD, VEC, STAGES
            )
            b_explained += tl.sum(b_t * b_t, axis=1)
            if p_t is not None:
                o_r = r0 + tl.arange(0, BR)[None, :]  # [1, BR]
                tl.store(p_t + o_p[:, None] * R + o_r, b_t, mask=m_p[:, None] & (o_r < R))
        if p_logits is not None:
            tl.store(p_logits + o_p, tl.load(p_constants + i_k) - 0.5 * (b_square - b_explained), mask=m_p)


@triton.jit
def latents_kernel(
    p_components,  # (P,)
    p_cholesky,  # (K, R, R)
    p_t,  # (P, R), overwritten by z
    K,
    P,
    R: tl.constexpr,
    BP: tl.constexpr,
    BR: tl.constexpr,
):
    o_p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)[:, None, None]  # [BP, 1, 1]
    o_r = tl.arange(0, BR)[None, :, None]  # [1, BR, 1]
    m_t = (o_p < P) & (o_r < R)
    o_k = tl.load(p_components + o_p, mask=o_p < P, other=0).to(tl.int64)
    o_k = tl.where((o_k >= 0) & (o_k < K), o_k, 0)  # a slot without a pair has t = 0, and so z = 0
    b_t = tl.load(p_t + o_p * R + o_r, mask=m_t, other=0.0)  # [BP, BR, 1]
    tl.store(p_t + o_p * R + o_r, back_substitute(b_t, p_cholesky + o_k * R * R, o_r, R), mask=m_t)


def explain(
    pairs: Pairs, woodbury: Woodbury, constants: Tensor | None = None, with_t: bool = True, groups: Groups | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Logits and explained residuals of pairs. Does not wait for the device.

    Args:
        pairs: x contiguous, bfloat16, float16 or float32; tokens int32 too, P < 2^31; a component outside [0, K) marks
            a slot without a pair.
        woodbury: in the portable layout, float32.
        constants: (K,) float32, `woodbury.constants(log_weights)`; None where logits are not wanted.
        with_t: True where t is wanted.
        groups: `group(components, K, block)` with the block of `configs.Pairs`, where it exists already.

    Returns:
        logits (P,), -inf in a slot without a pair, and t (P, R), 0 there; None in place of one that is not wanted.
    """
    x, tokens, components = pairs.x, pairs.tokens.contiguous(), pairs.components.contiguous()
    (count, _, features), rank = woodbury.rows.shape, woodbury.cholesky.shape[-1]
    config = configs.configured(configs.Pairs, x, x.shape[0], count)
    # No block holds a slot without a pair, so its values are filled in beforehand.
    logits = None if constants is None else x.new_full(components.shape, -torch.inf, dtype=torch.float32)
    t = x.new_zeros(len(components), rank, dtype=torch.float32) if with_t else None
    if len(components):
        groups = group(components, count, config.pairs) if groups is None else groups
        with torch.cuda.device_of(x):
            explain_kernel[(min(groups.grid, _PROGRAMS),)](
                *(x, tokens, *groups[:3], woodbury.rows, woodbury.scale, constants, logits, t),
                **{"K": count, "D": features, "R": rank, "PER_COMPONENT": woodbury.per_component, "BP": config.pairs},
                **project_tiles(config, rank, config.pairs),
            )
    return logits, t


def latents(pairs: Pairs, woodbury: Woodbury, *, groups: Groups | None = None) -> Tensor:
    """E[z | x_n, k] for pairs, (P, R) float32, 0 in a slot without one. Arguments as in `explain`."""
    _, t = explain(pairs, woodbury, groups=groups)
    assert t is not None
    count, rank = t.shape
    if count and rank:
        with torch.cuda.device_of(t):
            sizes = {"K": woodbury.cholesky.shape[0], "P": count, "R": rank}
            tiles = {"BP": _SOLVED, "BR": triton.next_power_of_2(rank), "num_warps": 1}
            latents_kernel[(triton.cdiv(count, _SOLVED),)](
                pairs.components.contiguous(), woodbury.cholesky, t, **sizes, **tiles
            )
    return t

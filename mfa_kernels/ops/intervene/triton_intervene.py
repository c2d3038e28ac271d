"""Steering on a GPU: one launch from the active pairs of the scan to the rounded hidden states.

    x -> scale x + shift + sum_c r_c (weight mu_k + lam_k^-1 A_k^T u_c),   u_c = spread A_k v + L_k^T z,   k of slot c

with v = (x - mu_k) lam_k; A_k v and L_k^T z give W_k E[z | x, k] and W_k z without a substitution (README.md). A
program owns one token and BD features; where a token needs a sum over its features (spread, norm), all of them, in
tiles: each sum is a walk of its own over x and the rows, which are then in the second-level cache. Never materialised:
responsibilities, masks, latents, W_k z, and the result before it is rounded. Exact: differences, products and sums in
float32, one rounding. Deterministic: one writer per value, no atomics.
Floor: hidden states read and written once, the rows of the active components read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common.triton_residual import vector
from mfa_kernels.ops.intervene.types import Edit, Mixture
from mfa_kernels.ops.scan.types import ActivePairs

_FEATURES, _WARPS = 512, 4
_ACCUMULATORS = 32  # values of a tile of rows that a thread holds


@triton.jit
def responsibilities_of(p_log_prob, p_logits, p_counts, i_n, C, BC: tl.constexpr):
    """r of the slots of one token, [BC], 0 beyond C; NaN where none is active."""
    o_c = tl.arange(0, BC)  # [BC]
    b_logits = tl.load(p_logits + i_n * C + o_c, mask=o_c < C, other=-float("inf"))  # [BC]
    best = tl.max(b_logits, axis=0)
    b_r = tl.exp(b_logits - best)
    b_all = tl.exp(b_logits - tl.load(p_log_prob + i_n))  # relative to all components, where they overflow the slots
    return tl.where(tl.load(p_counts + i_n) > C, b_all, b_r / tl.sum(b_r, axis=0))


@triton.jit
def explained_by(p_x, p_own, p_scale, D, R: tl.constexpr, PER_COMPONENT: tl.constexpr, BR: tl.constexpr,
                 BD: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    """A_k v of one token, [BR], 0 beyond R; p_own points to the rows of the component."""
    o_r = tl.arange(0, BR)[:, None]  # [BR, 1]
    b_t = tl.zeros([BR, BD], dtype=tl.float32)
    for d0 in range(0, D, BD):
        o_d = tl.max_contiguous(d0 + tl.arange(0, BD), VEC)[None, :]  # [1, BD]
        m_d = o_d < D
        b_scale = tl.load(p_own + (R + 1) * D + o_d if PER_COMPONENT else p_scale + o_d, mask=m_d, other=0.0)
        b_v = tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32) - tl.load(p_own + o_d, mask=m_d, other=0.0)
        b_t += b_v * b_scale * tl.load(p_own + (1 + o_r) * D + o_d, mask=(o_r < R) & m_d, other=0.0)
    return tl.sum(b_t, axis=1)


@triton.jit
def steered_tile(
    p_x, p_shift, p_components, p_rows, p_scale, b_r, b_u, scale, weight, o_d, i_n, K, C, D, K_STRIDE,
    R: tl.constexpr, PER_COMPONENT: tl.constexpr, MIXES: tl.constexpr, MOVES: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """x and the steered x, float32, at features o_d of one token."""
    o_c = tl.arange(0, BC)  # [BC]
    o_r = tl.arange(0, BR)[:, None]  # [BR, 1]
    m_d = o_d < D
    b_x = tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    b_out = scale * b_x + tl.load(p_shift + o_d, mask=m_d, other=0.0)
    if MIXES:
        for c in range(0, C):
            k = tl.load(p_components + i_n * C + c).to(tl.int64)
            r = tl.sum(tl.where(o_c == c, b_r, 0.0), axis=0)
            if (k >= 0) & (k < K):
                p_own = p_rows + k * K_STRIDE
                b_point = weight * tl.load(p_own + o_d, mask=m_d, other=0.0)  # [BD]
                if MOVES:
                    b_uc = tl.sum(tl.where(o_c[:, None] == c, b_u, 0.0), axis=0)  # [BR]
                    m_a = (o_r < R) & m_d[None, :]
                    b_a = tl.load(p_own + (1 + o_r) * D + o_d[None, :], mask=m_a, other=0.0)  # [BR, BD]
                    b_scale = tl.load(
                        p_own + (R + 1) * D + o_d if PER_COMPONENT else p_scale + o_d, mask=m_d, other=1.0
                    )
                    b_point += tl.sum(b_a * b_uc[:, None], axis=0) / b_scale
                b_out += r * b_point
            elif r != r:
                b_out += r  # a token that is not finite: NaN, though it holds no component
    return b_x, b_out


_VARY = [
    "B",
    "T",
    *(f"{name}_{of}" for name in ("coefficient", "shift", "latent", "chosen") for of in ("rows", "steps")),
]


@triton.jit(do_not_specialize=[*_VARY, "rule_rows"])
def intervene_kernel(
    p_hidden,  # (N, D), N = B T
    p_out,  # (N, D)
    p_tally,  # (N, 3)
    p_coefficients,  # (B', S, 3)
    p_shift,  # (B', S, D)
    p_rules,  # (B', 3)
    p_thresholds,  # (B',)
    p_latents,  # (B', S, R)
    p_chosen,  # (B', S)
    p_passed,  # (B, T)
    p_log_prob,  # (N,)
    p_components,  # (N, C)
    p_logits,  # (N, C)
    p_counts,  # (N,)
    p_rows,  # (K, R + 1, D), or (K, R + 2, D)
    p_cholesky,  # (K, R, R)
    p_scale,  # (D,)
    B,
    T,
    K,
    C,
    D,
    coefficient_rows,
    coefficient_steps,
    shift_rows,
    shift_steps,
    rule_rows,
    latent_rows,
    latent_steps,
    chosen_rows,
    chosen_steps,
    R: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
    CHOSEN: tl.constexpr,
    PASSED: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    MIXES: tl.constexpr,
    LATENTS: tl.constexpr,
    SPREADS: tl.constexpr,
    NORM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
):
    WHOLE: tl.constexpr = SPREADS or NORM
    tiles = 1 if WHOLE else tl.cdiv(D, BD)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    i_d = tl.program_id(0) % tiles
    i_b, i_t = i_n // T, i_n % T
    o_c = tl.arange(0, BC)  # [BC]
    o_r = tl.arange(0, BR)  # [BR]

    p_rule = p_rules + i_b * rule_rows // B * 3
    kind, region, keeps = tl.load(p_rule), tl.load(p_rule + 1), tl.load(p_rule + 2)
    chosen = True
    if CHOSEN:
        at = i_b * chosen_rows // B * chosen_steps + tl.where(chosen_steps > 1, i_t, 0)
        chosen = tl.load(p_chosen + at) != 0
    reached = chosen & (kind != 5)
    b_r = tl.zeros([BC], dtype=tl.float32)
    responsibility, is_counted = 0.0, False
    if HAS_PAIRS:
        b_r = responsibilities_of(p_log_prob, p_logits, p_counts, i_n, C, BC)
        b_k = tl.load(p_components + i_n * C + o_c, mask=o_c < C, other=-1)  # [BC]
        log_prob = tl.load(p_log_prob + i_n)
        responsibility = tl.sum(b_r * (b_k == region).to(tl.float32), axis=0)  # NaN times 0 is NaN
        value = tl.where(kind <= 2, responsibility, log_prob)
        over = value > tl.load(p_thresholds + i_b * rule_rows // B)
        passes = (over == ((kind == 1) | (kind == 3))) & (log_prob == log_prob)
        reached = reached & ((kind == 0) | passes)
        is_counted = chosen & (region >= 0) & (responsibility == responsibility)
    if PASSED:
        reached = reached & (tl.load(p_passed + i_n) != 0)
    if i_d == 0:
        tl.store(p_tally + i_n * 3, tl.where(reached, 1.0, 0.0))
        tl.store(p_tally + i_n * 3 + 1, tl.where(is_counted, responsibility, 0.0))
        tl.store(p_tally + i_n * 3 + 2, tl.where(is_counted, 1.0, 0.0))

    p_x, p_y = p_hidden + i_n * D, p_out + i_n * D
    if reached:
        at = i_b * coefficient_rows // B * coefficient_steps + tl.where(coefficient_steps > 1, i_t, 0)
        scale, weight = tl.load(p_coefficients + at * 3), tl.load(p_coefficients + at * 3 + 1)
        p_s = p_shift + (i_b * shift_rows // B * shift_steps + tl.where(shift_steps > 1, i_t, 0)) * D
        b_u = tl.zeros([BC, BR], dtype=tl.float32)
        K_STRIDE: tl.constexpr = R + (2 if PER_COMPONENT else 1)
        if MIXES and (LATENTS or SPREADS):
            for c in range(0, C):
                k = tl.load(p_components + i_n * C + c).to(tl.int64)
                if (k >= 0) & (k < K):
                    b_uc = tl.zeros([BR], dtype=tl.float32)
                    if SPREADS:
                        b_uc = tl.load(p_coefficients + at * 3 + 2) * explained_by(
                            p_x, p_rows + k * K_STRIDE * D, p_scale, D, R, PER_COMPONENT, BR, BD, VEC
                        )
                    if LATENTS:
                        at_z = i_b * latent_rows // B * latent_steps + tl.where(latent_steps > 1, i_t, 0)
                        b_z = tl.load(p_latents + at_z * R + o_r, mask=o_r < R, other=0.0)  # [BR], rows of L
                        m_l = (o_r[:, None] < R) & (o_r[None, :] <= o_r[:, None])
                        p_l = p_cholesky + (k * R + o_r[:, None]) * R + o_r[None, :]
                        b_uc += tl.sum(tl.load(p_l, mask=m_l, other=0.0) * b_z[:, None], axis=0)  # [BR], columns
                    b_u = tl.where(o_c[:, None] == c, b_uc[None, :], b_u)
        factor = 1.0
        if NORM:
            b_before = tl.zeros([BD], dtype=tl.float32)
            b_after = tl.zeros([BD], dtype=tl.float32)
            for d0 in range(0, D, BD):
                o_d = tl.max_contiguous(d0 + tl.arange(0, BD), VEC)  # [BD]
                b_x, b_out = steered_tile(
                    p_x, p_s, p_components, p_rows, p_scale, b_r, b_u, scale, weight, o_d, i_n, K, C, D, K_STRIDE * D,
                    R, PER_COMPONENT, MIXES, LATENTS or SPREADS, BC, BR,
                )  # fmt: skip
                b_before += tl.where(o_d < D, b_x * b_x, 0.0)
                b_after += tl.where(o_d < D, b_out * b_out, 0.0)
            before, after = tl.sum(b_before, axis=0), tl.sum(b_after, axis=0)
            factor = tl.where((after > 0) & (keeps != 0), tl.div_rn(tl.sqrt_rn(before), tl.sqrt_rn(after)), 1.0)
        for d0 in range(0 if WHOLE else i_d * BD, D if WHOLE else i_d * BD + 1, BD):
            o_d = tl.max_contiguous(d0 + tl.arange(0, BD), VEC)  # [BD]
            _, b_out = steered_tile(
                p_x, p_s, p_components, p_rows, p_scale, b_r, b_u, scale, weight, o_d, i_n, K, C, D, K_STRIDE * D,
                R, PER_COMPONENT, MIXES, LATENTS or SPREADS, BC, BR,
            )  # fmt: skip
            tl.store(p_y + o_d, (b_out * factor).to(p_out.dtype.element_ty), mask=o_d < D)
    else:
        for d0 in range(0 if WHOLE else i_d * BD, D if WHOLE else i_d * BD + 1, BD):
            o_d = d0 + tl.arange(0, BD)  # [BD]
            tl.store(p_y + o_d, tl.load(p_x + o_d, mask=o_d < D), mask=o_d < D)


def intervene(
    hidden: Tensor, edit: Edit, chosen: Tensor | None, passed: Tensor | None, active: ActivePairs | None,
    mixture: Mixture | None, per_component: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Steers as `mfa_kernels.ops.intervene.op.intervene`, hidden states that are not float64. Does not wait.

    The rows of the mixture are in the portable layout, (K, R + 1, D), or (K, R + 2, D) with noise per component.
    """
    hidden, (batch, tokens, features) = hidden.contiguous(), hidden.shape
    coefficients, shift, rules, thresholds, keeps_norm, latents, spreads = edit
    out, tally = torch.empty_like(hidden), thresholds.new_empty(batch, tokens, 3)
    if not hidden.numel():
        return out, tally
    slots = 0 if active is None else active.components.shape[1]
    count, rank = (0, 0) if mixture is None else mixture.cholesky.shape[:2]
    spreads = spreads and mixture is not None
    whole = spreads or keeps_norm
    tiles = _tiles(slots, rank, features)
    grid = batch * tokens * (1 if whole else triton.cdiv(features, tiles["BD"]))
    sizes = {"B": batch, "T": tokens, "K": count, "C": slots, "D": features, "rule_rows": rules.shape[0]}
    for name, tensor in {"coefficient": coefficients, "shift": shift, "latent": latents, "chosen": chosen}.items():
        sizes[f"{name}_rows"], sizes[f"{name}_steps"] = (1, 1) if tensor is None else tensor.shape[:2]
    flags = {"CHOSEN": chosen is not None, "PASSED": passed is not None, "HAS_PAIRS": active is not None}
    flags |= {"MIXES": mixture is not None, "LATENTS": latents is not None, "SPREADS": spreads, "NORM": keeps_norm}
    pairs, terms = active or (None,) * 4, (None,) * 3 if mixture is None else mixture[2:]
    operands = (*edit[:4], latents, chosen, passed, *pairs, *terms)
    tensors = [None if t is None else t.contiguous() for t in operands]
    shape = {"R": rank, "PER_COMPONENT": per_component, **tiles}
    with torch.cuda.device_of(hidden):
        intervene_kernel[(grid,)](hidden, out, tally, *tensors, **sizes, **flags, **shape, num_warps=_WARPS)
    return out, tally


def _tiles(slots: int, rank: int, features: int) -> dict[str, int]:
    """Tiles that hold all rows of a component: more rows mean fewer features."""
    rows = triton.next_power_of_2(max(1, rank))
    width = min(_FEATURES, triton.next_power_of_2(features), max(32, 32 * _WARPS * _ACCUMULATORS // rows))
    return {"BC": triton.next_power_of_2(max(1, slots)), "BR": rows, "BD": width, "VEC": vector(width, _WARPS)}

"""From the scan's partials to candidates, and from exact logits to log p(x) and the active pairs. One program a token.

`candidates`: with L the largest lower bound, whoever has upper bound >= L - T may be active; all others are below
T = log(K / eps) nats under the best, and weigh less than eps together. If one tile may hide more of them than it
reported, or they are more than the slots for candidates, the token is *crowded*: triton_dense.py decides it.

`finish`: exact logits of the candidates -> `ActivePairs`. `finish_dense`: every logit of crowded tokens ->
    `ActivePairs`.
`finish_fast`: straight from a scan without bounds (precision="fast").
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.scan.triton_scan import TOP, Partials
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.triton_rows import TILE

LOG_EPS = math.log(torch.finfo(torch.float32).eps)
MANY = 64  # slots, from which on sorting all logits of a token is faster


@triton.jit
def _threshold(K, LOG_EPS: tl.constexpr):
    """T, as `activity_threshold` has it."""
    return tl.log(tl.cast(K, tl.float32)) - LOG_EPS  # K = 1 arrives as a constant


@triton.jit
def _largest(p_values, count, BT: tl.constexpr):
    """The largest of `count` values; NaN does not count."""
    b_best = tl.full([BT], -float("inf"), tl.float32)
    for i in range(0, count, BT):
        o_i = i + tl.arange(0, BT)
        b_best = tl.maximum(b_best, tl.load(p_values + o_i, o_i < count, -float("inf")))
    return tl.max(b_best, 0)


@triton.jit
def _hides_more(o_e, K, TILE: tl.constexpr, TOP: tl.constexpr):
    """Whether an entry is the last that its tile reports, of a tile that has more components."""
    return (o_e % TOP == TOP - 1) & (K - o_e // TOP * TILE > TOP)


@triton.jit
def candidates_kernel(
    p_upper,  # (N, tiles, TOP)
    p_found,  # (N, tiles, TOP) int32
    p_lower,  # (N, tiles)
    p_norms,  # (3, N)
    p_components,  # (N, C) int32
    p_crowded,  # (N,) int32
    p_left,  # (N,): the largest upper bound of those that are no candidates; or None
    K,
    tiles,
    TILE: tl.constexpr,
    TOP: tl.constexpr,
    C: tl.constexpr,
    LOG_EPS: tl.constexpr,
    BT: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    b_window = _largest(p_lower + i_n * tiles, tiles, BT) - _threshold(K, LOG_EPS)

    b_count = tl.zeros([BT], tl.int32)
    b_hidden = tl.zeros([BT], tl.int32)
    b_left = tl.full([BT], -float("inf"), tl.float32)
    for e in range(0, tiles * TOP, BT):
        o_e = e + tl.arange(0, BT)
        b_upper = tl.load(p_upper + i_n * tiles * TOP + o_e, o_e < tiles * TOP, -float("inf"))
        b_in = (b_upper >= b_window) & (b_upper > -float("inf"))
        b_count += b_in.to(tl.int32)
        b_hidden += (b_in & _hides_more(o_e, K, TILE, TOP)).to(tl.int32)
        b_left = tl.maximum(b_left, tl.where(b_in, -float("inf"), b_upper))
    if p_left is not None:
        tl.store(p_left + i_n, tl.max(b_left, 0))
    count = tl.sum(b_count, 0)
    finite = tl.load(p_norms + i_n) < float("inf")  # false for NaN too
    # No candidate at all: every logit is -inf or NaN, and the dense path says so.
    crowded = finite & ((tl.sum(b_hidden, 0) > 0) | (count > C) | (count == 0))
    tl.store(p_crowded + i_n, crowded.to(tl.int32))
    count = tl.where(finite & (crowded == 0), count, 0)
    o_c = tl.arange(0, C)
    tl.store(p_components + i_n * C + o_c, tl.full([C], -1, tl.int32), o_c >= count)
    if count > 0:
        first = 0
        for e in range(0, tiles * TOP, BT):
            o_e = e + tl.arange(0, BT)
            b_upper = tl.load(p_upper + i_n * tiles * TOP + o_e, o_e < tiles * TOP, -float("inf"))
            b_found = tl.load(p_found + i_n * tiles * TOP + o_e, o_e < tiles * TOP, 0)
            b_in = (b_upper >= b_window) & (b_upper > -float("inf"))
            o_slot = first + tl.cumsum(b_in.to(tl.int32), 0) - 1
            tl.store(p_components + i_n * C + o_slot, b_found, b_in)
            first += tl.sum(b_in.to(tl.int32), 0)


def _entries(tiles: int) -> dict[str, int]:
    """How kernels read the entries of a token's partials."""
    return {"TILE": TILE, "TOP": TOP, "BT": min(1024, triton.next_power_of_2(tiles * TOP)), "num_warps": 4}


def candidates(
    partials: Partials,
    norms: Tensor,
    components: int,
    slots: int,
    log_eps: float = LOG_EPS,
    left: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Who may be active: components (N, slots) int32, -1 where empty, and crowded (N,) int32.

    A token that is not finite, or crowded, has no candidates. T is log K - log_eps. Into `left` (N,) goes the largest
    upper bound of those that are no candidates; of a crowded token, of those reported.
    """
    count, tiles = partials.lower.shape
    found = partials.components.new_empty(count, slots)
    crowded = partials.components.new_empty(count)
    sizes = {"K": components, "tiles": tiles, "C": slots, "LOG_EPS": log_eps, **_entries(tiles)}
    candidates_kernel[(count,)](*partials[:3], norms, found, crowded, left, **sizes)
    return found, crowded


@triton.jit
def gather_kernel(
    p_flags,  # (N,) int32
    p_index,  # (N,) int32
    p_total,  # (1,) int32
    N,
    BN: tl.constexpr,
):
    """One program: the tokens whose flag is 1 first, in order, and how many they are."""
    total = 0
    for n in range(0, N, BN):
        o_n = n + tl.arange(0, BN)
        b_flag = tl.load(p_flags + o_n, o_n < N, 0)
        tl.store(p_index + total + tl.cumsum(b_flag, 0) - 1, o_n, b_flag == 1)
        total += tl.sum(b_flag, 0)
    tl.store(p_total, total)


@triton.jit
def finish_kernel(
    p_found,  # (N, C) int32
    p_exact,  # (N, C) logits, -inf where empty
    p_crowded,  # (N,) int32
    p_log_prob,  # (N,)
    p_components,  # (N, S) int32
    p_logits,  # (N, S)
    p_counts,  # (N,) int32
    K,
    S,
    C: tl.constexpr,
    BS: tl.constexpr,
    LOG_EPS: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    if tl.load(p_crowded + i_n) == 0:
        o_c = tl.arange(0, C)
        b_logit = tl.load(p_exact + i_n * C + o_c)
        b_found = tl.load(p_found + i_n * C + o_c)
        b_bad = tl.sum((b_logit != b_logit).to(tl.int32), 0) > 0
        b_best = tl.max(b_logit, 0)
        b_bad = b_bad | (b_best == -float("inf"))
        b_sum = tl.sum(tl.exp(b_logit - tl.where(b_bad, 0.0, b_best)), 0)
        tl.store(p_log_prob + i_n, tl.where(b_bad, float("nan"), b_best + tl.log(b_sum)))
        b_active = (b_logit >= b_best - _threshold(K, LOG_EPS)) & (b_bad == 0) & (b_found >= 0)
        b_logit = tl.where(b_active, b_logit, -float("inf"))
        b_found = tl.where(b_active, b_found, -1)
        # Its place: how many are larger, or as large and of a lower index.
        b_before = (b_logit[None, :] > b_logit[:, None]) | (
            (b_logit[None, :] == b_logit[:, None]) & (o_c[None, :] < o_c[:, None])
        )
        o_place = tl.sum(b_before.to(tl.int32), 1)
        tl.store(p_logits + i_n * S + o_place, b_logit, o_place < S)
        tl.store(p_components + i_n * S + o_place, b_found, o_place < S)
        b_count = tl.sum(b_active.to(tl.int32), 0)
        tl.store(p_counts + i_n, tl.minimum(b_count, S + 1))
        o_s = tl.arange(0, BS)
        m_empty = (o_s >= C) & (o_s < S)
        tl.store(p_logits + i_n * S + o_s, tl.full([BS], -float("inf"), tl.float32), m_empty)
        tl.store(p_components + i_n * S + o_s, tl.full([BS], -1, tl.int32), m_empty)


@triton.jit
def finish_dense_kernel(
    p_logits,  # (n, K) of the tokens p_index[0 : n]
    p_index,  # (n,) int32
    p_count,  # (1,) int32: how many of the n are real
    p_log_prob,  # (N,)
    p_components,  # (N, S) int32
    p_best,  # (N, S) logits
    p_counts,  # (N,) int32
    K,
    S,
    LOG_EPS: tl.constexpr,
    BK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    if i < tl.load(p_count):
        i_n = tl.load(p_index + i).to(tl.int64)
        b_largest = tl.full([BK], -float("inf"), tl.float32)
        b_bad = tl.zeros([BK], tl.int32)
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            b_logit = tl.load(p_logits + i * K + o_k, o_k < K, -float("inf"))
            b_bad += (b_logit != b_logit).to(tl.int32)
            b_largest = tl.maximum(b_largest, b_logit)
        b_top = tl.max(b_largest, 0)
        bad = (tl.sum(b_bad, 0) > 0) | (b_top == -float("inf"))
        b_shift = tl.where(bad, 0.0, b_top)
        b_least = b_top - _threshold(K, LOG_EPS)
        b_sum = tl.zeros([BK], tl.float32)
        b_active = tl.zeros([BK], tl.int32)
        for k in range(0, K, BK):
            o_k = k + tl.arange(0, BK)
            b_logit = tl.load(p_logits + i * K + o_k, o_k < K, -float("inf"))
            b_sum += tl.exp(b_logit - b_shift)
            b_active += ((b_logit >= b_least) & (b_logit > -float("inf"))).to(tl.int32)
        log_prob = tl.where(bad, float("nan"), b_top + tl.log(tl.sum(b_sum, 0)))
        count = tl.where(bad, 0, tl.minimum(tl.sum(b_active, 0), S + 1))
        tl.store(p_log_prob + i_n, log_prob)
        tl.store(p_counts + i_n, count)
        # The slots: again and again the largest that comes after the last one taken.
        last_logit = float("inf")
        last = -1
        for s in range(0, S):
            b_next = tl.full([BK], -float("inf"), tl.float32)
            b_index = tl.full([BK], 2147483647, tl.int32)
            for k in range(0, K, BK):
                o_k = k + tl.arange(0, BK)
                b_logit = tl.load(p_logits + i * K + o_k, o_k < K, -float("inf"))
                b_after = (b_logit < last_logit) | ((b_logit == last_logit) & (o_k > last))
                b_take = b_after & (o_k < K) & (b_logit > b_next)
                b_index = tl.where(b_take, o_k, b_index)
                b_next = tl.where(b_take, b_logit, b_next)
            last_logit = tl.max(b_next, 0)
            last = tl.min(tl.where(b_next == last_logit, b_index, 2147483647), 0)
            held = s < tl.minimum(count, S)
            tl.store(p_best + i_n * S + s, tl.where(held, last_logit, -float("inf")))
            tl.store(p_components + i_n * S + s, tl.where(held, last, -1))


@triton.jit
def finish_fast_kernel(
    p_upper,  # (N, tiles, TOP) logits
    p_found,  # (N, tiles, TOP) int32
    p_largest,  # (N, tiles)
    p_sums,  # (N, tiles)
    p_length,  # (N,): |y|^2, for noise that all components share
    p_log_prob,  # (N,)
    p_components,  # (N, S) int32
    p_logits,  # (N, S)
    p_counts,  # (N,) int32
    K,
    tiles,
    S,
    TILE: tl.constexpr,
    TOP: tl.constexpr,
    LOG_EPS: tl.constexpr,
    SHARED: tl.constexpr,
    BT: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    b_top = _largest(p_largest + i_n * tiles, tiles, BT)
    b_common = 0.0
    if SHARED:
        b_common = 0.5 * tl.load(p_length + i_n)
    b_sum = tl.zeros([BT], tl.float32)
    for t in range(0, tiles, BT):
        o_t = t + tl.arange(0, BT)
        b_largest = tl.load(p_largest + i_n * tiles + o_t, o_t < tiles, -float("inf"))
        b_sum += tl.load(p_sums + i_n * tiles + o_t, o_t < tiles, 0.0) * tl.exp(b_largest - b_top)
    log_prob = b_top + tl.log(tl.sum(b_sum, 0)) - b_common
    log_prob = tl.where((log_prob == log_prob) & (b_top > -float("inf")), log_prob, float("nan"))
    tl.store(p_log_prob + i_n, log_prob)
    b_least = b_top - _threshold(K, LOG_EPS)
    b_active = tl.zeros([BT], tl.int32)
    for e in range(0, tiles * TOP, BT):
        o_e = e + tl.arange(0, BT)
        b_logit = tl.load(p_upper + i_n * tiles * TOP + o_e, o_e < tiles * TOP, -float("inf"))
        b_in = (b_logit >= b_least) & (b_logit > -float("inf"))
        b_active += tl.where(b_in & _hides_more(o_e, K, TILE, TOP), S + 1, b_in.to(tl.int32))
    count = tl.where(log_prob == log_prob, tl.minimum(tl.sum(b_active, 0), S + 1), 0)
    tl.store(p_counts + i_n, count)
    last_logit = float("inf")
    last = -1
    for s in range(0, S):
        b_next = tl.full([BT], -float("inf"), tl.float32)
        b_entry = tl.full([BT], 2147483647, tl.int32)
        for e in range(0, tiles * TOP, BT):
            o_e = e + tl.arange(0, BT)
            b_logit = tl.load(p_upper + i_n * tiles * TOP + o_e, o_e < tiles * TOP, -float("inf"))
            b_after = (b_logit < last_logit) | ((b_logit == last_logit) & (o_e > last))
            b_take = b_after & (o_e < tiles * TOP) & (b_logit > b_next)
            b_entry = tl.where(b_take, o_e, b_entry)
            b_next = tl.where(b_take, b_logit, b_next)
        last_logit = tl.max(b_next, 0)
        last = tl.min(tl.where(b_next == last_logit, b_entry, 2147483647), 0)
        held = (s < tl.minimum(count, S)) & (last_logit > -float("inf"))
        b_component = tl.load(p_found + i_n * tiles * TOP + last, held, -1)
        tl.store(p_logits + i_n * S + s, tl.where(held, last_logit - b_common, -float("inf")))
        tl.store(p_components + i_n * S + s, tl.where(held, b_component, -1))


def gather(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (N,) int32 of the tokens whose flag (N,) int32 is 1, and their number (1,): the rest is 0."""
    index, total = torch.zeros_like(flags), flags.new_empty(1)
    gather_kernel[(1,)](flags, index, total, N=flags.shape[0], BN=4096, num_warps=8)
    return index, total


def finish(
    found: Tensor, exact: Tensor, crowded: Tensor, components: int, out: ActivePairs, log_eps: float = LOG_EPS
) -> None:
    """Writes the tokens that are not crowded."""
    count, slots = out.components.shape
    sizes = {"K": components, "S": slots, "C": found.shape[1], "BS": triton.next_power_of_2(slots)}
    finish_kernel[(count,)](found, exact, crowded, *out, **sizes, LOG_EPS=log_eps, num_warps=1)


def finish_dense(
    logits: Tensor, index: Tensor, count: Tensor, components: int, out: ActivePairs, log_eps: float = LOG_EPS
) -> None:
    """Writes tokens index[i], i < count, from all their logits (n, K)."""
    slots = out.components.shape[1]
    if slots > MANY:
        _finish_many(logits, index, count, out, log_eps)
        return
    sizes = {"K": components, "S": slots, "BK": min(2048, triton.next_power_of_2(components))}
    finish_dense_kernel[(index.shape[0],)](logits, index, count, *out, **sizes, LOG_EPS=log_eps, num_warps=4)


def _finish_many(logits: Tensor, index: Tensor, count: Tensor, out: ActivePairs, log_eps: float) -> None:
    """finish_dense for more slots than a kernel should search one by one: by sorting."""
    slots, rows = out.components.shape[1], index.shape[0]
    logits = logits[:rows]
    value = torch.logsumexp(logits, -1)
    value = value.masked_fill(value == -torch.inf, torch.nan)
    least = logits.amax(-1, keepdim=True) - (math.log(logits.shape[1]) - log_eps)
    active = (logits >= least) & (logits > -torch.inf)
    found = active.sum(-1).masked_fill(value.isnan(), 0)
    ordered, components = logits.masked_fill(~active, -torch.inf).topk(min(slots, logits.shape[1]), -1)
    ordered = torch.nn.functional.pad(ordered, (0, slots - ordered.shape[1]), value=-torch.inf)
    components = torch.nn.functional.pad(components, (0, slots - components.shape[1]))
    ordered = ordered.masked_fill(value.isnan().unsqueeze(-1), -torch.inf)
    components = components.masked_fill(ordered == -torch.inf, -1).int()
    real = torch.arange(rows, device=logits.device) < count
    # Rows beyond the count write what the first one writes, to where it does; without any, nothing changes.
    n = torch.where(real, index, index[0]).long()
    for own, new in zip(out, (value, components, ordered, found.clamp_max(slots + 1).int())):
        first = torch.where(real[0], new[:1], own[n[:1]])
        own[n] = torch.where(real if own.dim() == 1 else real.unsqueeze(-1), new, first)


def finish_fast(partials: Partials, length: Tensor, shared: bool, components: int, out: ActivePairs) -> None:
    """Writes every token from a scan without bounds."""
    count, tiles = partials.lower.shape
    sizes = {"K": components, "tiles": tiles, "S": out.components.shape[1], **_entries(tiles)}
    finish_fast_kernel[(count,)](*partials, length, *out, **sizes, LOG_EPS=LOG_EPS, SHARED=shared)

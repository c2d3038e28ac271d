"""Merges the scan's partials into candidates, and exact logits into log p(x) and active pairs.

`candidates`: with L the largest lower bound, a component whose upper bound is at least L - T may be active. All others
are below T = log(K / eps) nats under the best, and weigh less than eps together. The candidates of a token overflow
where a tile may hide more of them than it reported, or where they are more than the slots; triton_all_logits.py then
computes all its logits.
`finish`: exact logits of the candidates -> `ActivePairs`.
`finish_all_logits`: every logit of some tokens -> `ActivePairs`.
`finish_fast`: a scan without bounds (precision="fast") -> `ActivePairs`.

A program owns one token.
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
MANY = 64  # with more slots than this, sorting all logits of a token is faster


@triton.jit
def _threshold(K, LOG_EPS: tl.constexpr):
    """T, by the formula of `activity_threshold`."""
    return tl.log(tl.cast(K, tl.float32)) - LOG_EPS  # K = 1 arrives as a constant


@triton.jit
def _largest(p_values, count, BT: tl.constexpr):
    """The largest of `count` values, without those that are NaN."""
    b_best = tl.full([BT], -float("inf"), tl.float32)
    for i in range(0, count, BT):
        o_i = i + tl.arange(0, BT)
        b_best = tl.maximum(b_best, tl.load(p_values + o_i, o_i < count, -float("inf")))
    return tl.max(b_best, 0)


@triton.jit
def take_largest(p_values, count, last_value, last, BT: tl.constexpr):
    """The next of `count` values in falling order after (last_value, last), and its place; equal ones go by place."""
    b_next = tl.full([BT], -float("inf"), tl.float32)
    b_place = tl.full([BT], 2147483647, tl.int32)
    for i in range(0, count, BT):
        o_i = i + tl.arange(0, BT)
        b_value = tl.load(p_values + o_i, o_i < count, -float("inf"))
        b_after = (b_value < last_value) | ((b_value == last_value) & (o_i > last))
        b_take = b_after & (o_i < count) & (b_value > b_next)
        b_place = tl.where(b_take, o_i, b_place)
        b_next = tl.where(b_take, b_value, b_next)
    value = tl.max(b_next, 0)
    return value, tl.min(tl.where(b_next == value, b_place, 2147483647), 0)


@triton.jit
def _hides_more(o_e, K, TILE: tl.constexpr, TOP: tl.constexpr):
    """True where an entry is the last that its tile reports, and the tile has more components."""
    return (o_e % TOP == TOP - 1) & (K - o_e // TOP * TILE > TOP)


@triton.jit
def candidates_kernel(
    p_upper,  # (N, tiles, TOP)
    p_found,  # (N, tiles, TOP) int32
    p_lower,  # (N, tiles)
    p_norms,  # (3, N)
    p_components,  # (N, C) int32
    p_candidate_overflow,  # (N,) int32
    p_left,  # (N,), or None: the largest upper bound of a component that is no candidate
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
    # Without a candidate every logit is -inf or NaN, which only all logits can tell.
    candidate_overflow = finite & ((tl.sum(b_hidden, 0) > 0) | (count > C) | (count == 0))
    tl.store(p_candidate_overflow + i_n, candidate_overflow.to(tl.int32))
    count = tl.where(finite & (candidate_overflow == 0), count, 0)
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
    """Constants of the kernels that read a token's partials."""
    return {"TILE": TILE, "TOP": TOP, "BT": min(1024, triton.next_power_of_2(tiles * TOP)), "num_warps": 4}


def candidates(
    partials: Partials,
    norms: Tensor,
    components: int,
    slots: int,
    log_eps: float = LOG_EPS,
    left: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Components that may be active (N, slots) int32, -1 where empty, and where they overflow (N,) int32: 0 or 1.

    A token that is not finite, or whose candidates overflow, has none. T is log K - log_eps. Into `left` (N,) goes the
    largest upper bound of a component that is no candidate; where candidates overflow, of those reported.
    """
    count, tiles = partials.lower.shape
    found = partials.components.new_empty(count, slots)
    candidate_overflow = partials.components.new_empty(count)
    sizes = {"K": components, "tiles": tiles, "C": slots, "LOG_EPS": log_eps, **_entries(tiles)}
    candidates_kernel[(count,)](*partials[:3], norms, found, candidate_overflow, left, **sizes)
    return found, candidate_overflow


@triton.jit
def gather_kernel(
    p_flags,  # (N,) int32
    p_index,  # (N,) int32
    p_total,  # (1,) int32
    N,
    BN: tl.constexpr,
):
    """Writes the tokens whose flag is 1, in order, and how many they are, by one program."""
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
    p_candidate_overflow,  # (N,) int32
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
    if tl.load(p_candidate_overflow + i_n) == 0:
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
        # The place of a logit is the number of those that are larger, or as large and of a lower index.
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
def finish_all_logits_kernel(
    p_logits,  # (n, K) of the tokens p_index[0 : n]
    p_index,  # (n,) int32
    p_count,  # (1,) int32: how many of the n are in use
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
        last_logit = float("inf")
        last = -1
        for s in range(0, S):
            last_logit, last = take_largest(p_logits + i * K, K, last_logit, last, BK)
            is_pair = s < tl.minimum(count, S)
            tl.store(p_best + i_n * S + s, tl.where(is_pair, last_logit, -float("inf")))
            tl.store(p_components + i_n * S + s, tl.where(is_pair, last, -1))


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
        last_logit, last = take_largest(p_upper + i_n * tiles * TOP, tiles * TOP, last_logit, last, BT)
        is_pair = (s < tl.minimum(count, S)) & (last_logit > -float("inf"))
        b_component = tl.load(p_found + i_n * tiles * TOP + last, is_pair, -1)
        tl.store(p_logits + i_n * S + s, tl.where(is_pair, last_logit - b_common, -float("inf")))
        tl.store(p_components + i_n * S + s, tl.where(is_pair, b_component, -1))


def gather(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (N,) int32 of the tokens whose flag (N,) int32 is 1, padded with 0, and their number (1,)."""
    index, total = torch.zeros_like(flags), flags.new_empty(1)
    gather_kernel[(1,)](flags, index, total, N=flags.shape[0], BN=4096, num_warps=8)
    return index, total


def finish(
    found: Tensor,
    exact: Tensor,
    candidate_overflow: Tensor,
    components: int,
    out: ActivePairs,
    log_eps: float = LOG_EPS,
) -> None:
    """Writes the tokens whose candidates do not overflow."""
    count, slots = out.components.shape
    sizes = {"K": components, "S": slots, "C": found.shape[1], "BS": triton.next_power_of_2(slots)}
    finish_kernel[(count,)](found, exact, candidate_overflow, *out, **sizes, LOG_EPS=log_eps, num_warps=1)


def finish_all_logits(
    logits: Tensor, index: Tensor, count: Tensor, components: int, out: ActivePairs, log_eps: float = LOG_EPS
) -> None:
    """Writes tokens index[i], i < count, from all their logits (n, K)."""
    slots = out.components.shape[1]
    if slots > MANY:
        _finish_many(logits, index, count, out, log_eps)
        return
    sizes = {"K": components, "S": slots, "BK": min(2048, triton.next_power_of_2(components))}
    finish_all_logits_kernel[(index.shape[0],)](logits, index, count, *out, **sizes, LOG_EPS=log_eps, num_warps=4)


def _finish_many(logits: Tensor, index: Tensor, count: Tensor, out: ActivePairs, log_eps: float) -> None:
    """Does the same by sorting, for more slots than a kernel should search one by one."""
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
    # Rows beyond the count write the first row's values to its place; where no row counts, its old values.
    n = torch.where(real, index, index[0]).long()
    for own, new in zip(out, (value, components, ordered, found.clamp_max(slots + 1).int())):
        first = torch.where(real[0], new[:1], own[n[:1]])
        own[n] = torch.where(real if own.dim() == 1 else real.unsqueeze(-1), new, first)


def finish_fast(partials: Partials, length: Tensor, shared: bool, components: int, out: ActivePairs) -> None:
    """Writes every token from a scan without bounds."""
    count, tiles = partials.lower.shape
    sizes = {"K": components, "tiles": tiles, "S": out.components.shape[1], **_entries(tiles)}
    finish_fast_kernel[(count,)](*partials, length, *out, **sizes, LOG_EPS=LOG_EPS, SHARED=shared)

"""Nearest centroids on a GPU: fp16 products, and exact distances of those that could be nearest.

    score_nk = y_n.c_k - |c_k|^2 / 2,   y = x - center:   the nearest centroid has the largest score

A program of `nearest_kernel` owns BN rows and a band of the centroids. It multiplies the rows with BK centroids at a
time and keeps, per row, the largest lower bound of a score, and the first C centroids whose upper bound reached it.
Thanks to the bands, programs that run together share rows in the second-level cache. `finish_kernel` drops contenders
below the largest lower bound of all bands and decides between the others by |y - c|^2 in float32. Never materialised:
N x K of anything; 8 C + 8 bytes per row and band leave the chip.

The bound. With y^ = s_n rows_n and c^ = s_k centroids_k in fp16, |y^ - y| <= eta_n, |y| <= a_n (triton_tokens.py, which
measures them), and every sum of D products off by at most g = D 2^-23 of the norms:

    |y^.c^ - y.c|  <=  a_n A_k + eta_n B_k,     A_k = eta_k + g (a_k + eta_k),    B_k = (1 + g) (a_k + eta_k)

|c_k|^2 / 2, in a tree of D / 1024 + 10 additions, is off by less than H_k = (D / 1024 + 20) 2^-23 of itself. Together
at most (a_n w + eta_n b + w') sqrt(|c_k|^2 / 2), with w, b and w' the largest ratios of A, B and H to that root. So a
bound grows with its own centroid: a language model has tokens a hundred times longer than all others.

Exact: a centroid that is left out is farther than the one that is chosen; of equal float32 distances, the lowest index
wins. A row with more contenders than a band has room for *overflows*: `every_kernel` compares it with all centroids, by
differences. Nothing asks the device how many rows do. Floor: 2 N K D flops (README.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.triton_fp16 import FEATURES, descriptors, sum_error
from mfa_kernels.ops.common.triton_tokens import scan_tokens

BANDS = 8
"""Programs that share the centroids, at most: with 16 tiles of rows, a wave of programs on a large GPU."""
CONTENDERS = 8
"""Room for contenders per row and band: a new one each time that the best score is beaten, or nearly."""
_EVERY = {"BN": 8, "BK": 4, "BD": 128}  # rows x centroids x features in registers: 32 partial sums a thread
_LARGEST_BLOCK = 1024
"""Features of a row that `finish_kernel` compares at a time, at most."""
_PROGRAMS = 1 << 12
"""Programs of `every_kernel`, at most: more than run at a time, few enough to stop unused ones quickly."""


@triton.jit
def _contend(
    b_product,  # [BN, BK]
    k,  # the first of BK centroids
    b_s,  # [BN], as all that follow
    b_e,
    b_room,
    b_lower,
    b_missed,
    b_count,
    p_scales,  # (K,)
    p_half,  # (K,)
    p_found,  # [BN] addresses of C contenders
    p_upper,
    m_n,
    K,
    BK: tl.constexpr,
):
    """Notes each of BK centroids that may be nearer than all before them, and raises the lower bound to its own."""
    o_k = tl.arange(0, BK)[None, :]  # [1, BK]
    m_k = k + o_k < K
    b_half = tl.load(p_half + k + o_k, m_k, 0.0)
    b_upper = b_product * b_s[:, None] * tl.load(p_scales + k + o_k, m_k, 0.0) - b_half
    b_upper += b_e[:, None] * tl.sqrt(b_half) + 2.384185791015625e-07 * tl.abs(b_upper)  # 2^-22
    b_upper = tl.where(m_k, b_upper, -float("inf"))
    b_best = tl.max(b_upper, 1)
    m_new = (b_best >= b_lower) & (b_best > -float("inf")) & (b_count < b_room)
    while tl.max(m_new.to(tl.int32), 0) > 0:
        b_index = tl.min(tl.where(b_upper == b_best[:, None], o_k, BK), 1)
        tl.store(p_found + b_count, k + b_index, m_new & m_n)
        tl.store(p_upper + b_count, b_best, m_new & m_n)
        b_count += m_new.to(tl.int32)
        b_root = tl.sqrt(tl.load(p_half + k + b_index, m_new, 0.0))
        b_low = b_best - 2.001 * (b_e * b_root + 2.384185791015625e-07 * tl.abs(b_best))
        b_lower = tl.where(m_new, tl.maximum(b_lower, b_low), b_lower)
        b_upper = tl.where(m_new[:, None] & (o_k == b_index[:, None]), -float("inf"), b_upper)
        b_best = tl.max(b_upper, 1)
        m_new = (b_best >= b_lower) & (b_best > -float("inf")) & (b_count < b_room)
    b_missed = tl.maximum(b_missed, tl.where(b_best >= b_lower, b_best, -float("inf")))
    return b_lower, b_missed, b_count


@triton.jit
def nearest_kernel(
    p_rows,  # (N, D') fp16, or its descriptor
    p_centroids,  # (K, D') fp16, or its descriptor
    p_row_scales,  # (N,)
    p_norms,  # (3, N): a, eta
    p_scales,  # (K,)
    p_half,  # (K,): |c|^2 / 2
    p_worst,  # (3,): w, b and w'
    p_found,  # (N, BANDS, C) int32
    p_upper,  # (N, BANDS, C)
    p_lower,  # (N, BANDS): the largest lower bound
    p_missed,  # (N, BANDS): the largest upper bound for which there was no room
    N,
    K,
    PADDED,
    BANDS: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    SWIZZLE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    # SWIZZLE tiles of rows share the bands in the second-level cache.
    tiles_n = tl.cdiv(N, BN)
    i_group = tl.program_id(0) // (SWIZZLE * BANDS)
    in_group = tl.minimum(tiles_n - i_group * SWIZZLE, SWIZZLE)
    i_n = i_group * SWIZZLE + (tl.program_id(0) % (SWIZZLE * BANDS)) % in_group
    i_band = (tl.program_id(0) % (SWIZZLE * BANDS)) // in_group

    # Rows beyond the end repeat the last one, so that the inner loop needs no mask.
    o_n = tl.minimum(i_n * BN + tl.arange(0, BN), N - 1).to(tl.int64)  # [BN]
    m_n = i_n * BN + tl.arange(0, BN) < N
    b_s = tl.load(p_row_scales + o_n)
    b_a = tl.load(p_norms + o_n)
    b_e = b_a * tl.load(p_worst) + tl.load(p_norms + N + o_n) * tl.load(p_worst + 1) + tl.load(p_worst + 2)
    b_room = tl.where(b_a < float("inf"), C, 0)  # a row that is not finite has no contenders
    b_count = tl.zeros([BN], tl.int32)
    b_lower = tl.full([BN], -float("inf"), tl.float32)
    b_missed = tl.full([BN], -float("inf"), tl.float32)
    p_slot = (o_n * BANDS + i_band) * C  # [BN]

    band = tl.cdiv(tl.cdiv(K, BK), BANDS) * BK
    for k in range(i_band * band, tl.minimum(i_band * band + band, K), BK):
        o_k = tl.minimum(k + tl.arange(0, BK), K - 1)  # [BK]
        b_product = tl.zeros([BN, BK], tl.float32)
        for d in range(0, PADDED, BD):
            if DESCRIPTOR:
                b_y = p_rows.load([i_n * BN, d])  # [BN, BD]
                b_c = p_centroids.load([k, d])  # [BK, BD]
            else:
                o_d = d + tl.arange(0, BD)
                b_y = tl.load(p_rows + o_n[:, None] * PADDED + o_d[None, :])
                b_c = tl.load(p_centroids + o_k.to(tl.int64)[:, None] * PADDED + o_d[None, :])
            b_product = tl.dot(b_y, tl.trans(b_c), b_product, out_dtype=tl.float32)
        b_lower, b_missed, b_count = _contend(
            b_product, k, b_s, b_e, b_room, b_lower, b_missed, b_count, p_scales, p_half,
            p_found + p_slot, p_upper + p_slot, m_n, K, BK,
        )  # fmt: skip
    tl.store(p_lower + o_n * BANDS + i_band, b_lower, m_n)
    tl.store(p_missed + o_n * BANDS + i_band, b_missed, m_n)
    o_c = tl.arange(0, C)[None, :]  # [1, C]
    m_empty = m_n[:, None] & (o_c >= b_count[:, None])
    tl.store(p_upper + p_slot[:, None] + o_c, tl.full([BN, C], -float("inf"), tl.float32), m_empty)


@triton.jit
def every_kernel(
    p_x,  # (N, D)
    p_center,  # (D,)
    p_centroids,  # (K, D)
    p_index,  # (N,): the rows that overflow first
    p_total,  # (1,): how many overflow
    p_found,  # (N, SLOTS) int32
    p_upper,  # (N, SLOTS)
    K,
    D,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Makes the nearest centroid of each of SLOTS parts of them a contender that cannot be dropped."""
    total = tl.load(p_total).to(tl.int32)
    part = tl.cdiv(K, SLOTS)
    for i in range(tl.program_id(0), tl.cdiv(total, BN) * SLOTS, tl.num_programs(0)):
        i_slot = i % SLOTS
        o_i = i // SLOTS * BN + tl.arange(0, BN)  # [BN]
        m_i = o_i < total
        o_n = tl.load(p_index + o_i, m_i, 0).to(tl.int64)
        b_best = tl.full([BN], float("inf"), tl.float32)
        b_owner = tl.full([BN], -1, tl.int32)
        last = tl.minimum(i_slot * part + part, K)
        for k in range(i_slot * part, last, BK):
            o_k = k + tl.arange(0, BK)  # [BK]
            p_c = p_centroids + o_k.to(tl.int64)[None, :, None] * D
            b_square = tl.zeros([BN, BK, BD], tl.float32)
            for d in range(0, D, BD):
                o_d = d + tl.arange(0, BD)
                m_d = (o_d < D)[None, None, :]
                b_x = tl.load(p_x + o_n[:, None, None] * D + o_d[None, None, :], m_i[:, None, None] & m_d, 0.0)
                b_y = b_x.to(tl.float32) - tl.load(p_center + o_d, o_d < D, 0.0)[None, None, :]  # [BN, 1, BD]
                b_gap = b_y - tl.load(p_c + o_d[None, None, :], (o_k < last)[None, :, None] & m_d, 0.0)
                b_square += b_gap * b_gap
            b_distance = tl.where((o_k < last)[None, :], tl.sum(b_square, 2), float("inf"))  # [BN, BK]
            b_least, b_at = tl.min(b_distance, 1, return_indices=True)
            b_owner = tl.where(b_least < b_best, k + b_at, b_owner)
            b_best = tl.minimum(b_best, b_least)
        tl.store(p_found + o_n * SLOTS + i_slot, b_owner, m_i)
        tl.store(p_upper + o_n * SLOTS + i_slot, tl.where(b_owner >= 0, float("inf"), -float("inf")), m_i)


@triton.jit
def finish_kernel(
    p_x,  # (N, D)
    p_center,  # (D,)
    p_centroids,  # (K, D)
    p_found,  # (N, SLOTS) int32
    p_upper,  # (N, SLOTS)
    p_floor,  # (N,): the largest lower bound
    p_owner,  # (N,) int64
    p_distance,  # (N,)
    K,
    D,
    SLOTS: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, SLOTS)
    b_upper = tl.load(p_upper + i_n * SLOTS + o_s)  # [SLOTS]
    m_s = (b_upper >= tl.load(p_floor + i_n)) & (b_upper > -float("inf"))
    b_found = tl.where(m_s, tl.load(p_found + i_n * SLOTS + o_s, m_s, 0), K)
    best = float("inf")
    owner = K
    k = tl.min(b_found, 0)
    while k < K:  # k ascends, so that of equal distances the first stays
        b_square = tl.zeros([BD], tl.float32)
        for d in range(0, D, BD):
            o_d = d + tl.arange(0, BD)
            m_d = o_d < D
            b_y = tl.load(p_x + i_n * D + o_d, m_d, 0.0).to(tl.float32) - tl.load(p_center + o_d, m_d, 0.0)
            b_gap = b_y - tl.load(p_centroids + k.to(tl.int64) * D + o_d, m_d, 0.0)
            b_square += b_gap * b_gap
        distance = tl.sum(b_square, 0)
        owner = tl.where(distance < best, k, owner)
        best = tl.minimum(best, distance)
        b_found = tl.where(b_found == k, K, b_found)
        k = tl.min(b_found, 0)
    tl.store(p_owner + i_n, owner.to(tl.int64))
    tl.store(p_distance + i_n, tl.where(best < float("inf"), best, float("nan")))


def nearest(x: Tensor, centroids: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the nearest centroid of every row, as `mfa_kernels.ops.kmeans.op.nearest`. Does not wait for the device.

    Args:
        x: (N, D) contiguous, bfloat16, float16 or float32.
        centroids: (K, D) contiguous float32, K < 2^31.
        center: (D,) float32.
    """
    (rows, features), count = x.shape, len(centroids)
    owner, distance = x.new_empty(rows, dtype=torch.int64), centroids.new_empty(rows)
    if rows == 0:
        return owner, distance
    config = configs.configured(configs.Nearest, x, rows, count)
    padded = -(-features // FEATURES) * FEATURES
    ones = torch.ones_like(center)
    with torch.cuda.device_of(x):
        y = scan_tokens(x, ones, center, padded, False)
        c = scan_tokens(centroids, ones, torch.zeros_like(center), padded, False)
        half, worst = _bounds(c.norms, c.length, features)
        bands = min(BANDS, triton.next_power_of_2(triton.cdiv(count, config.centroids)))
        slots = bands * CONTENDERS
        new = centroids.new_empty
        found, upper = new(rows, slots, dtype=torch.int32), new(rows, slots)
        lower, missed = new(rows, bands), new(rows, bands)
        heights = (config.tokens, config.centroids)
        operands, used = descriptors((y.tokens, c.tokens), heights, config.features, config.descriptors)
        tiles = {"BN": config.tokens, "BK": config.centroids, "BD": config.features, "SWIZZLE": config.swizzle}
        sizes = {"N": rows, "K": count, "PADDED": padded, "BANDS": bands, "C": CONTENDERS, "DESCRIPTOR": used}
        options = {"num_warps": config.warps, "num_stages": config.stages}
        scales = (y.scales, y.norms, c.scales, half, worst)
        nearest_kernel[(triton.cdiv(rows, config.tokens) * bands,)](
            *operands, *scales, found, upper, lower, missed, **sizes, **tiles, **options
        )
        floor = lower.amax(1)
        overflows = (missed.amax(1) >= floor) & (floor > -torch.inf)  # a row that is not finite has no bounds
        index = overflows.int().argsort(descending=True, stable=True)
        sizes = {"K": count, "D": features, "SLOTS": slots, "num_warps": 4}
        every_kernel[(min(_PROGRAMS, triton.cdiv(rows, _EVERY["BN"]) * slots),)](
            x, center, centroids, index, overflows.sum(), found, upper, **sizes, **_EVERY
        )
        block = min(_LARGEST_BLOCK, triton.next_power_of_2(features))
        finish_kernel[(rows,)](x, center, centroids, found, upper, floor, owner, distance, **sizes, BD=block)
    return owner, distance


def _bounds(norms: Tensor, length: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """|c|^2 / 2, (K,), and the largest ratios w, b and w' (3,) of the header's bounds to its root."""
    g, half = sum_error(features), 0.5 * length
    size = norms[0] + norms[1]
    bounds = torch.stack([norms[1] + g * size, (1 + g) * size, (features / 1024 + 20) * 2.0**-23 * half])
    ratios = (1 + 2.0**-10) * bounds / half.sqrt()  # covers the roundings of this line
    # A centroid that is not finite is nearest to no row, and must not spoil the bounds of others.
    return half, torch.where(ratios.isfinite(), ratios, 0).amax(1)

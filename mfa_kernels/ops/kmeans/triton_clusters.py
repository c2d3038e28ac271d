"""Sums over the rows of each cluster on a GPU, for the update of centroids, one writer per value.

    sums_k = sum w (x_n - center)      mass_k = sum w      inertia_k = sum w |x_n - center - c_k|^2

A program owns BD features of one cluster and walks over its rows BP at a time: their sum in float32, the sum of these
in float64, in registers. Rows are grouped by a stable sort (common/triton_groups.py). Never materialised: x - center.
Deterministic: sums in a fixed order, no atomics. Nothing asks the device about owners; a cluster without a row is
neither read nor written. Floor: one read of the rows, one read and write of the sums (README.md). The worst case is one
cluster that owns every row: it has D / BD programs alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common.triton_groups import group, load_pairs, load_range, put
from mfa_kernels.ops.common.triton_residual import feature_offsets, vector
from mfa_kernels.ops.kmeans.types import ClusterSums

_FEATURES, _WARPS = 256, 4
_ROWS = 16
"""Rows at a time: their loads are in flight together, and take 32 registers of a thread."""


@triton.jit
def cluster_kernel(
    p_x,  # (N, D)
    p_center,  # (D,)
    p_distance,  # (N,)
    p_weights,  # (N,) float64, or None: all 1
    p_order,  # (N,)
    p_starts,  # (K + 1,)
    p_sums,  # (K, D) float64, added to, as the next two
    p_mass,  # (K,) float64
    p_inertia,  # (K,) float64
    D,
    BP: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
):
    feature_blocks = tl.cdiv(D, BD)
    i_k = (tl.program_id(0) // feature_blocks).to(tl.int64)
    i_d = tl.program_id(0) % feature_blocks
    first, last = load_range(p_starts, i_k)
    if first == last:
        return
    o_d = feature_offsets(i_d * BD, BD, VEC)  # [1, 1, BD]
    m_d = o_d < D
    b_center = tl.load(p_center + o_d, mask=m_d, other=0.0)
    b_sum = tl.zeros([1, 1, BD], dtype=tl.float64)
    b_mass = tl.zeros([1, 1, 1], dtype=tl.float64)
    b_inertia = tl.zeros([1, 1, 1], dtype=tl.float64)
    for i in range(first, last, BP):
        o_n, m_i = load_pairs(p_order, i, last, BP)  # [BP, 1, 1]
        b_w = m_i.to(tl.float64)  # [BP, 1, 1]
        if p_weights is not None:
            b_w = tl.load(p_weights + o_n, mask=m_i, other=0.0)
        b_x = tl.load(p_x + o_n * D + o_d, mask=m_i & m_d, other=0.0).to(tl.float32)  # [BP, 1, BD]
        b_sum += tl.sum(b_w.to(tl.float32) * (b_x - b_center), axis=0, keep_dims=True).to(tl.float64)
        b_mass += tl.sum(b_w, axis=0, keep_dims=True)
        b_gap = tl.load(p_distance + o_n, mask=m_i, other=0.0).to(tl.float64)
        b_inertia += tl.sum(b_w * b_gap, axis=0, keep_dims=True)
    p_out = p_sums + i_k * D + o_d
    put(p_out, b_sum, m_d, True)
    o_out = i_k + tl.zeros([1, 1, 1], dtype=tl.int32)
    m_first = (i_d + tl.zeros([1, 1, 1], dtype=tl.int32)) == 0
    p_out = p_mass + o_out
    put(p_out, b_mass, m_first, True)
    p_out = p_inertia + o_out
    put(p_out, b_inertia, m_first, True)


def cluster_sums(
    x: Tensor, center: Tensor, owner: Tensor, distance: Tensor, weights: Tensor | None, out: ClusterSums
) -> None:
    """Adds to the sums, of tensors that the operator has checked. Does not wait for the device.

    Args:
        x: (N, D) contiguous, bfloat16, float16 or float32, N < 2^31.
        center: (D,) float32.
        owner: (N,) int64; a row whose owner is not in [0, K) is left out.
        distance: (N,) float32.
        weights: (N,) float64, or None.
        out: contiguous.
    """
    (rows, features), clusters = x.shape, len(out.sums)
    if rows == 0:
        return
    groups = group(owner.clamp(-1, clusters).int(), clusters, 1)
    rows_of = (x, center, distance.contiguous(), None if weights is None else weights.contiguous())
    tiles = {"BP": _ROWS, "BD": _FEATURES, "VEC": vector(_FEATURES, _WARPS), "num_warps": _WARPS}
    with torch.cuda.device_of(x):
        cluster_kernel[(clusters * triton.cdiv(features, _FEATURES),)](
            *rows_of, groups.order, groups.starts, *out, D=features, **tiles
        )

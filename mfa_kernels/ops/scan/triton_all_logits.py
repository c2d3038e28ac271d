"""Every logit of some tokens on a GPU, from differences: for log p(x | k) and candidate overflow.

    v = (x_n - mu_k) lam_k,   t = A_k v,   logit_nk = constant_k - (|v|^2 - |t|^2) / 2

A tile is BN tokens and one component, with the inner loop of the pairs (ops/common/triton_residual.py). Never
materialised: v and t, which stay in registers. Exact: differences and sums in float32, like the plain formula.
The floor is arithmetic outside the matrix units, N K D (R + 2) multiply-adds (ops/pairs/README.md).

A fixed number of programs walks over the tiles: with `count` the device alone knows how many there are. Tiles are taken
in bands of BK components, whose rows stay in the second-level cache while the tokens pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.triton_residual import project, project_tiles
from mfa_kernels.ops.woodbury.types import Woodbury

_PROGRAMS = 2048
"""Programs, at most: several for every place that a GPU has for one."""


@triton.jit
def all_logits_kernel(
    p_x,  # (N, D)
    p_index,  # (n,) or None
    p_count,  # (1,) or None
    p_rows,  # (K, R + 1 or R + 2, D)
    p_scale,  # (D,)
    p_constants,  # (K,)
    p_out,  # (n, K)
    N,  # rows of out
    K,
    D,
    R: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    if p_count is not None:
        N = tl.minimum(N, tl.load(p_count).to(tl.int32))
    token_tiles = tl.cdiv(N, BN)
    for i in range(tl.program_id(0), token_tiles * tl.cdiv(K, BK) * BK, tl.num_programs(0)):
        i_k = i // (token_tiles * BK) * BK + i % BK
        o_i = (i // BK) % token_tiles * BN + tl.arange(0, BN)  # [BN]
        m_i = (o_i < N) & (i_k < K)
        o_n = o_i.to(tl.int64)
        if p_index is not None:
            o_n = tl.load(p_index + o_i, mask=m_i, other=0).to(tl.int64)
        i_k = tl.minimum(i_k, K - 1)
        p_own = p_rows + i_k.to(tl.int64) * (R + 1 + PER_COMPONENT) * D
        p_n, m_n = p_x + o_n[:, None, None] * D, m_i[:, None, None]  # [BN, 1, 1]
        b_square = tl.zeros([BN], dtype=tl.float32)
        b_explained = tl.zeros([BN], dtype=tl.float32)
        for r0 in range(0, R if R > 0 else 1, BR):
            b_square, b_t = project(p_n, m_n, p_own, p_scale, r0, D, R, PER_COMPONENT, BN, BR, BD, VEC, STAGES)
            b_explained += tl.sum(b_t * b_t, axis=1)
        b_logits = tl.load(p_constants + i_k) - 0.5 * (b_square - b_explained)  # [BN]
        tl.store(p_out + o_i.to(tl.int64) * K + i_k, b_logits, mask=m_i)


def all_logits(
    x: Tensor,
    woodbury: Woodbury,
    constants: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns every logit of some tokens, (n, K) float32. Does not wait for the device.

    Args:
        x: (N, D) contiguous, bfloat16, float16 or float32.
        woodbury: in the portable layout, float32.
        constants: (K,) float32.
        index: (n,) int32, the tokens wanted; None for all, in order.
        count: (1,) int32 on the device: how many entries of `index` are in use. Rows of the result beyond it are left
            as they are.
        out: (n, K) float32 contiguous, to be written and returned.
    """
    count_k, rank = woodbury.rows.shape[0], woodbury.cholesky.shape[-1]
    rows = x.shape[0] if index is None else index.shape[0]
    if out is None:
        out = x.new_empty(rows, count_k, dtype=torch.float32)
    config = configs.configured(configs.AllLogits, x, rows, count_k)
    tiles = triton.cdiv(rows, config.tokens) * triton.cdiv(count_k, config.components)
    if tiles:
        with torch.cuda.device_of(x):
            sizes = {"N": rows, "K": count_k, "D": x.shape[1], "R": rank, "PER_COMPONENT": woodbury.per_component}
            blocks = {"BN": config.tokens, "BK": config.components, **project_tiles(config, rank, config.tokens)}
            all_logits_kernel[(min(tiles, _PROGRAMS),)](
                x, index, count, woodbury.rows, woodbury.scale, constants, out, **sizes, **blocks
            )
    return out

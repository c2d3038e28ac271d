"""The scan: fp16 products of every token with every row in one pass, and a bound on their rounding.

A program owns a tile of tokens x 64 components. It multiplies the tokens with four rows of loadings at a time (256
columns), R rows in all, then with the mean row, and folds each product into one logit tile that never leaves the
registers:

    t_r = s_n beta_k tokens.B_r - offset_r        T = sum_r t_r^2
    p   = s_n sigma_k tokens.(w m)                q = s_n^2 tau_k squares.w      (noise per component only)
    logit_k = constant_k - (sum w m^2 + |y|^2 or q) / 2 + p + T / 2

(|y|^2 is the same for every component with shared noise, and left out here.) Per token and tile of components, the
`TOP` largest upper bounds with their components and the largest lower bound leave the chip: about 36 bytes per 64
components. Neither N x K nor N x K x R is ever written.

Four rows at a time: 128 tokens and 64 features take (128 + 4 x 64) x 64 x 2 bytes from the second-level cache for
128 x 256 x 64 multiply-adds, 85 flops a byte; one row at a time would be 43, far more than that cache delivers at full
rate. A 128 x 64 logit tile and a 128 x 256 product together are 160 registers a thread; a 128 x 128 tile with two rows
at a time (192) spilled when it was tried.

The bound. With |tokens - y| <= eta, |y| <= a, squares off by psi (triton_tokens.py), and the rows' own M1, M2, E1, E2,
E3, N1, N2 (woodbury/triton_rows.py), by Cauchy-Schwarz and with every sum of D products off by at most g = D 2^-23:

    |p - y.(w m)|   <=  a M1 + eta M2,           M1 = eps_m + g (mu + eps_m),      M2 = (1 + g) (mu + eps_m)
    |t^ - t|        <=  e = a E1 + eta E2 + E3 + 2^-22 |t^|,  E1 = eps_B + g (phi + eps_B),  E2 = alpha + E1
    | |t^|^2 - |t|^2 | <= e (2 |t^| + e)
    |q - sum w y^2| / 2 <= a^2 N1 + psi N2,      N1 = (eps_w + (g + 2^-18) omega') / 2,  N2 = (1 + g) omega' / 2
    delta = all of these (the third halved) + 2^-20 (|constant| + sum w m^2 + |p| + T + q)

Of these only M2 and N2 (which grow with the distance from the centre and with the precisions) are kept per component;
the others enter by their largest value, or their largest ratio to M2 or N2 (`worst`). In the last term |p| is at most
|logit| + (T + q) / 2 + |constant| + sum w m^2, sum w m^2 at most 2 (|constant| + |base|), and q <= omega a^2 is in N1.
So the exact logit lies within delta of the computed one. Components that could be active within these bounds are
computed again from the differences x - mu (pairs/triton_pairs.py): low-precision speed, fp32 results.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.configs import Scan
from mfa_kernels.ops.common.triton_fp16 import descriptors
from mfa_kernels.ops.common.triton_tokens import Tokens
from mfa_kernels.ops.woodbury.triton_rows import TILE
from mfa_kernels.ops.woodbury.types import ScanRows

TOP = 4
"""Components kept per token and tile: where responsibilities are one-hot, two or three in one tile are rare."""


class Partials(NamedTuple):
    """Results of a scan for each token and tile of components.

    Attributes:
        upper: (N, tiles, TOP): the largest upper bounds of the logits, or the logits themselves where no bounds were
            asked for, in descending order; -inf where a tile has fewer components.
        components: (N, tiles, TOP) int32.
        lower: (N, tiles): the largest lower bound, or logit.
        sums: (N, tiles): sum of exp(logit - lower) over the tile; without bounds only.
    """

    upper: Tensor
    components: Tensor
    lower: Tensor
    sums: Tensor


@triton.jit
def _products(
    p_tokens, p_rows, i_row, row, o_n, PADDED, BN: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """tokens . rows, [BN, ROWS], for the ROWS rows that begin at `row`."""
    b_product = tl.zeros([BN, ROWS], tl.float32)
    for d in range(0, PADDED, BD):
        if DESCRIPTOR:
            b_y = p_tokens.load([i_row, d])  # [BN, BD]
            b_b = p_rows.load([row, d])  # [ROWS, BD]
        else:
            o_d = d + tl.arange(0, BD)
            b_y = tl.load(p_tokens + o_n.to(tl.int64)[:, None] * PADDED + o_d[None, :])
            b_b = tl.load(p_rows + (row + tl.arange(0, ROWS)).to(tl.int64)[:, None] * PADDED + o_d[None, :])
        b_product = tl.dot(b_y, tl.trans(b_b), b_product, out_dtype=tl.float32)
    return b_product


@triton.jit
def _squares(b_product, b_s, p_offsets, BN: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr):
    """sum over WIDTH rows of (s_n product - offset)^2, [BN, BK]."""
    b_t = b_product * b_s[:, None] - tl.load(p_offsets + tl.arange(0, WIDTH * BK))[None, :]
    return tl.sum(tl.reshape(b_t * b_t, [BN, WIDTH, BK]), 1)


@triton.jit
def scan_kernel(
    p_tokens,  # (N, D') fp16, or its descriptor
    p_squares,  # (N, D') fp16, or its descriptor
    p_rows,  # (tiles G BK, D') fp16, or its descriptor for WIDTH rows of a tile
    p_rows_2,  # the same for two
    p_rows_1,  # and for one
    p_token_scales,  # (N,)
    p_norms,  # (3, N)
    p_scales,  # (3, tiles BK)
    p_offsets,  # (tiles, R, BK)
    p_bounds,  # (7, tiles BK)
    p_worst,  # (5,)
    p_base,  # (tiles BK,): constant - sum w m^2 / 2
    p_rest,  # (1,): 2^-17 max |constant|
    p_count,  # (1,) int32: the tokens in use, the first of the N; None for all
    p_upper,  # (N, tiles, TOP)
    p_components,  # (N, tiles, TOP) int32
    p_lower,  # (N, tiles)
    p_sums,  # (N, tiles)
    N,
    K,
    PADDED,
    R: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    WIDTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
    TOP: tl.constexpr,
    PER_COMPONENT: tl.constexpr,
    BOUNDS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    # SWIZZLE tiles of tokens share a band of components in the second-level cache.
    in_use = N if p_count is None else tl.load(p_count)
    tiles_n, tiles_k = tl.cdiv(in_use, BN), tl.cdiv(K, BK)
    i_program = tl.program_id(0)
    if p_count is not None:  # noqa: SIM102 - decided while compiling
        if i_program >= tiles_n * tiles_k:
            return
    i_band = i_program // (SWIZZLE * tiles_k)
    in_band = tl.minimum(tiles_n - i_band * SWIZZLE, SWIZZLE)
    i_n = i_band * SWIZZLE + (i_program % (SWIZZLE * tiles_k)) % in_band
    i_k = (i_program % (SWIZZLE * tiles_k)) // in_band

    # Tokens beyond the end repeat the last one, so that the inner loops need no mask.
    o_n = tl.minimum(i_n * BN + tl.arange(0, BN), in_use - 1)
    b_s = tl.load(p_token_scales + o_n)
    row = i_k * ((R + 1 + PER_COMPONENT) * BK)

    b_square = tl.zeros([BN, BK], tl.float32)  # T / beta^2
    for r in range(0, R // WIDTH * WIDTH, WIDTH):
        b_product = _products(p_tokens, p_rows, i_n * BN, row + r * BK, o_n, PADDED, BN, WIDTH * BK, BD, DESCRIPTOR)
        b_square += _squares(b_product, b_s, p_offsets + (i_k * R + r) * BK, BN, BK, WIDTH)
    if R % WIDTH >= 2:
        FIRST: tl.constexpr = R // WIDTH * WIDTH
        b_product = _products(p_tokens, p_rows_2, i_n * BN, row + FIRST * BK, o_n, PADDED, BN, 2 * BK, BD, DESCRIPTOR)
        b_square += _squares(b_product, b_s, p_offsets + (i_k * R + FIRST) * BK, BN, BK, 2)
    if R % WIDTH % 2 == 1:
        b_product = _products(p_tokens, p_rows_1, i_n * BN, row + (R - 1) * BK, o_n, PADDED, BN, BK, BD, DESCRIPTOR)
        b_square += _squares(b_product, b_s, p_offsets + (i_k * R + R - 1) * BK, BN, BK, 1)
    b_logit = _products(p_tokens, p_rows_1, i_n * BN, row + R * BK, o_n, PADDED, BN, BK, BD, DESCRIPTOR)
    if PER_COMPONENT:
        b_q = _products(p_squares, p_rows_1, i_n * BN, row + (R + 1) * BK, o_n, PADDED, BN, BK, BD, DESCRIPTOR)

    o_k = i_k * BK + tl.arange(0, BK)
    b_base = tl.load(p_base + o_k)
    m_k = (o_k < K) & (b_base != -float("inf"))  # a component of weight 0 is no candidate
    stride = tiles_k * BK
    b_beta = tl.load(p_scales + o_k)
    b_square *= (b_beta * b_beta)[None, :]
    b_logit *= b_s[:, None] * tl.load(p_scales + stride + o_k)[None, :]
    if PER_COMPONENT:
        b_logit -= b_q * (0.5 * b_s * b_s)[:, None] * tl.load(p_scales + 2 * stride + o_k)[None, :]
    b_logit += 0.5 * b_square + b_base[None, :]

    m_n = i_n * BN + tl.arange(0, BN) < in_use
    o_tile = o_n.to(tl.int64) * tiles_k + i_k
    if BOUNDS:
        b_a = tl.load(p_norms + o_n)[:, None]
        b_eta = tl.load(p_norms + N + o_n)[:, None]
        b_m2 = tl.load(p_bounds + stride + o_k)[None, :]
        b_root = tl.sqrt(b_square)  # |t^|
        b_e = b_a * tl.load(p_worst + 1) + b_eta * tl.load(p_worst + 2)
        b_e = b_e + tl.load(p_worst + 3) * b_m2 + 2.384185791015625e-07 * b_root  # 2^-22
        b_delta = b_e * (b_root + 0.5 * b_e) + (b_a * tl.load(p_worst) + b_eta) * b_m2
        # 2^-20 and 2^-18
        b_delta += (
            9.5367431640625e-07 * (tl.abs(b_logit) + 1.5 * b_root * b_root)
            + 3.814697265625e-06 * tl.abs(b_base)[None, :]
        )
        b_delta += tl.load(p_rest)
        if PER_COMPONENT:
            b_psi = b_a * b_a * tl.load(p_worst + 4) + tl.load(p_norms + 2 * N + o_n)[:, None]
            b_delta += b_psi * tl.load(p_bounds + 6 * stride + o_k)[None, :]
        b_delta *= 1.0009765625  # covers the roundings of delta itself
        b_lower = tl.where(m_k[None, :], b_logit - b_delta, -float("inf"))
        b_lower = tl.where(b_lower == b_lower, b_lower, -float("inf"))
        tl.store(p_lower + o_tile, tl.max(b_lower, 1), m_n)
        # A bound that overflowed or is NaN counts as possible, so that the exact logit decides.
        b_logit = b_logit + b_delta
        b_logit = tl.where(b_logit == b_logit, b_logit, float("inf"))
        b_logit = tl.where(m_k[None, :], b_logit, -float("inf"))
    else:
        b_logit = tl.where(m_k[None, :], b_logit, -float("inf"))
        b_best = tl.max(b_logit, 1)
        tl.store(p_lower + o_tile, b_best, m_n)
        b_shift = tl.where(b_best == -float("inf"), 0.0, b_best)
        tl.store(p_sums + o_tile, tl.sum(tl.exp(b_logit - b_shift[:, None]), 1), m_n)
    for i_top in tl.static_range(TOP):
        b_best, b_index = tl.max(b_logit, 1, return_indices=True)
        tl.store(p_upper + o_tile * TOP + i_top, b_best, m_n)
        tl.store(p_components + o_tile * TOP + i_top, i_k * BK + b_index, m_n)
        b_logit = tl.where(tl.arange(0, BK)[None, :] == b_index[:, None], -float("inf"), b_logit)


def scan_tiles(
    tokens: Tokens, rows: ScanRows, constants: Tensor, config: Scan, bounds: bool, in_use: Tensor | None = None
) -> Partials:
    """Scans every token against every component; `constants` are `woodbury.constants(log_weights)`, (K,).

    With `in_use` (1,) int32, on the device, only the first `in_use` tokens get a result.
    """
    count, padded = tokens.tokens.shape
    tiles, groups = rows.rows.shape[:2]
    rank, components = rows.offsets.shape[1], constants.shape[0]
    new = constants.new_empty
    out = Partials(
        new(count, tiles, TOP),
        new(count, tiles, TOP, dtype=torch.int32),
        new(count, tiles),
        new((count, tiles) if not bounds else (0,)),
    )
    base = new(tiles * TILE)
    base[:components] = constants.double() - 0.5 * rows.squares
    rest = (2.0**-17 * torch.where(constants.isfinite(), constants, 0).abs().amax()).view(1)
    matrix = rows.rows.view(-1, padded)
    squares = tokens.tokens if tokens.squares is None else tokens.squares
    per_component = groups == rank + 2
    architecture = configs.architecture(constants.device, 90)
    config = fitted(config, architecture, rank, per_component or in_use is not None)
    heights = (config.tokens, config.tokens, config.width * TILE, 2 * TILE, TILE)
    matrices = (tokens.tokens, squares, matrix, matrix, matrix)
    operands, used = descriptors(matrices, heights, config.features, config.descriptors)
    sizes = {"N": count, "K": components, "PADDED": padded, "R": rank, "TOP": TOP}
    tiles_of = {"BN": config.tokens, "BK": TILE, "BD": config.features, "WIDTH": config.width}
    flags = {"PER_COMPONENT": per_component, "BOUNDS": bounds, "DESCRIPTOR": used, "SWIZZLE": config.swizzle}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    scales = (tokens.scales, tokens.norms, rows.scales, rows.offsets, rows.bounds, rows.worst)
    scan_kernel[(triton.cdiv(count, config.tokens) * tiles,)](
        *operands, *scales, base, rest, in_use, *out, **sizes, **tiles_of, **flags, **options
    )
    return out


def fitted(config: Scan, architecture: int, rank: int, more: bool) -> Scan:
    """Narrows the configuration where registers are short, as `python -m bench.aot` shows.

    A single turn of the loop over four rows (4 <= R < 8) is unrolled into the rest. Noise per component keeps one more
    product in registers, and a number of tokens that the device alone knows one more value (`more`): sm_100 lacks room.
    """
    if 4 <= rank < 8:
        config = replace(config, width=min(config.width, 2))
    return replace(config, tokens=min(config.tokens, 64)) if more and architecture >= 100 else config

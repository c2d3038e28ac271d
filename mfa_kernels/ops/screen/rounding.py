"""Rounding errors of the bounds of the C++ kernels, at most (README.md, "Rounding")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 2.0**-24
"""Of rounding in float32, in which bounds are computed."""

_FLUSH = 64  # features between flushes of a sum, csrc/cpu/panel_distances.h


def stage_0_rounding(features: int, rank: int, kept: int) -> float:
    """The factor of tau: the rounding of stage 0, in float64."""
    return 8 * features * (rank + 1) * math.sqrt(kept) * torch.finfo(torch.float64).eps


def projection_unit(features: int, kept: int) -> float:
    """|z - Q^T y| / |y|, as csrc/cpu/screen/tokens.h has it."""
    return 1.01 * (_FLUSH + -(-features // _FLUSH) + 6) * UNIT * math.sqrt(2 * kept)


def bound_slack(features: int, kept: int, rank: int, off: float, nu: Tensor, gain: Tensor) -> Tensor:
    """Error of a bound per squared reach beyond that of the products in int8, (k,).

    Args:
        features, kept, rank: D, p, R.
        off: |Q^T Q - I|.
        nu: (k,).
        gain: |T|_2^2, (k,).
    """
    chain = _FLUSH + -(-features // _FLUSH) + 8
    rest = (1 - nu).abs()
    all_terms = 1 + rest + nu + gain
    rounded = chain * (rest + nu) + (10 * math.sqrt(max(rank, 1)) + rank + 8) * gain + 24 * all_terms
    total = rounded * UNIT + 2.1 * projection_unit(features, kept) * nu + off * (2 * nu + 2.5 * gain)
    return 0.5 * 1.01 * total


def skew(q: Tensor) -> float:
    """|Q^T Q - I|."""
    return torch.linalg.matrix_norm(q.mT @ q - torch.eye(q.shape[1], dtype=q.dtype)).item()


def logit_slack(features: int, rank: int, unit: float) -> float:
    """The same for a logit from all the features: sums in SIMD lanes, of at most D/4 values each, then across lanes."""
    long = -(-features // 4) + 8
    products = (6 + (long + 1) * math.sqrt(max(rank, 1))) * unit
    return 0.5 * (12 * unit + 2 * products + products**2 + 2 * (long + rank + 8) * unit) * 1.01 + 8 * unit

"""Rounding errors of the bounds of the C++ kernels, at most (README, "Rounding")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FLUSH = 64  # features between flushes of a sum, csrc/cpu/panel_distances.h


def stage_0_rounding(features: int, rank: int, kept: int) -> float:
    """The factor of tau (README, "Rounding"): the rounding of stage 0, in float64."""
    return 8 * features * (rank + 1) * math.sqrt(kept) * torch.finfo(torch.float64).eps


def bound_slack(q: Tensor, features: int, rank: int, unit: float) -> float:
    """Error of a bound per squared reach, at most, in a dtype with this unit of rounding (README, "Rounding")."""
    kept, off = q.shape[1], skew(q)
    long, short = _FLUSH + -(-features // _FLUSH) + 2, _FLUSH + -(-kept // _FLUSH) + 2
    token = (6 + long * math.sqrt(kept * (1 + off))) * unit  # |y - Q^T x~| / |x~|
    coordinates = token + 4 * unit
    products = coordinates + (short + 1) * math.sqrt(max(rank, 1)) * unit
    total = 2 * coordinates + 2 * products + products**2 + 2 * (short + rank + 8) * unit + 2 * off
    return 0.5 * total * 1.01 + 8 * unit


def skew(q: Tensor) -> float:
    """|Q^T Q - I|."""
    return torch.linalg.matrix_norm(q.mT @ q - torch.eye(q.shape[1], dtype=q.dtype)).item()


def logit_slack(features: int, rank: int, unit: float) -> float:
    """The same for a logit from all the features: sums in SIMD lanes, of at most D/4 values each, then across lanes."""
    long = -(-features // 4) + 8
    products = (6 + (long + 1) * math.sqrt(max(rank, 1))) * unit
    return 0.5 * (12 * unit + 2 * products + products**2 + 2 * (long + rank + 8) * unit) * 1.01 + 8 * unit

"""The bounds of screening, which stage 0 prepares, and the pairs that a screened scan finds."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.types import ScanRows


class Screen(NamedTuple):
    """The terms of the bounds that the C++ kernels read (csrc/cpu/screen/screen.h).

    Attributes:
        center: c, from which y is measured: near the middle of the components, (D,), in the dtype of the mixture.
        basis: Q, (D, p) float32.
        rows: w_k and T_k in int8, (K, D/64 + R p/64, 64), both sizes rounded up.
        starts: what the offset of tokens in int8 adds to the products with each of them, to be taken off; (K, R+1)
            int32.
        terms: their scales, norms and what rounding does to them, (K, 2 R + 13) float32.
        exact_slack: the slack of a logit that is computed in full.
    """

    center: Tensor
    basis: Tensor
    rows: Tensor
    starts: Tensor
    terms: Tensor
    exact_slack: float


class GpuScreen(NamedTuple):
    """The terms of the bounds that the Triton kernels read, on their device.

    Attributes:
        basis: Q as it was given, (D, p).
        projection: Q^T, (p', D') fp16; p' and D' are p and D rounded up to multiples of 64.
        sigma: the factor of y that brings |Q|_2 to sqrt(1 - EPSILON), (1,).
        spread: |Q|_F / |Q|_2, () float64.
        rows: of the marginals, for the scan.
        slack: of the bounds, (K,) float64; infinite for a component without a bound.
        rounding: the largest rounding of B among the components that have a bound, () float64.
    """

    basis: Tensor
    projection: Tensor
    sigma: Tensor
    spread: Tensor
    rows: ScanRows
    slack: Tensor
    rounding: Tensor


AnyScreen: TypeAlias = "Screen | GpuScreen"


class ScreenedPairs(NamedTuple):
    """The active pairs, and how they were found.

    Attributes:
        active: log p(x) and the active pairs, those of the dense scan up to rounding.
        dropped: bound on the responsibility of all the components whose logit was never computed, together; (N,).
        evaluated: components computed per token, (N,) int32; -1 where the token took the dense scan.
    """

    active: ActivePairs
    dropped: Tensor
    evaluated: Tensor

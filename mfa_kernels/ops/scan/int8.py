"""The scan on a CPU with a first level in int8: bounds of every logit, then those that can matter in full."""

from __future__ import annotations

from torch import Tensor

from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.types import Int8Rows, Woodbury


def scan(
    x: Tensor, woodbury: Woodbury, constants: Tensor, rows: Int8Rows, threshold: float, slots: int, keep: bool = False
) -> tuple[ActivePairs, Tensor, int]:
    """The active pairs; every logit (K, N), of size 0 where it is not kept; and how many tokens took the scan in
    float32 after all.

    Args:
        x: (N, D) float32, contiguous.
        woodbury, constants: of the parameters; constants (K,).
        rows: of `woodbury`.
        threshold: nats below the best logit at which a component stops being active.
        slots: S.
        keep: whether to keep every logit where all tokens take the scan in float32.
    """
    terms = x, woodbury.rows, constants, woodbury.scale
    *active, logits, whole = cpp.library().scan_int8(
        *terms, *rows, woodbury.center, woodbury.per_component, threshold, slots, keep
    )
    return ActivePairs(*active), logits, whole


def bounds(x: Tensor, woodbury: Woodbury, constants: Tensor, rows: Int8Rows) -> tuple[Tensor, Tensor]:
    """The lower and upper bounds of all logits that `scan` works from, (N, K) each; arguments as there."""
    terms = x, woodbury.rows, constants, woodbury.scale
    low, high = cpp.library().int8_bounds(*terms, *rows, woodbury.center, woodbury.per_component, 0.0, 1, False)
    return low.t(), high.t()

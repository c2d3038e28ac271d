"""Products in fp16: scales that are powers of two, tensor descriptors, the error of float32 sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common import configs

FEATURES = 64  # rows are padded to a multiple of this, so that the scan's inner loop needs no mask
TINY = 2.0**-20  # more than a few roundings of a float32 value, relative to it


@triton.jit
def power_of_two(largest):
    """The power of two that brings the largest value (float32) into [32, 64), within 2^-100 and 2^100; 1 for zero and
    for what is not finite.

    Of its bits, since a chip's log2 and exp2 are not exact: what divides by the result loses nothing.
    """
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 5  # with 127 added to it
    exponent = tl.minimum(tl.maximum(exponent, 27), 227)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where((largest > 0) & (largest < float("inf")), power, 1.0)


def descriptors(
    matrices: Sequence[Tensor], heights: Sequence[int], width: int, wanted: bool
) -> tuple[Sequence[Any], bool]:
    """Tensor descriptors of the matrices and True; the matrices and False where the chip has none, or none are wanted.

    Args:
        matrices: (rows, features), contiguous, on one device.
        heights: rows of the tiles that a kernel loads of each.
        width: features of a tile.
        wanted: False takes the matrices.
    """
    if not wanted or configs.architecture(matrices[0].device, 90) < 90:  # the interpreter has descriptors too
        return matrices, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    tiles = zip(matrices, heights)
    return [TensorDescriptor(t, list(t.shape), list(t.stride()), [height, width]) for t, height in tiles], True


def slack(features: int) -> float:
    """1 + the relative error that a float32 sum of `features` squares can carry."""
    return 1.0 + 2 * sum_error(features)


def sum_error(features: int) -> float:
    """g: the error of a float32 sum of `features` products, at most, relative to the product of the norms.

    Each of the D additions, in any order, rounds or (in a tensor core) truncates by at most 2^-23 of a partial sum.
    Rounded up to a power of two, so that kernels are compiled once for many D.
    """
    return max(FEATURES, triton.next_power_of_2(features)) * 2.0**-23

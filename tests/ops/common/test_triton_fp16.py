from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from mfa_kernels.ops.common.triton_fp16 import power_of_two

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def powers(p_x, p_out, SIZE: tl.constexpr):
    numbers = tl.arange(0, SIZE)
    tl.store(p_out + numbers, power_of_two(tl.load(p_x + numbers)))


def test_powers_of_two_are_powers_of_two():
    """Of the values beside every power of two, and of what is none."""
    edges = [2.0**e for e in range(-149, 128)]
    values = torch.tensor([f for e in edges for f in (e * (1 - 2.0**-24), e, e * (1 + 2.0**-23))])
    values = torch.cat([values, torch.tensor([0.0, math.inf, math.nan, -3.0, 3.4e38])])
    size = triton.next_power_of_2(len(values))
    x, out = torch.zeros(size, device=DEVICE), torch.zeros(size, device=DEVICE)
    x[: len(values)] = values.to(DEVICE)
    powers[(1,)](x, out, SIZE=size)
    for value, found in zip(values.tolist(), out.tolist()):
        if not 0 < value < math.inf:
            assert found == 1
        else:
            exponent = math.frexp(value)[1] - 1 - 5
            assert found == 2.0 ** min(max(exponent, -100), 100), value

"""Triton's interpreter, sped up, computes the same results, and an overflow is an error."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")


@triton.jit
def _square(b_x):
    return b_x * b_x


@triton.jit
def squares_kernel(p_x, p_sum, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_out = _square(_square(tl.load(p_x + o)))
    tl.store(p_out + o, b_out)
    tl.store(p_sum, tl.sum(b_out, 0))


def squares(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total, out = x.new_empty(1), torch.empty_like(x)
    squares_kernel[(1,)](x, total, out, len(x))
    return total, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64, torch.float16], ids=str)
def test_functions_within_kernels(dtype):
    x = torch.arange(8).to(dtype)
    for _ in range(2):  # a second launch finds the language as the first one did
        total, out = squares(x)
        assert torch.equal(out, x**4)
        assert total == (x**4).sum()


def test_an_overflow_is_an_error():
    large = torch.full((4,), 2**16)
    assert squares(large.long() // 2)[1].tolist() == [2**60] * 4
    with pytest.raises(Exception, match="int32 overflows in mul"):
        squares(large.int())
    assert squares(torch.ones(4, dtype=torch.int32))[0] == 4, "an error leaves nothing behind"

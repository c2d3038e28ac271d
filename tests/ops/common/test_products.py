from __future__ import annotations

import pytest
import torch

from mfa_kernels.ops.common import products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (0, 7, 3), (5, 7, 0), (1, 1, 1), (130, 257, 65)], ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain_tensors", "copied"])
def test_a_product_is_that_of_the_transpose(sizes, dtype, plain, monkeypatch):
    if plain and products._LINEAR is None:
        pytest.skip("this PyTorch has no product by oneDNN on plain tensors")
    if not plain:
        monkeypatch.setattr(products, "_LINEAR", None)
    rows, inner, columns = sizes
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator, dtype=dtype)
    b = torch.randn(columns, inner, generator=generator, dtype=dtype)
    wanted = (a.double() @ b.double().T).to(dtype)
    for own in (b, b.t().contiguous().t()):
        torch.testing.assert_close(products.product(a, own), wanted, rtol=0, atol=1e-4 if inner > 100 else 1e-5)


def test_yardsticks_are_two_ways_to_one_product():
    by_mm, by_onednn = products.yardsticks(6, 10, 4).values()
    assert by_mm().shape == by_onednn().shape == (6, 10)
    torch.testing.assert_close(by_mm(), by_onednn())

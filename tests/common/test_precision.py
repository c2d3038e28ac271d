from __future__ import annotations

import pytest
import torch

from mfa_kernels.common import precision


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_products_are_in_full_precision_whatever_is_allowed(allowed):
    """Users allow TF32 (or bfloat16) products for their models; inside an operator they are not."""
    before = torch.get_float32_matmul_precision()
    x = torch.zeros(2)
    owner = precision._products("cpu")
    try:
        torch.set_float32_matmul_precision(allowed)
        seen = None if owner is None else owner.fp32_precision
        with precision.full_precision(x):
            assert owner is None or owner.fp32_precision == "ieee"
            assert not torch.is_autocast_enabled("cpu")
        assert owner is None or owner.fp32_precision == seen
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_setting_returns_after_an_error():
    owner = precision._products("cpu")
    if owner is None:
        pytest.skip("this torch has no setting per backend")
    before = owner.fp32_precision
    with pytest.raises(RuntimeError, match="inside"), precision.full_precision(torch.zeros(2)):
        raise RuntimeError("inside")
    assert owner.fp32_precision == before

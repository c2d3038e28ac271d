from __future__ import annotations

import threading

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


def test_a_thread_that_leaves_changes_nothing_for_those_inside():
    before = torch.get_float32_matmul_precision()
    x, inside, left = torch.zeros(2), threading.Event(), threading.Event()

    def stays():
        with precision.full_precision(x):
            inside.set()
            assert left.wait(60)
            seen.append(precision.of_products("cpu"))

    seen: list[str] = []
    try:
        torch.set_float32_matmul_precision("medium")
        allowed, other = precision.of_products("cpu"), threading.Thread(target=stays)
        with precision.full_precision(x):
            other.start()
            assert inside.wait(60)
        left.set()
        other.join()
        assert seen[0] in precision.FULL
        assert precision.of_products("cpu") == allowed
        assert allowed not in precision.FULL
    finally:
        torch.set_float32_matmul_precision(before)

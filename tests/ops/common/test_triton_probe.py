from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from mfa_kernels.ops.common import triton_probe

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def summed(x: torch.Tensor, rows: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """The products as a matrix unit sums them: aligned to the largest of a block and the sum so far, cut to `bits`."""
    terms = x.double().numpy()[:, None, :] * rows.double().numpy()[None, :, :]
    total = np.zeros(terms.shape[:2])
    for first in range(0, terms.shape[-1], block):
        part = np.concatenate([total[..., None], terms[..., first : first + block]], -1)
        unit = 2.0 ** (np.frexp(np.abs(part).max(-1, keepdims=True))[1] - bits)
        total = (np.trunc(part / unit) * unit).sum(-1)
        unit = 2.0 ** (np.frexp(np.abs(total))[1] - 24)
        total = np.trunc(total / unit) * unit
    return torch.from_numpy(total)


@pytest.mark.parametrize("features", [64, 576])
def test_this_device_sums_within_the_bound(features):
    assert 0 < triton_probe.of_device(DEVICE, features) <= 1


@pytest.mark.parametrize(
    ("bits", "block", "least", "most"), [(24, 4, 0.2, 1.0), (25, 8, 0.1, 0.75), (26, 16, 0.05, 0.5)]
)
def test_units_that_are_known_pass(bits, block, least, most):
    """V100; Ampere and Ada; Hopper: bits of the aligned products, and products of a block."""
    x, rows = triton_probe.vectors(256, torch.device("cpu"))
    assert least < triton_probe.error(summed(x, rows, bits, block), x, rows) <= most


@pytest.mark.parametrize("bits", [14, 11])
def test_an_accumulator_of_few_bits_is_found_out(bits):
    x, rows = triton_probe.vectors(256, torch.device("cpu"))
    assert triton_probe.error(summed(x, rows, bits, 16), x, rows) > 100


def test_what_is_no_number_is_found_out():
    x, rows = triton_probe.vectors(64, torch.device("cpu"))
    assert triton_probe.error(torch.full((128, 64), torch.nan), x, rows) == torch.inf

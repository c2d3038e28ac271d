from __future__ import annotations

import pytest
import torch

from mfa_kernels.data import reservoir
from mfa_kernels.data.reservoir import numbered


def test_every_row_is_as_likely_as_another():
    x = torch.arange(40.0).unsqueeze(1)
    counts = torch.zeros(40)
    for seed in range(3000):
        sample = reservoir(x.split([7, 1, 20, 12]), 10, seed=seed)
        assert sample.shape == (10, 1)
        counts[sample[:, 0].long()] += 1
    # Binomial(3000, 1/4): a standard deviation of 24.
    assert (counts - 750).abs().max() < 24 * 4.5
    assert (counts[:7].sum() / 7 - counts[28:].sum() / 12).abs() < 30


def test_the_batches_do_not_matter_and_rows_are_kept_once_in_order():
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    whole = reservoir([x], 50, seed=3)
    assert torch.equal(reservoir(x.split(64), 50, seed=3), whole)
    assert torch.equal(reservoir(((part.numpy(), "tokens") for part in x.split(333)), 50, seed=3), whole)
    index = torch.cdist(whole, x).argmin(1)
    assert (index.diff() > 0).all()
    assert not torch.equal(reservoir([x], 50, seed=4), whole)


@pytest.mark.parametrize("rows", [1, 50, 999, 1000, 2000])
@pytest.mark.parametrize("split", [1000, 33, [1, 700, 299]])
def test_what_is_kept_are_the_rows_of_the_smallest_numbers(rows, split):
    x = torch.randn(1000, 3)
    drawn = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    smallest = drawn.argsort()[:rows].sort().values
    sample, numbers = numbered(x.split(split), rows, 3)
    assert torch.equal(numbers, smallest)
    assert torch.equal(sample, x[smallest])


def test_a_short_stream_is_kept_whole():
    x = torch.randn(20, 3)
    assert torch.equal(reservoir(x.split(6), 50), x)
    assert torch.equal(reservoir([x[:0], x[:5], x[:0], x[5:]], 50), x)
    assert reservoir([x.bfloat16()], 5).dtype == torch.float32
    assert reservoir([x.double()], 5).dtype == torch.float64


@pytest.mark.parametrize(
    ("batches", "rows", "error", "message"),
    [
        ([], 5, ValueError, "batches is an iterable without batches"),
        ([torch.zeros(0, 2)], 5, ValueError, "batches is an iterable without batches that hold rows"),
        ([torch.zeros(3, 2)], 0, ValueError, "rows must be an integer >= 1, got 0"),
        (
            [torch.zeros(3, 2), torch.zeros(3, 4)],
            5,
            ValueError,
            r"batches\[1\] has width 4, but batches\[0\] has width 2",
        ),
        ([torch.zeros(3, 2, dtype=torch.long)], 5, TypeError, r"batches\[0\].*floating-point"),
    ],
)
def test_bad_input_is_named(batches, rows, error, message):
    with pytest.raises(error, match=message):
        reservoir(batches, rows)

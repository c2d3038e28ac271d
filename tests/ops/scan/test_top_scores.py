from __future__ import annotations

import math

import pytest
import torch

from mfa_kernels.ops.scan.top_scores import top_scores

# (N, K, S, F, C)
SHAPES = [
    (1, 1, 0, 1, 1), (70, 500, 0, 20, 9), (33, 7, 2, 3, 12), (100, 3000, 3, 64, 32), (0, 5, 1, 4, 2), (9, 40, 1, 0, 3),
    (60, 50, 1, 773, 5), (9000, 60, 0, 4, 3),
]  # fmt: skip


def drawn_scores(n: int, components: int, squares: int, coordinates: int, dtype: torch.dtype):
    """Whole numbers, whose products are exact: equal scores are equal on every path.

    In int8 too, whose unit is a 63rd of the largest entry: that is 63, in columns that meet zeros.
    """
    y = torch.randint(-3, 4, (n, coordinates + 2)).to(dtype)
    right = torch.randint(-3, 4, (components, 1 + squares, coordinates + 2)).to(dtype)
    y[:, 0], right[..., 0], y[:, 1], right[..., 1] = 63, 0, 0, 63
    return y, right, torch.randint(-3, 4, (components, 1 + squares)).to(dtype)


def scores_of(y: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    values = offsets + torch.einsum("nf,ksf->nks", y, right)
    return values[..., 0] + values[..., 1:].square().sum(-1) / 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_largest_scores_come_first_and_equal_ones_by_number(backend, shape, dtype):
    *sizes, count = shape
    y, right, offsets = drawn_scores(*sizes, dtype)
    found = top_scores(y, right, offsets, count)
    assert found.dtype == torch.int32
    expected = scores_of(y, right, offsets).sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(found[:, : len(right)], expected.int())
    assert (found[:, len(right) :] == -1).all()


@pytest.mark.usefixtures("needs_cpp")
def test_more_coordinates_than_int32_holds_are_refused():
    y, right = torch.zeros(1, 65_537), torch.zeros(1, 1, 65_537)
    with pytest.raises(ValueError, match="at most 65536 coordinates, got 65537"):
        top_scores(y, right, torch.zeros(1, 1), 1)


@pytest.mark.usefixtures("needs_cpp")
def test_rows_that_are_not_finite_have_no_score():
    y, right, offsets = drawn_scores(20, 40, 1, 6, torch.float32)
    y[3, 4], right[5, 1, 2] = math.inf, -math.inf
    found = top_scores(y, right, offsets, 40)
    assert (found[3] == -1).all()
    assert (found[torch.arange(20) != 3, :39].sort(1).values == torch.tensor([k for k in range(40) if k != 5])).all()


@pytest.mark.usefixtures("needs_cpp")
def test_rows_are_read_as_multiples_of_a_63rd_of_their_largest_entry():
    y, right, offsets = torch.randn(200, 30), torch.randn(400, 3, 30), torch.randn(400, 3)

    def read(rows: torch.Tensor) -> torch.Tensor:
        quantum = rows.abs().amax(-1, keepdim=True) / 63
        return quantum.double() * (rows * quantum.reciprocal()).round()

    scores = scores_of(read(y), read(right), offsets.double())
    found = top_scores(y, right, offsets, 20).long()
    expected = scores.topk(20).values
    assert torch.allclose(scores.gather(1, found), expected, rtol=1e-5)
    assert not torch.allclose(scores_of(y, right, offsets).topk(20).values.double(), expected, rtol=1e-3)


def test_what_has_no_score_is_left_out(backend):
    y, right, offsets = drawn_scores(50, 40, 1, 6, torch.float32)
    offsets[::2, 0] = -math.inf
    right[1] = math.nan
    y[7] = math.nan
    found = top_scores(y, right, offsets, 30)
    there = found[torch.arange(50) != 7]
    assert (there[:, 19:] == -1).all()
    assert torch.equal(there[:, :19].sort(1).values, torch.arange(3, 40, 2).int().expand(49, -1))
    assert (found[7] == -1).all()


def test_a_token_looks_at_its_groups_alone(backend):
    y, right, offsets = drawn_scores(300, 90, 2, 8, torch.float32)
    starts = torch.tensor([0, 40, 40, 41, 90])
    lists = torch.stack([torch.randperm(4)[:3] for _ in range(300)]).int()
    lists[::3, 1] = -1
    found = top_scores(y, right, offsets, 10, starts, lists)
    groups = torch.arange(4).repeat_interleave(starts.diff())
    scores = scores_of(y, right, offsets)
    scores[~(groups == lists.unsqueeze(2)).any(1)] = -math.inf
    best, index = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found, torch.where(best > -math.inf, index, -1)[:, :10].int())


@pytest.mark.parametrize(
    ("starts", "lists", "told"),
    [
        ([0, 90], None, "starts and lists come together"),
        ([0, 50, 40, 90], 0, "must not fall"),
        ([0, 50, 90], 2, r"must be in \[-1, 2\)"),
        ([0, 50, 90], -2, r"must be in \[-1, 2\)"),
    ],
)
def test_groups_that_are_none_are_refused(backend, starts, lists, told):
    y, right, offsets = drawn_scores(5, 90, 0, 8, torch.float32)
    lists = None if lists is None else torch.full((5, 1), lists, dtype=torch.int32)
    with pytest.raises((ValueError, IndexError), match=told):
        top_scores(y, right, offsets, 3, torch.tensor(starts), lists)

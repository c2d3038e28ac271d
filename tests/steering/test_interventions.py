"""Interventions as values: rows made of batched tensors, and errors that say what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfa_kernels.steering import Add, Offset, Remove, Toward
from mfa_kernels.steering.interventions import as_rows
from tests.helpers.refusals import check_refused
from tests.steering.tiny import fitting_mixture

Z = torch.ones(3)


def test_single_and_list(mfa: Any) -> None:
    ((one,),) = as_rows(Toward(2, 0.5), None, mfa)
    assert (one.component, one.alpha) == (2, 0.5)
    ((first, second),) = as_rows([Toward(None, 1), Offset(1, [1.0, 2.0, 3.0])], None, mfa)
    assert first.component is None
    torch.testing.assert_close(second.latents, torch.tensor([1.0, 2.0, 3.0]))
    assert as_rows([], None, mfa) == [()]


def test_tensors_with_a_batch_dimension_become_rows() -> None:
    z = torch.arange(9.0).reshape(3, 3)
    mfa = fitting_mixture()
    rows = as_rows([Toward(torch.tensor([4, 0, 2]), torch.tensor([0.1, 0.2, 0.3])), Offset(1, z)], None, mfa)
    assert [row[0].component for row in rows] == [4, 0, 2]
    assert [row[0].alpha for row in rows] == pytest.approx([0.1, 0.2, 0.3])
    assert [row[1].component for row in rows] == [1, 1, 1]
    torch.testing.assert_close(torch.stack([row[1].latents for row in rows]), z)
    # One entry is shared by all rows, however it is wrapped.
    (row,) = as_rows(Toward(torch.tensor(3), torch.tensor([0.5])), None, mfa)
    assert (row[0].component, row[0].alpha) == (3, 0.5)
    vectors = torch.arange(64.0).reshape(2, 32)
    rows = as_rows([Add(vectors, torch.tensor([1.0, 2.0])), Remove(torch.tensor([5, 3]), "region")], None, mfa)
    assert [(row[0].alpha, row[1].component, row[1].part) for row in rows] == [(1.0, 5, "region"), (2.0, 3, "region")]
    assert torch.equal(torch.stack([row[0].direction for row in rows]), vectors)


def test_rows() -> None:
    rows = as_rows(None, [Toward(1), None, [Toward(2), Offset(2, Z)], []], fitting_mixture())
    assert [len(row) for row in rows] == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ("interventions", "error", "message"),
    [
        (Toward(6), IndexError, r"component must be in \[0, 6\), got 6"),
        (Toward(-1), IndexError, "got -1"),
        (Toward(torch.tensor([0, 9])), IndexError, "got 9"),
        (Toward(torch.tensor([0.5])), TypeError, "component must have an integer dtype"),
        (Toward(torch.zeros(2, 2, dtype=torch.long)), ValueError, r"got torch.int64 of shape \(2, 2\)"),
        (Toward(torch.zeros(0, dtype=torch.long)), ValueError, r"of shape \(0,\)"),
        (Toward(1.5), TypeError, "component must be an int"),
        (Toward(True), TypeError, "component must be an int"),
        (Toward("3"), TypeError, "component must be an int"),
        (Toward(0, float("nan")), ValueError, "alpha must be finite, got nan"),
        (Toward(0, torch.tensor([0.0, float("inf")])), ValueError, "alpha must be finite"),
        (Toward(0, torch.zeros(2, 2)), ValueError, r"alpha must be a float or a tensor of shape \(B,\)"),
        (Toward(0, "much"), TypeError, "alpha must be a number, got 'much'"),
        (Offset(0, torch.ones(4)), ValueError, r"\(R,\) = \(3,\) or \(B, R\) = \(B, 3\), got \(4,\)"),
        (Offset(0, torch.ones(2, 2, 3)), ValueError, r"got \(2, 2, 3\)"),
        (Offset(0, torch.ones(0, 3)), ValueError, r"got \(0, 3\)"),
        (Offset(0, torch.full((3,), float("nan"))), ValueError, "latents must be finite"),
        (Add(torch.ones(31)), ValueError, r"direction must have shape \(D,\) = \(32,\) or \(B, D\) = \(B, 32\), got"),
        (Add(torch.full((32,), float("inf"))), ValueError, "direction must be finite"),
        (Remove(7), IndexError, r"component must be in \[0, 6\), got 7"),
        (Remove(0, "mean"), ValueError, "part must be one of 'latents', 'region', got 'mean'"),
        ([Toward(torch.tensor([0, 1]), torch.zeros(3))], ValueError, "batch dimensions differ"),
        ([Toward(torch.tensor([0, 1])), Offset(0, torch.ones(3, 3))], ValueError, "batch dimensions differ"),
        ("all", TypeError, "must be Toward, Offset, Add, Reconstruct, Remove or a sequence of them, got 'all'"),
        ([Toward(0), 3], TypeError, "must be Toward, Offset"),
    ],
)  # fmt: skip
def test_bad_interventions_are_named(interventions: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_rows(interventions, None, fitting_mixture())


def test_bad_rows_are_named(mfa: Any) -> None:
    check_refused(ValueError, "exactly one of them", as_rows, None, None, mfa)
    check_refused(ValueError, "exactly one of them", as_rows, [], [None], mfa)
    check_refused(ValueError, "one entry per batch row", as_rows, None, [], mfa)
    check_refused(TypeError, r"rows\[1\] must be Toward", as_rows, None, [None, 7], mfa)
    with pytest.raises(ValueError, match=r"rows\[0\] is for one row, but its tensors have a batch dimension of 2"):
        as_rows(None, [Toward(0, torch.zeros(2))], mfa)
    check_refused(ValueError, "rank 0", as_rows, Offset(0, torch.ones(0)), None, fitting_mixture(rank=0))

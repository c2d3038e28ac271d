"""A folded list of interventions equals its entries applied one after the other, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.steering import Offset, Toward, intervene
from mfa_kernels.steering.composition import Composition
from mfa_kernels.steering.interventions import as_rows
from tests.steering.tiny import COMPONENTS, RANK, WIDTH, fitting_mixture


def one_by_one(x: Tensor, mfa: MFA, interventions: list[Any], step: int = 0) -> Tensor:
    """Equations 14 and 15 as they are written, dense, with the responsibilities of the x that came in; x is (N, D)."""
    responsibilities = mfa.responsibilities(x)
    out = x
    for entry in interventions:
        weights = responsibilities
        if entry.component is not None:
            weights = torch.nn.functional.one_hot(torch.tensor(entry.component), COMPONENTS).to(x).expand(len(x), -1)
        if isinstance(entry, Toward):
            alpha = entry.alpha(step) if callable(entry.alpha) else entry.alpha
            out = (1 - alpha) * out + alpha * weights @ mfa.means
        else:
            out = out + torch.einsum("nk,kdr,r->nd", weights, mfa.loadings, entry.latents.to(x))
    return out


def z(seed: int) -> Tensor:
    return torch.randn(RANK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LISTS: dict[str, list[Any]] = {
    "toward": [Toward(2, 0.4)],
    "offset": [Offset(2, z(0))],
    "both": [Toward(2, 0.4), Offset(2, z(0))],
    "offset first": [Offset(2, z(0)), Toward(3, 0.4)],
    "replace": [Toward(1, 0.3), Toward(4, 1.0)],
    "away": [Toward(1, -0.5), Toward(0, 1.5)],
    "mixture": [Toward(None, 0.4)],
    "mixture offset": [Offset(None, z(1))],
    "mixture both": [Toward(None, 0.4), Offset(None, z(1))],
    "mixture both ways": [Offset(None, z(1)), Toward(None, 0.4), Offset(None, z(2)), Toward(None, 0.25)],
    "mixed": [Toward(5, 0.2), Offset(None, z(3)), Toward(None, 0.6), Offset(4, z(4)), Toward(2, 0.1)],
    "scheduled": [Toward(1, lambda step: 0.1 * step), Offset(None, z(1)), Toward(None, lambda step: 0.5 / (step + 1))],
    "nothing": [],
}


def tokens(count: int = 9) -> Tensor:
    return 0.5 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("name", LISTS)
def test_folded_list_equals_one_by_one(name: str, backend: str) -> None:
    mfa, x = fitting_mixture(torch.float64), tokens()
    assert (mfa.responsibilities(x) > 1e-3).sum() > 2 * len(x)  # the mixture is diffuse enough to matter
    for step in (0, 3):
        out = intervene(x, mfa, LISTS[name], step=step)
        torch.testing.assert_close(out, one_by_one(x, mfa, LISTS[name], step), rtol=1e-11, atol=1e-11)


def test_rows_of_different_lengths_and_kinds(backend: str) -> None:
    mfa, x = fitting_mixture(torch.float64), tokens(len(LISTS))
    rows = [entries or None for entries in LISTS.values()]
    out = intervene(x, mfa, rows=rows, step=2)
    for i, entries in enumerate(LISTS.values()):
        torch.testing.assert_close(out[i], one_by_one(x[i : i + 1], mfa, entries, 2)[0], rtol=1e-11, atol=1e-11)
    assert torch.equal(out[-1], x[-1])


def test_steps_of_a_schedule_are_separate_columns() -> None:
    mfa = fitting_mixture(torch.float64)
    entries = as_rows([Toward(1, lambda step: 0.1 * step), Offset(2, z(0))], None, mfa)
    composition = Composition(mfa, entries, torch.device("cpu"))
    assert composition.is_scheduled
    several = composition.fold((0, 0, 1, 4))
    assert several.scale.shape == (1, 4, 1)
    assert several.shift.shape == (1, 4, WIDTH)
    for column, step in enumerate((0, 0, 1, 4)):
        single = composition.fold((step,))
        assert isinstance(single.scale, float)
        assert several.scale[0, column].item() == pytest.approx(single.scale)
        torch.testing.assert_close(several.shift[0, column], single.shift[0, 0])


@pytest.mark.parametrize("bad", [lambda step: float("nan"), lambda step: None])
def test_a_schedule_must_give_finite_numbers(bad: Callable[[int], Any]) -> None:
    mfa = fitting_mixture(torch.float64)
    with pytest.raises((ValueError, TypeError), match=r"alpha\(3\) must be"):
        intervene(tokens(), mfa, Toward(0, bad), step=3)


def test_half_precision_mixture_folds_in_float32() -> None:
    mfa = fitting_mixture().bfloat16()
    composition = Composition(
        mfa, as_rows([Toward(1, 0.3), Offset(1, [1.0, 2.0, 3.0])], None, mfa), torch.device("cpu")
    )
    folded = composition.fold()
    wide = 0.3 * mfa.means[1].float() + mfa.loadings[1].float() @ torch.tensor([1.0, 2.0, 3.0])
    assert folded.shift.dtype == torch.float32
    torch.testing.assert_close(folded.shift[0, 0], wide)

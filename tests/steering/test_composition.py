"""A folded list of interventions equals its entries applied one after the other, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.steering import Add, Offset, Reconstruct, Remove, Toward, intervene
from mfa_kernels.steering.composition import Composition
from mfa_kernels.steering.interventions import as_rows
from tests.helpers.mixtures import mixture
from tests.steering.tiny import COMPONENTS, RANK, WIDTH, fitting_mixture


def one_by_one(x: Tensor, mfa: MFA, interventions: list[Any], step: int = 0) -> Tensor:
    """The definitions as they are written, dense, with the responsibilities and latents of the incoming x, (N, D)."""
    responsibilities, out = mfa.responsibilities(x), x
    noise = mfa.noise_variance.expand_as(mfa.means).diag_embed()
    covariance = mfa.loadings @ mfa.loadings.mT + noise
    away = x.unsqueeze(1) - mfa.means
    local = torch.linalg.solve(covariance, away.unsqueeze(-1)).squeeze(-1)  # W_k^T C_k^-1 (x - mu_k) are the latents
    local = torch.einsum("kdr,ker,nke->nkd", mfa.loadings, mfa.loadings, local)
    mean = mfa.log_weights.exp() @ mfa.means
    for entry in interventions:
        k = getattr(entry, "component", None)
        every = torch.ones_like(responsibilities) if k is None else one_hot(k).expand(len(x), -1)
        weights = responsibilities if k is None else every
        alpha = getattr(entry, "alpha", 0.0)
        alpha = alpha(step) if callable(alpha) else alpha
        if isinstance(entry, Toward):
            out = (1 - alpha) * out + alpha * weights @ mfa.means
        elif isinstance(entry, Offset):
            out = out + torch.einsum("nk,kdr,r->nd", weights, mfa.loadings, entry.latents.to(x))
        elif isinstance(entry, Add):
            out = out + alpha * entry.direction
        elif isinstance(entry, Reconstruct):
            out = (1 - alpha) * out + alpha * (responsibilities.unsqueeze(-1) * (mfa.means + local)).sum(1)
        elif entry.part == "latents":
            out = out - alpha * (weights.unsqueeze(-1) * local).sum(1)
        else:
            out = out - alpha * ((responsibilities * every).unsqueeze(-1) * (mfa.means - mean + local)).sum(1)
    return out


def one_hot(k: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(k), COMPONENTS).double()


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
    "vector": [Add(torch.linspace(-1, 1, WIDTH).double(), 1.5)],
    "reconstruct": [Reconstruct()],
    "toward the reconstruction": [Toward(3, 0.3), Reconstruct(0.25), Offset(2, z(1))],
    "remove latents": [Remove(2)],
    "remove a region": [Remove(2, "region")],
    "remove all latents": [Remove(None, alpha=0.8)],
    "remove all regions": [Remove(None, "region", -0.5)],
    "remove several": [Remove(0, "region", 0.9), Toward(None, 0.4), Remove(3), Remove(1, "region"), Toward(4, 0.2)],
    "remove by schedule": [Remove(1, "region", lambda step: 0.2 + 0.1 * step), Reconstruct(lambda step: 0.3 * step)],
    "vector and mixture": [Offset(None, z(4)), Add(torch.ones(WIDTH).double(), lambda step: step), Reconstruct(0.5)],
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


def test_noise_per_component(backend: str) -> None:
    m = mixture(COMPONENTS, WIDTH, RANK, per_component=True, spread=0.3, dtype=torch.float64)
    mfa = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()).requires_grad_(False)
    for name in ("remove several", "vector and mixture", "remove all regions"):
        out = intervene(tokens(), mfa, LISTS[name], step=1)
        torch.testing.assert_close(out, one_by_one(tokens(), mfa, LISTS[name], 1), rtol=1e-11, atol=1e-11)


def test_removing_a_region_does_not_depend_on_the_origin() -> None:
    mfa, x = fitting_mixture(torch.float64), tokens()
    moved = fitting_mixture(torch.float64)
    moved.means += 5
    for entry in (Remove(1, "region"), Remove(1), Remove(None, "region"), Reconstruct()):
        out = intervene(x, mfa, entry)
        torch.testing.assert_close(intervene(x + 5, moved, entry), out + 5, rtol=1e-9, atol=1e-9)


def test_many_diffuse_components_all_count(backend: str) -> None:
    """More active components than slots: none is left out."""
    m = mixture(40, WIDTH, RANK, spread=0.05, dtype=torch.float64)
    mfa = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()).requires_grad_(False)
    x = tokens()
    r = mfa.responsibilities(x)
    assert (r > 1e-10).all()
    torch.testing.assert_close(intervene(x, mfa, Toward(None, 1.0)), r @ mfa.means, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(intervene(x, mfa, Reconstruct()), mfa.reconstruct(x), rtol=1e-11, atol=1e-11)


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

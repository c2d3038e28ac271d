"""The map of regions."""

from __future__ import annotations

import warnings

import pytest
import torch

from mfa_kernels.explorer import layout
from mfa_kernels.explorer.layout import Layout


def _clusters() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(60) % 3
    centers = 20 * torch.randn(3, 12, generator=generator)
    return centers[group] + torch.randn(60, 12, generator=generator), group


def _share_of_neighbors(places: torch.Tensor, group: torch.Tensor) -> float:
    """The share of points whose nearest point on the map is of their group."""
    distance = torch.cdist(places, places).fill_diagonal_(torch.inf)
    return float((group[distance.argmin(1)] == group).float().mean())


def test_places_are_there_at_once_and_improve() -> None:
    means, group = _clusters()
    made = Layout(means)
    assert (made.name, made.is_final) == (layout.PRINCIPAL, False)
    assert _share_of_neighbors(made.places, group) > 0.9
    made.refine()
    made.refine()  # once
    made.wait(60)
    assert (made.name, made.is_final) == (layout.TSNE, True)
    assert _share_of_neighbors(made.places, group) == 1.0
    assert float(made.places.abs().max()) <= 1.0


def test_many_regions_are_laid_out_by_scikit_learn(monkeypatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(layout, "_EXACT", 10)
    means, group = _clusters()
    made = Layout(means.repeat(2, 1))
    made.refine()
    made.wait(120)
    assert made.name == layout.TSNE
    assert _share_of_neighbors(made.places, group.repeat(2)) > 0.95


def test_without_scikit_learn_the_map_stays_as_it_is(monkeypatch) -> None:
    monkeypatch.setattr(layout, "_EXACT", 10)
    monkeypatch.setattr(layout, "find_spec", lambda name: None)
    made = Layout(_clusters()[0])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made.refine()
        made.wait(60)
    assert (made.name, made.is_final) == (layout.PRINCIPAL, True)
    assert "pip install mfa_kernels[explore]" in str(told[0].message)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_regions_have_places_too(count: int) -> None:
    made = Layout(torch.randn(count, 5))
    assert made.is_final
    assert made.places.shape == (count, 2)
    assert bool(made.places.isfinite().all())


def test_far_regions_do_not_press_the_others_together() -> None:
    means = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    means[0] *= 1000
    places = Layout(means).places
    assert float(places[1:].std()) > 0.1

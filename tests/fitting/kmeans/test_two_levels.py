from __future__ import annotations

import pytest
import torch

from mfa_kernels import fit, kmeans
from mfa_kernels.data.source import as_source
from mfa_kernels.fitting import preparation, stages
from mfa_kernels.fitting.initialization import start_from_clusters
from mfa_kernels.fitting.kmeans.two_levels import closest, two_levels
from tests.fitting.planted import draw, planted

ROWS = draw(planted(60, 12, 2), 5000)


@pytest.mark.parametrize("weights", [None, torch.arange(5000) % 3 + 1.0])
def test_about_as_good_as_one_level(weights):
    found = two_levels(as_source(ROWS), 100, weights=weights, progress=False)
    whole = kmeans(ROWS, 100, weights=weights, iterations=10, progress=False)
    assert found.centroids.shape == whole.centroids.shape
    assert found.inertia < 1.25 * whole.inertia
    assert (found.assign(ROWS) == found.assignment).float().mean() > 0.98, "nearly all are at their nearest"
    weight = torch.ones(5000) if weights is None else weights
    gap = (ROWS - found.centroids[found.assignment]).square().sum(1)
    assert found.inertia == pytest.approx(float((gap * weight).sum()), rel=1e-4)
    assert found.counts.double().tolist() == found.assignment.bincount(weight.double(), 100).tolist()


def test_the_same_seed_gives_the_same_bits():
    found = [two_levels(as_source(ROWS), 80, seed=seed, progress=False) for seed in (1, 1, 2)]
    assert torch.equal(found[0].centroids, found[1].centroids)
    assert not torch.equal(found[0].centroids, found[2].centroids)


def test_as_many_clusters_as_rows_and_rows_that_are_equal():
    assert len(two_levels(as_source(ROWS[:50]), 50, progress=False).centroids) == 50
    same = ROWS[:10].repeat(30, 1)
    found = two_levels(as_source(same), 40, progress=False)
    assert found.inertia < 1e-3 * float(same.square().sum())


def test_closest():
    points = torch.randn(70, 5)
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert torch.equal(closest(points, 4).long().sort(1).values, distance.topk(4, largest=False).indices.sort(1).values)
    assert closest(points[:3], 4).shape == (3, 2)


def test_a_fit_of_many_begins_with_them(monkeypatch):
    monkeypatch.setattr(stages, "FEWEST", 50)
    monkeypatch.setattr(preparation, "LEAST_TRUNCATED", 50)
    mfa = fit(ROWS, 60, 2, epochs=4, progress=False)
    assert mfa.fit_report.method == "truncated"
    monkeypatch.undo()
    whole = fit(ROWS, 60, 2, epochs=4, method="em", progress=False)
    assert mfa.fit_report.held_out_nll < whole.fit_report.held_out_nll + 1.0


@pytest.mark.parametrize(
    "wrong", [torch.zeros(4999).long(), torch.zeros(5000), torch.full((5000,), 60), torch.full((5000,), -1)]
)
def test_an_assignment_that_does_not_fit_is_named(wrong):
    with pytest.raises(ValueError, match="assignment must be"):
        start_from_clusters(ROWS, ROWS[:60], 2, assignment=wrong, progress=False)

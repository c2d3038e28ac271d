from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from mfa_kernels.fitting import kmeans
from mfa_kernels.fitting.kmeans.merge_split import exchange


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def crowds(sizes: list[int], centers: list[list[float]], spread: float = 0.1) -> Tensor:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.tensor(centers)[labels] + spread * torch.randn(len(labels), len(centers[0]), generator=generator())


def partition(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    owner = torch.cdist(x, centroids).argmin(1)
    return owner, torch.stack([x[owner == k].mean(0) for k in range(len(centroids))])


def inertia(x: Tensor, centroids: Tensor, weights: Tensor | None = None) -> float:
    least = torch.cdist(x.double(), centroids.double()).min(1).values.square()
    return float((least if weights is None else least * weights).sum())


CENTERS = [[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 2.0]]


@pytest.mark.parametrize("basis", [None, torch.eye(3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_two_centroids_in_one_crowd_and_one_in_two(basis, weighted):
    x = crowds([300, 200, 150, 150], CENTERS)
    weights = 0.5 + torch.rand(800, generator=generator()).double() if weighted else None
    owner, means = partition(x, torch.tensor([[-0.1, 0, 0], [0.1, 0, 0], [9.0, 0, 0], [0, 9.0, 1.0]]))
    moved, moves = exchange(x, owner, means, generator(), weights, basis)
    assert moves == 1
    assert torch.cdist(torch.tensor(CENTERS), moved).min(1).values.max() < 0.1
    assert inertia(x, moved, weights) < 0.1 * inertia(x, means, weights)


def test_the_inertia_falls_by_at_least_what_was_counted():
    x = torch.randn(3000, 5, generator=generator()).pow(3)
    owner, means = partition(x, x[:60])
    moved, moves = exchange(x, owner, means, generator())
    assert moves > 0
    assert inertia(x, moved) < inertia(x, means)
    unmoved = (moved == means).all(1)
    assert int((~unmoved).sum()) <= 3 * moves
    assert moved.unique(dim=0).shape == means.shape


def test_nothing_to_gain():
    x = crowds([200, 200, 200, 200], CENTERS)
    owner, means = partition(x, torch.tensor(CENTERS))
    moved, moves = exchange(x, owner, means, generator())
    assert moves == 0
    assert torch.equal(moved, means)


def test_rows_without_a_cluster_and_clusters_without_rows():
    x = crowds([300, 200, 150, 150], CENTERS)
    owner, means = partition(x, torch.tensor([[0.0, 0, 0], [9.0, 0, 0], [0, 9.0, 1.0]]))
    means = torch.cat([means, torch.full((1, 3), 50.0)])  # owns nothing
    lost = torch.cat([x, torch.full((3, 3), torch.nan)])
    moved, moves = exchange(lost, torch.cat([owner, torch.full((3,), 4)]), means, generator())
    assert moves == 1
    assert torch.cdist(torch.tensor(CENTERS), moved).min(1).values.max() < 0.1


def test_one_cluster():
    x = crowds([50], [[1.0, 2.0]])
    moved, moves = exchange(x, torch.zeros(50, dtype=torch.long), x.mean(0, keepdim=True), generator())
    assert (moves, moved.shape) == (0, (1, 2))


def test_kmeans_leaves_a_poor_start(monkeypatch):
    g = generator()
    centers = 30 * torch.randn(40, 6, generator=g)
    x = centers[torch.randint(40, (6000,), generator=g)] + torch.randn(6000, 6, generator=g)
    found = kmeans(x, 40, init="random", progress=False)
    monkeypatch.setattr(importlib.import_module("mfa_kernels.fitting.kmeans.kmeans"), "_EXCHANGES", 0)
    without = kmeans(x, 40, init="random", progress=False)
    assert found.inertia < 0.7 * without.inertia
    assert torch.cdist(centers, found.centroids).min(1).values.max() < 1.0

from __future__ import annotations

import torch

from mfa_kernels.fitting.kmeans import seeding


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_draw_is_by_mass_and_without_replacement():
    mass = torch.tensor([0.0, 1.0, 2.0, 0.0, 7.0])
    counts = torch.zeros(5)
    for seed in range(2000):
        counts[seeding.draw(mass, 1, generator(seed))] += 1
    torch.testing.assert_close(counts / 2000, mass / 10, atol=0.04, rtol=0)
    assert sorted(seeding.draw(mass, 9, generator()).tolist()) == [1, 2, 4]


def test_far_groups_all_get_a_centroid():
    g = generator()
    centers = 100 * torch.randn(20, 8, generator=g)
    sizes = torch.arange(20) * 5 + 3  # groups of very different sizes
    labels = torch.repeat_interleave(torch.arange(20), sizes)
    x = centers[labels] + torch.randn(len(labels), 8, generator=g)
    for seed in range(5):
        found = seeding.k_means_parallel(x, None, 20, generator(seed))
        assert torch.cdist(found, centers).argmin(1).unique().numel() == 20


def test_only_distinct_rows_are_chosen():
    x = torch.randn(5, 3, generator=generator()).repeat(20, 1)
    found = seeding.k_means_parallel(x, None, 8, generator())
    assert found.shape == (5, 3)
    assert found.unique(dim=0).shape == (5, 3)


def test_rows_without_weight_are_not_chosen():
    x = torch.randn(40, 3, generator=generator())
    weights = torch.zeros(40)
    weights[10:20] = 1
    found = seeding.k_means_parallel(x, weights, 10, generator())
    assert torch.equal(found.sort(0).values, x[10:20].sort(0).values)

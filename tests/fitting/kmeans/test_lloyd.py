from __future__ import annotations

import torch

from mfa_kernels.fitting import as_source
from mfa_kernels.fitting.kmeans import lloyd


def rows(n: int, d: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + offset


def test_partition_does_not_depend_on_the_chunks(monkeypatch):
    x, centroids, center = rows(1000, 4, offset=3.0), rows(5, 4, seed=1), torch.full((4,), 3.0)
    x[17, 2] = float("nan")
    x[999, 0] = float("inf")
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(2)).double()
    rows_of = lloyd.Rows(as_source(x), center, weights)
    whole = lloyd.partition(rows_of, centroids)
    monkeypatch.setitem(lloyd._CHUNK_ELEMENTS, "cpu", 4 * 129)
    parts = lloyd.partition(rows_of, centroids)
    assert torch.equal(whole.owner, parts.owner)
    assert (whole.owner == 5).nonzero().squeeze(1).tolist() == [17, 999]
    assert torch.equal(whole.distance, parts.distance)
    assert (whole.distance[[17, 999]] == 0).all()
    for a, b in zip(whole[2:], parts[2:]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    keep = whole.owner < 5
    torch.testing.assert_close(whole.mass.sum(), weights[keep].sum())
    torch.testing.assert_close(whole.inertia.sum(), (whole.distance * weights)[keep].sum(), rtol=1e-6, atol=0)


def split(x: torch.Tensor, centroids: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor | None:
    rows_of = lloyd.Rows(as_source(x), torch.zeros(x.shape[1]), weights)
    part = lloyd.partition(rows_of, centroids)
    return lloyd.split_empty(rows_of, part, centroids, torch.Generator().manual_seed(0))


def test_an_empty_cluster_moves_into_the_one_with_the_largest_inertia():
    near, far = rows(50, 2), rows(50, 2, seed=1) * 30 + 500
    centroids = torch.tensor([[0.0, 0.0], [500.0, 500.0], [1e6, 1e6], [-1e6, 0.0]])
    moved = split(torch.cat([near, far]), centroids)
    assert torch.equal(moved[:2], centroids[:2])
    for k in (2, 3):
        assert (far == moved[k]).all(1).any()
    assert not torch.equal(moved[2], moved[3])


def test_empty_clusters_move_to_distinct_rows():
    x = torch.cat([torch.zeros(50, 1), torch.arange(10.0, 16.0).unsqueeze(1).repeat(3, 1)])
    moved = split(x, torch.cat([torch.zeros(1, 1), torch.full((6, 1), 1e6)]))
    assert moved.flatten().sort().values.tolist() == [0, 10, 11, 12, 13, 14, 15]


def test_nothing_to_split():
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(10, 1)
    assert split(x, torch.tensor([[0.0, 0.0], [1.0, 1.0]])) is None, "nothing is empty"
    assert split(x, torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])) is None, "two distinct rows"


def test_a_row_without_weight_is_no_place_for_a_centroid():
    x = torch.tensor([[0.0], [1.0], [50.0]])
    moved = split(x, torch.tensor([[0.0], [1e6]]), torch.tensor([1.0, 1.0, 0.0]))
    assert moved.flatten().tolist() == [0.0, 1.0]

from __future__ import annotations

import importlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import mfa_kernels
from mfa_kernels.data import reservoir
from mfa_kernels.fitting import KMeansResult, kmeans
from mfa_kernels.fitting.kmeans import lloyd as lloyd_module
from tests.fitting.planted import Store, counted_batches


def blobs(clusters: int = 8, rows: int = 800, features: int = 5, spread: float = 6.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    centers = spread * torch.randn(clusters, features, generator=g)
    return centers[torch.randint(clusters, (rows,), generator=g)] + torch.randn(rows, features, generator=g)


def run(x, n_clusters: int, **options) -> KMeansResult:
    return kmeans(x, n_clusters, progress=False, **options)


def plain_lloyd(x: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Lloyd's algorithm as it is written in books, in float64."""
    x, centroids = x.double(), centroids.double().clone()
    for _ in range(iterations):
        owner = torch.cdist(x, centroids).argmin(1)
        for k in range(len(centroids)):
            if (owner == k).any():
                centroids[k] = x[owner == k].mean(0)
    return centroids


def is_consistent(x: Tensor, result: KMeansResult, weights: Tensor | None = None) -> None:
    finite = x.isfinite().all(1)
    distance = torch.cdist(x[finite].double(), result.centroids.double()).square()
    best, owner = distance.min(1)
    assert torch.equal(result.assignment[finite], owner)
    assert (result.assignment[~finite] == -1).all()
    assert result.skipped == int((~finite).sum())
    weights = torch.ones(len(x)).double() if weights is None else weights.double()
    assert result.inertia == pytest.approx(float((best * weights[finite]).sum()), rel=1e-5)
    counts = torch.zeros(len(result.centroids)).double().index_add_(0, owner, weights[finite])
    torch.testing.assert_close(result.counts.double(), counts)


@pytest.mark.parametrize("iterations", [1, 3, 12])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_agrees_with_a_plain_lloyd_loop(iterations, offset):
    x = blobs(spread=1.0) + offset
    start = x[:8].clone()
    result = run(x, 8, init=start, iterations=iterations, tol=0)
    torch.testing.assert_close(result.centroids.double(), plain_lloyd(x, start, iterations), rtol=1e-6, atol=1e-4)
    assert result.iterations <= iterations


@pytest.mark.parametrize("init", ["k-means||", "random"])
def test_result_fits_together(init):
    x = blobs()
    result = run(x, 8, init=init)
    is_consistent(x, result)
    assert result.counts.dtype == torch.int64
    assert result.assignment.dtype == torch.int64
    assert result.centroids.shape == (8, 5)


def test_finds_separated_clusters():
    g = torch.Generator().manual_seed(0)
    centers = 50 * torch.randn(30, 6, generator=g)
    x = centers[torch.arange(900) % 30] + torch.randn(900, 6, generator=g)
    for seed in range(3):
        result = run(x, 30, seed=seed)
        assert torch.cdist(centers, result.centroids).min(1).values.max() < 1.0
        assert (result.counts == 30).all()


def test_inertia_never_increases():
    x = blobs(spread=0.5)
    history = [run(x, 12, init="random", iterations=i, tol=0).inertia for i in range(15)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(history))
    assert history[-1] < 0.9 * history[0]


def test_k_means_parallel_starts_better_than_random():
    x = blobs(clusters=40, rows=4000, spread=10.0)
    parallel = [run(x, 40, seed=s, iterations=0).inertia for s in range(3)]
    random = [run(x, 40, seed=s, iterations=0, init="random").inertia for s in range(3)]
    assert max(parallel) < 0.5 * min(random)


def test_same_seed_same_bits_and_global_generator_untouched():
    x = blobs(spread=0.5, rows=3000)
    state = torch.get_rng_state()
    a, b, c = run(x, 20, seed=3), run(x, 20, seed=3), run(x, 20, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.centroids, b.centroids)
    assert torch.equal(a.assignment, b.assignment)
    assert a.inertia == b.inertia
    assert not torch.equal(a.centroids, c.centroids)


def test_weights_count_as_repeated_rows():
    x = blobs(spread=1.0, rows=300)
    weights = torch.arange(300) % 4
    start = x[1:7].clone()
    weighted = run(x, 6, init=start, weights=weights, tol=0)
    repeated = run(x.repeat_interleave(weights, dim=0), 6, init=start, tol=0)
    torch.testing.assert_close(weighted.centroids, repeated.centroids, rtol=1e-5, atol=1e-5)
    assert weighted.inertia == pytest.approx(repeated.inertia, rel=1e-5)
    torch.testing.assert_close(weighted.counts, repeated.counts.double())
    is_consistent(x, weighted, weights)


@pytest.mark.parametrize("unit", [2.0**-1000, 2.0**-200, 2.0**200, 2.0**900])
@pytest.mark.parametrize("init", ["k-means||", "random"])
def test_weights_have_no_unit(init, unit):
    """Beyond the range of float32 too; by powers of two, which round nothing."""
    x, weights = blobs(rows=300), torch.arange(300).double() % 4
    expected, found = (run(x, 6, init=init, weights=weights * times) for times in (1.0, unit))
    assert torch.equal(found.centroids, expected.centroids)
    assert torch.equal(found.counts, expected.counts * unit)
    assert found.inertia == expected.inertia * unit


def test_a_sample_is_one_of_rows_that_have_a_weight():
    x, weights = blobs(rows=2000), (torch.arange(2000) % 100 == 0).double()
    result = run(x, 8, weights=weights, sample=100)
    assert float(result.counts.sum()) == 20
    assert result.inertia <= 1.2 * run(x[weights > 0], 8).inertia
    with pytest.raises(ValueError, match="x has no finite row of positive weight"):
        run(x, 8, weights=torch.zeros(2000), sample=100)


def test_a_heavy_row_keeps_its_centroid():
    x = blobs(rows=200)
    weights = torch.ones(200)
    weights[5] = 1e6
    result = run(x, 8, weights=weights)
    assert (result.centroids - x[5]).norm(dim=1).min() < 1e-2


def test_empty_clusters_are_filled():
    x = blobs(spread=2.0)
    start = torch.cat([x[:3], torch.full((5, 5), 1e3) + torch.arange(5.0).unsqueeze(1)])
    result = run(x, 8, init=start)
    assert (result.counts > 0).all()
    assert result.centroids.unique(dim=0).shape[0] == 8
    is_consistent(x, result)


def test_duplicate_centroids_come_apart():
    x = blobs(spread=2.0)
    result = run(x, 8, init=x[:1].expand(8, -1))
    assert (result.counts > 0).all()
    assert result.centroids.unique(dim=0).shape[0] == 8


@pytest.mark.parametrize("init", ["k-means||", "random"])
def test_repeated_rows_as_many_as_clusters(init):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).repeat(50, 1)
    result = run(x, 6, init=init)
    assert result.inertia < 1e-6
    assert (result.counts == 50).all()


@pytest.mark.parametrize("init", ["k-means||", "random"])
def test_fewer_distinct_rows_than_clusters(init):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).repeat(20, 1)
    with pytest.warns(UserWarning, match="2 of 5 clusters own no row"):
        result = run(x, 5, init=init)
    assert sorted(result.counts.tolist()) == [0, 0, 20, 20, 20]
    assert result.centroids.isfinite().all()
    assert result.inertia < 1e-6


def test_rows_that_are_not_finite_are_skipped():
    x = blobs()
    clean = run(x, 8)
    dirty = torch.cat([x[:10], torch.full((2, 5), float("nan")), x[10:], torch.full((1, 5), float("inf"))])
    dirty[11, 1:] = 0
    result = run(dirty, 8)
    assert result.skipped == 3
    assert result.assignment[[10, 11, -1]].tolist() == [-1, -1, -1]
    is_consistent(dirty, result)
    assert result.inertia == pytest.approx(clean.inertia, rel=0.2)
    assert int(result.counts.sum()) == len(x)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sample_and_then_all_rows(weighted):
    x = blobs(rows=5000)
    x[7] = float("nan")
    weights = torch.rand(5000, generator=torch.Generator().manual_seed(0)).double() if weighted else None
    result = run(x, 8, sample=400, weights=weights)
    is_consistent(x, result, weights)
    assert len(result.assignment) == 5000
    assert result.inertia < 1.1 * run(x, 8, weights=weights).inertia


def test_all_rows_move_the_centroids_of_a_sample(monkeypatch):
    x = blobs(rows=5000, spread=2.0)
    final = run(x, 8, sample=50)
    monkeypatch.setattr(importlib.import_module("mfa_kernels.fitting.kmeans.kmeans"), "_FULL_PASSES", 0)
    sampled = run(x, 8, sample=50)
    assert final.inertia < 0.98 * sampled.inertia
    assert final.iterations == sampled.iterations + 2


def test_chunks_do_not_matter(monkeypatch):
    x = blobs(rows=1000)
    whole = run(x, 8)
    monkeypatch.setitem(lloyd_module._CHUNK_ELEMENTS, "cpu", 5 * 300)
    parts = run(x, 8)
    torch.testing.assert_close(whole.centroids, parts.centroids, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.assignment, parts.assignment)


def test_kinds_of_data_agree():
    x = blobs()
    expected = run(x, 8)
    for data in (x.numpy(), Store(x), list(x.split(100)), x.view(2, 400, 5)):
        result = run(data, 8)
        assert torch.equal(result.centroids, expected.centroids)
        assert torch.equal(result.assignment, expected.assignment)


def test_a_stream_is_sampled_as_it_is_read():
    x = blobs(rows=5000)
    alive: list[int] = []
    result = run(counted_batches(x, 100, alive), 8, sample=700, seed=3)
    assert max(alive) <= 2
    sample = reservoir(x.split(64), 700, seed=3)
    expected = run(sample, 8, seed=3)
    assert torch.equal(result.centroids, expected.centroids)
    assert torch.equal(result.assignment, expected.assignment)
    assert result.inertia == expected.inertia
    assert expected.rows is None
    assert torch.equal(x[result.rows], sample)
    whole = run(x, 8)
    distance = torch.cdist(result.centroids, whole.centroids).min(1).values
    assert distance.max() < 0.1 * torch.cdist(whole.centroids, whole.centroids).fill_diagonal_(math.inf).min()


def test_batches_without_rows_are_passed_over():
    x = blobs()
    expected, found = run(iter([x]), 8), run(iter([x[:0], x[:300], x[:0], x[300:]]), 8)
    assert torch.equal(found.centroids, expected.centroids)


def test_a_short_stream_is_kept_whole():
    x = blobs()
    result, expected = run(iter(x.split(90)), 8), run(x, 8)
    assert torch.equal(result.centroids, expected.centroids)
    assert torch.equal(result.assignment, expected.assignment)
    assert torch.equal(result.rows, torch.arange(800))


def test_precisions():
    x = blobs()
    assert run(x.double(), 8).centroids.dtype == torch.float64
    assert run(x.half(), 8).centroids.dtype == torch.float32
    assert run(x.numpy().astype(np.float16), 8).centroids.dtype == torch.float32


def test_far_from_the_origin():
    x = blobs(spread=3.0)
    far = (x.double() + 1e4).float()
    assert run(far, 8).inertia == pytest.approx(run(far.double() - 1e4, 8).inertia, rel=1e-3)


def test_one_cluster_and_as_many_clusters_as_rows():
    x = blobs(rows=40)
    one = run(x, 1)
    torch.testing.assert_close(one.centroids[0], x.mean(0))
    every = run(x, 40)
    assert every.inertia < 1e-6
    assert (every.counts == 1).all()


def test_public_name():
    assert mfa_kernels.kmeans is kmeans


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_clusters": 0}, ValueError, "n_clusters must be an integer >= 1, got 0"),
        ({"n_clusters": 2.5}, TypeError, "n_clusters must be an integer"),
        ({"n_clusters": 801}, ValueError, "n_clusters = 801 needs at least as many finite rows, got 800 of 800"),
        ({"iterations": -1}, ValueError, "iterations"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"tol": float("nan")}, ValueError, "tol"),
        ({"sample": 3}, ValueError, "sample must be at least n_clusters = 8, got 3"),
        ({"init": "best"}, ValueError, "init must be one of 'k-means|"),
        ({"init": torch.zeros(8, 4)}, ValueError, r"init must have shape \(K, D\) = \(8, 5\), got \(8, 4\)"),
        ({"init": torch.full((8, 5), float("nan"))}, ValueError, "init must be finite"),
        ({"weights": torch.ones(3)}, ValueError, r"weights must have shape \(N,\) = \(800,\), got \(3,\)"),
        ({"weights": -torch.ones(800)}, ValueError, "weights must be finite and non-negative"),
        ({"weights": torch.full((800,), float("nan"))}, ValueError, "weights must be finite"),
        ({"weights": torch.eye(800)[0]}, ValueError, "finite rows of positive weight, got 1 of 800"),
        ({"weights": torch.zeros(800)}, ValueError, "no finite row of positive weight"),
        ({"x": iter([blobs()]), "weights": torch.ones(800)}, ValueError, "weights must be None for an iterator"),
        ({"x": iter([])}, ValueError, "x is an iterable without batches"),
        ({"x": iter([blobs(), blobs()[:, :3]])}, ValueError, r"x\[1\] has width 3, but x\[0\] has width 5"),
        ({"x": torch.zeros(10, 3, dtype=torch.long)}, TypeError, "x must have a floating-point dtype"),
        ({"x": torch.full((10, 3), float("nan"))}, ValueError, "no finite row"),
    ],
)
def test_bad_input_is_named(options, error, message):
    arguments = {"x": blobs(), "n_clusters": 8, **options}
    with pytest.raises(error, match=message):
        run(**arguments)

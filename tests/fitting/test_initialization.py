from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.fitting import initialization as start_module
from mfa_kernels.fitting import kmeans, start_from_clusters
from tests.fitting.planted import Store, draw, nll, planted


def start(x, clusters, rank: int = 2, noise: str = "shared", **options) -> MFA:
    return start_from_clusters(x, clusters, rank, noise, progress=False, **options)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Smallest cosine between the column spaces of a and b (K, D, R): 1 where they agree."""
    a, b = torch.linalg.qr(a).Q, torch.linalg.qr(b).Q
    return torch.linalg.svdvals(a.mT @ b)[..., -1]


@pytest.mark.parametrize("noise", ["shared", "per_component"])
def test_pca_start_is_near_the_truth(noise):
    true = planted(6, 30, 3)
    x, test = draw(true, 6000), draw(true, 2000, seed=2)
    mfa = start(x, true.means.detach(), 3, noise)
    best = nll(true, test)
    assert nll(mfa, test) < best + (0.5 if noise == "shared" else 1.0)
    assert nll(start(x, true.means.detach(), 3, noise, init="random"), test) > best + 10
    assert overlap(mfa.loadings.detach(), true.loadings.detach()).min() > 0.98
    torch.testing.assert_close(mfa.log_weights.exp(), true.log_weights.exp(), atol=0.02, rtol=0)
    torch.testing.assert_close(mfa.means, true.means, atol=0.6, rtol=0)
    noise_ratio = mfa.noise_variance / true.noise_variance
    assert noise_ratio.log().abs().mean() < 0.2


def test_means_and_weights_are_those_of_the_clusters():
    x = draw(planted(), 500)
    result = kmeans(x, 6, progress=False, tol=0)
    mfa = start(x, result)
    torch.testing.assert_close(mfa.means.detach(), result.centroids, rtol=1e-4, atol=1e-4)
    expected = (result.counts + 1) / (500 + 6)
    torch.testing.assert_close(mfa.log_weights.exp(), expected.float())
    torch.testing.assert_close(mfa.center, x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(start(x, result.centroids).loadings, mfa.loadings)


def test_random_start_is_the_pooled_variance():
    x = draw(planted(), 500)
    result = kmeans(x, 6, progress=False, tol=0)
    residual = x - result.centroids[result.assignment]
    mfa = start(x, result, init="random")
    torch.testing.assert_close(mfa.noise_variance, residual.square().sum(0) / (500 - 6), rtol=1e-4, atol=1e-5)
    whitened = (mfa.loadings / mfa.noise_variance.sqrt().unsqueeze(-1)).norm(dim=1)
    assert whitened.min() > 0.3
    assert whitened.max() < 2.5
    own = start(x, result, init="random", noise="per_component").noise_variance
    assert own.shape == (6, 12)
    mine = residual[result.assignment == 2].var(0)
    assert (own[2] - mine).abs().mean() < 0.5 * (mfa.noise_variance - mine).abs().mean()


def test_pca_of_a_cluster_against_an_svd(monkeypatch):
    """With much data the shrinkage vanishes: eigenvalues less the noise, along the eigenvectors."""
    true = planted(1, 10, 2)
    x = draw(true, 20000)
    monkeypatch.setattr(start_module, "_ROWS_PER_CLUSTER", 20000)
    mfa = start(x, x.mean(0, keepdim=True), 2)
    scale = x.var(0).sqrt()
    values, vectors = torch.linalg.eigh(torch.corrcoef(x.t()))
    noise = values[:-2].mean()
    expected = vectors[:, -2:] * (values[-2:] - noise).sqrt() * scale.unsqueeze(1)
    found = mfa.loadings[0].detach()
    torch.testing.assert_close(found @ found.t(), expected @ expected.t(), rtol=0.02, atol=0.02)


def test_clusters_of_every_size():
    g = torch.Generator().manual_seed(0)
    sizes = [1, 2, 3, 4, 5, 6, 40, 300]
    centers = 50 * torch.randn(len(sizes) + 1, 8, generator=g)  # the last owns no row
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = centers[labels] + torch.randn(len(labels), 8, generator=g) * (1 + 2 * (labels == 6)).unsqueeze(1)
    mfa = start(x, centers, 4)
    assert all(p.isfinite().all() for p in mfa.parameters())
    torch.testing.assert_close(mfa.means[-1], centers[-1])
    assert (mfa.loadings.norm(dim=1) > 0).all(), "a column that is 0 would never learn"
    assert mfa.log_weights.isfinite().all()
    assert mfa.log_prob(x).isfinite().all()
    small = mfa.loadings[:2].norm(dim=1)
    assert (small < 0.5).all()
    own = start(x, centers, 4, "per_component").noise_variance
    assert own.isfinite().all()
    torch.testing.assert_close(own[0], own[-1], rtol=0.05, atol=0)  # a single row has no variance of its own
    change = (own / own[-1]).log().abs().mean(1)
    assert change[1:4].max() < 0.3
    assert change[6] > 0.6


def test_groups_and_samples_of_rows_do_not_matter(monkeypatch):
    true = planted()
    x, c = draw(true, 3000), true.means.detach()
    whole = start(x, c)
    monkeypatch.setattr(start_module, "_GROUP_ELEMENTS", 1)
    torch.testing.assert_close(start(x, c).loadings, whole.loadings, rtol=1e-3, atol=1e-3)
    # Sorted along a direction, the first rows of a cluster do not show it: those looked at must come from all over.
    direction = torch.linalg.qr(true.loadings.detach()).Q[torch.cdist(x, c).argmin(1), :, 0]
    x = x[((x - c[torch.cdist(x, c).argmin(1)]) * direction).sum(1).argsort()]
    monkeypatch.setattr(start_module, "_ROWS_PER_CLUSTER", 200)
    sampled = start(x, c)
    a, b = ((m.loadings @ m.loadings.mT).detach() for m in (sampled, whole))
    assert ((a - b).norm(dim=(1, 2)) / b.norm(dim=(1, 2))).max() < 0.2


def test_shrinkage_inverts_the_bias_of_a_sample():
    g = torch.Generator().manual_seed(0)
    n, d, true = 200, 400, 4.0
    aspect = torch.tensor(d / n).double()
    found, expected = [], []
    for _ in range(20):
        x = torch.randn(n, d, generator=g, dtype=torch.float64)
        noise = torch.linalg.matrix_norm(x[:, 1:], 2) ** 2 / n
        assert float(start_module._shrink(0.9 * noise, aspect)) == 0
        x[:, 0] *= (1 + true) ** 0.5
        values, vectors = torch.linalg.eigh(x @ x.t() / n)
        found.append(float(start_module._shrink(values[-1], aspect)))
        direction = x.t() @ vectors[:, -1]
        expected.append(true * float(direction[0] ** 2 / direction.square().sum()))
    assert sum(found) == pytest.approx(sum(expected), rel=0.15)


def test_constant_dimensions_keep_a_density():
    true = planted()
    x = draw(true, 1000)
    x[:, 3] = 7.0
    for noise in ("shared", "per_component"):
        mfa = start(x, kmeans(x, 6, progress=False), 2, noise)
        assert mfa.noise_floor > 0
        assert (mfa.noise_variance > 0).all()
        assert mfa.log_prob(x).isfinite().all()
        assert mfa.noise_variance[..., 3].max() < 1e-4 * mfa.noise_variance.mean()


def test_each_distinct_row_its_own_cluster():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).repeat(10, 1)
    mfa = start(x, x[:5])
    assert mfa.log_prob(x).isfinite().all()


@pytest.mark.parametrize(("distinct", "components", "features"), [(12, 8, 256), (80, 64, 96), (300, 256, 16)])
def test_few_distinct_rows_in_a_cluster(distinct, components, features):
    """One in most of them, two in some: what is left of the former is rounding, and of both next to no noise."""
    for seed in (0, 5, 6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(distinct, features, generator=generator).repeat(40, 1)
        clusters = kmeans(x, components, seed=seed, progress=False)
        mfa = start(x, clusters, rank=3)
        assert all(parameter.isfinite().all() for parameter in mfa.parameters())
        assert mfa.log_prob(x[:distinct]).isfinite().all()


def test_far_from_the_origin():
    true = planted()
    x, c = draw(true, 2000), true.means.detach()
    far = start(x + 1e4, c + 1e4)
    torch.testing.assert_close(far.loadings, start(x, c).loadings, rtol=0.02, atol=0.02)
    assert nll(far, x + 1e4) == pytest.approx(nll(start(x, c), x), abs=0.1)


def test_scale_of_the_data():
    true = planted()
    x, c = draw(true, 2000), true.means.detach()
    scale = torch.logspace(-2, 2, 12)
    one = start(x, x[:1])
    scaled = start(x * scale, x[:1] * scale)
    found = scaled.loadings[0] / scale.unsqueeze(1)
    torch.testing.assert_close(found @ found.t(), one.loadings[0] @ one.loadings[0].t(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(scaled.noise_variance / scale**2, one.noise_variance, rtol=1e-3, atol=1e-6)
    big = start(1000 * x, 1000 * c)
    torch.testing.assert_close(big.loadings / 1000, start(x, c).loadings, rtol=1e-3, atol=1e-4)


def test_rows_that_are_not_finite_are_left_out():
    true = planted()
    x, c = draw(true, 1000), true.means.detach()
    dirty = torch.cat([x, torch.full((3, 12), float("nan"))])
    for noise in ("shared", "per_component"):
        a, b = start(x, c, 2, noise), start(dirty, c, 2, noise)
        for p, q in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("rank", [0, 1, 12])
@pytest.mark.parametrize("noise", ["shared", "per_component"])
@pytest.mark.parametrize("init", ["pca", "random"])
def test_every_rank(rank, noise, init):
    x = draw(planted(), 300)
    mfa = start(x, x[:6], rank, noise, init=init)
    assert mfa.loadings.shape == (6, 12, rank)
    assert mfa.log_prob(x).isfinite().all()


def test_options_reach_the_mixture():
    x = draw(planted(), 300)
    mfa = start(Store(x), x[:6], dtype=torch.float64, precision="reference")
    assert mfa.means.dtype == torch.float64
    assert mfa.precision == "reference"
    assert mfa.noise == "shared"
    again = start(x, x[:6], dtype=torch.float64)
    assert all(torch.equal(p, q) for p, q in zip(mfa.parameters(), again.parameters()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 13}, ValueError, "rank must be at most n_features = 12, got 13"),
        ({"init": "svd"}, ValueError, "init must be one of 'pca', 'random', got 'svd'"),
        ({"noise": "isotropic"}, ValueError, "noise must be one of"),
        ({"clusters": torch.zeros(6, 11)}, ValueError, r"clusters must have centroids .* = \(6, 12\), got \(6, 11\)"),
        ({"clusters": torch.full((6, 12), float("nan"))}, ValueError, "clusters must be finite, got 72 entries"),
        ({"clusters": "k-means"}, TypeError, "clusters must be a KMeansResult or a tensor .* got str"),
        ({"x": torch.full((5, 12), float("nan"))}, ValueError, "no finite row among 5"),
        ({"x": torch.ones(5, 12)}, ValueError, "activations do not vary: all the 5 finite rows are equal"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    x = draw(planted(), 300)
    with pytest.raises(error, match=message):
        start(**{"x": x, "clusters": torch.ones(6, 12), **arguments})

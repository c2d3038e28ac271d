"""Neighbouring regions, compared with all pairs written out."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.interpret import neighbors
from tests.helpers.mixtures import mixture

METRICS = ["centroid", "mahalanobis", "subspace"]


def _mfa(components: int = 23, features: int = 7, rank: int = 3, per_component: bool = False, **options) -> MFA:
    m = mixture(components, features, rank, per_component=per_component, **options)
    return MFA.from_parameters(*m[:3], m.log_weights.exp())


def _all_pairs(mfa: MFA, metric: str) -> Tensor:
    """(K, K) in float64, by the definition."""
    means, w = mfa.means.detach().double(), mfa.loadings.detach().double()
    psi = mfa.noise_variance.detach().double().expand_as(means)
    offset = means.unsqueeze(0) - means.unsqueeze(1)  # mu_j - mu_k at [k, j]
    if metric == "centroid":
        return offset.norm(dim=-1)
    if metric == "mahalanobis":
        inverse = (w @ w.mT + torch.diag_embed(psi)).inverse()
        return torch.einsum("kjd,kde,kje->kj", offset, inverse, offset).sqrt()
    projector = w @ torch.linalg.pinv(w)
    return (projector.unsqueeze(0) - projector.unsqueeze(1)).flatten(2).norm(dim=-1) / 2**0.5


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("per_component", [False, True])
@pytest.mark.parametrize("block", [1, 1000, 1 << 24])
def test_neighbors_are_those_of_all_pairs(
    metric: str, per_component: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("mfa_kernels.interpret.neighbors"), "_BLOCK_NUMBERS", block)
    mfa = _mfa(per_component=per_component)
    indices, distances = neighbors(mfa, 5, metric, progress=False)
    assert indices.shape == distances.shape == (23, 5)
    assert indices.dtype == torch.int64
    assert distances.dtype == torch.float64
    pairs = _all_pairs(mfa, metric)
    expected = pairs.fill_diagonal_(torch.inf).sort(1)
    torch.testing.assert_close(distances, expected.values[:, :5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pairs.gather(1, indices), expected.values[:, :5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_neighbors_of_some_regions_are_theirs_among_all(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mfa = _mfa()
    every, module = neighbors(mfa, 5, metric, progress=False), import_module("mfa_kernels.interpret.neighbors")
    name = {"centroid": "Centroids", "mahalanobis": "_Mahalanobis", "subspace": "_Subspaces"}[metric]
    kind, asked = getattr(module, name), []
    squared = kind.squared
    monkeypatch.setattr(kind, "squared", lambda self, block: asked.extend(block.tolist()) or squared(self, block))
    some = neighbors(mfa, 5, metric, components=[20, 3, 3], progress=False)
    assert asked == [20, 3, 3]  # and no other row of the K x K distances
    for found, expected in zip(some, every):
        torch.testing.assert_close(found, expected[[20, 3, 3]], rtol=1e-6, atol=1e-6)
    assert neighbors(mfa, 5, metric, components=[], progress=False)[0].shape == (0, 5)
    with pytest.raises(IndexError, match=r"components must be in \[0, 23\), got 23"):
        neighbors(mfa, 5, metric, components=[23])


@pytest.mark.parametrize("metric", METRICS)
def test_a_large_offset_costs_no_digits(metric: str) -> None:
    mfa = _mfa(dtype=torch.float64)
    before = neighbors(mfa, 4, metric, progress=False)
    with torch.no_grad():
        mfa.means += 1e5
    after = neighbors(mfa, 4, metric, progress=False)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1], after[1], rtol=1e-6, atol=1e-7)


def test_subspaces_do_not_depend_on_their_basis() -> None:
    mfa = _mfa(dtype=torch.float64)
    before = neighbors(mfa, 22, "subspace", progress=False)
    mixing = torch.randn(23, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        mfa.loadings.copy_(mfa.loadings @ mixing)
    after = neighbors(mfa, 22, "subspace", progress=False)
    torch.testing.assert_close(before[1], after[1], rtol=1e-6, atol=1e-6)
    assert (before[1] > 0).all()
    assert (before[1] <= 3**0.5).all()


def test_loadings_of_lower_rank_span_less() -> None:
    mfa = _mfa(3, 5, 2)
    with torch.no_grad():
        mfa.loadings.zero_()
        mfa.loadings[0, 0, 0] = mfa.loadings[1, 0, 0] = 1  # the same line
        mfa.loadings[2, 1, 0] = mfa.loadings[2, 2, 1] = 1  # a plane orthogonal to it
    indices, distances = neighbors(mfa, 2, "subspace", progress=False)
    assert indices.tolist()[:2] == [[1, 2], [0, 2]]
    torch.testing.assert_close(distances[:2], torch.tensor([[0.0, 1.5**0.5]] * 2, dtype=torch.float64))


@pytest.mark.parametrize("metric", ["centroid", "mahalanobis"])
def test_twins_are_at_distance_zero(metric: str) -> None:
    mfa = _mfa(4)
    with torch.no_grad():
        mfa.means[2] = mfa.means[0]
    indices, distances = neighbors(mfa, 1, metric, progress=False)
    assert indices[0].item() == 2
    assert indices[2].item() == 0
    assert distances[[0, 2]].max() < 1e-5


def test_rank_zero_has_distances_too() -> None:
    mfa = _mfa(5, 4, 0)
    for metric in ("centroid", "mahalanobis"):
        expected = _all_pairs(mfa, metric).fill_diagonal_(torch.inf).amin(1, keepdim=True)
        torch.testing.assert_close(neighbors(mfa, 1, metric, progress=False)[1], expected)
    with pytest.raises(ValueError, match="rank 0"):
        neighbors(mfa, 1, "subspace")


def test_bad_input_is_named() -> None:
    mfa = _mfa(5)
    for n in (0, 5):
        with pytest.raises(ValueError, match=r"n must be in \[1, 5\)"):
            neighbors(mfa, n)
    with pytest.raises(ValueError, match="metric must be one of"):
        neighbors(mfa, 1, "cosine")

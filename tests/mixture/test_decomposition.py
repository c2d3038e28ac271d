"""What decomposes activations, however it does: mixtures, on one process or several, and K-means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA, Code, kmeans
from mfa_kernels.evaluation import evaluate, score_table
from mfa_kernels.evaluation.codes import write_codes
from mfa_kernels.interpret import assignments, neighbors, region_summaries, top_contexts
from mfa_kernels.interpret.contexts import Assignments, region_latents
from mfa_kernels.interpret.regions import interesting_regions
from mfa_kernels.mixture.decomposition import Decomposition, check_decomposition
from mfa_kernels.mixture.sharded import ShardedMFA
from tests.helpers.mixtures import mixture, tokens
from tests.interpret.planted import Words, planted

M = mixture(5, 8, 2, spread=3.0)
X = tokens(M, 60)
X[7] = torch.nan


def made(kind: str) -> Decomposition:
    if kind == "kmeans":
        return kmeans(X, 5, progress=False)
    mfa = MFA.from_parameters(*M[:3], M.log_weights.exp()).requires_grad_(False)
    return mfa if kind == "MFA" else ShardedMFA(mfa)


@pytest.mark.parametrize("kind", ["MFA", "ShardedMFA", "kmeans"])
def test_the_protocol(kind: str) -> None:
    found = made(kind)
    assert isinstance(found, Decomposition)
    assert check_decomposition(found) is found
    assert (found.n_components, found.n_features) == (5, 8)
    rank = 0 if kind == "kmeans" else 2
    assert all(found.directions(k).shape == (rank, 8) for k in range(5))
    with pytest.raises(IndexError, match="component"):
        found.directions(5)
    x = X.reshape(3, 20, 8)
    owners, code = found.assign(x), found.code(x, top_k=None)
    assert owners.shape == (3, 20)
    assert owners.dtype == torch.int64
    assert (owners == -1).flatten().nonzero().tolist() == [[7]]
    assert torch.equal(code.components[..., 0], owners)
    assert code.responsibilities.shape == code.components.shape
    assert code.latents.shape == (*code.components.shape, rank)
    assert code.dropped.shape == (3, 20)
    assert code.dropped.isnan().flatten().nonzero().tolist() == [[7]]
    decoded = found.decode(code)
    assert decoded.shape == (3, 20, 8)
    assert decoded.isnan().any(-1).flatten().nonzero().tolist() == [[7]]
    assert (decoded - x).flatten(0, 1)[owners.flatten() >= 0].square().mean() < x[x.isfinite()].var()


def test_directions_are_the_columns_of_the_loadings() -> None:
    mfa = made("MFA")
    assert torch.equal(mfa.directions(3), M.loadings[3].mT)
    assert torch.equal(made("ShardedMFA").directions(3), M.loadings[3].mT)
    assert all(torch.equal(a, b) for a, b in zip(vars(mfa.code(X[:5])).values(), vars(mfa.encode(X[:5])).values()))  # type: ignore[attr-defined]


def test_of_k_means_the_nearest_centroid() -> None:
    found = kmeans(X, 5, progress=False)
    assert torch.equal(found.assign(X), found.assignment)
    code = found.code(X[:7])
    assert torch.equal(code.responsibilities, torch.ones(7, 1))
    assert not code.dropped.any()
    assert torch.equal(found.decode(code), found.centroids[found.assignment[:7]])
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 8\)"):
        found.assign(X[:, :5])


def test_scores_of_k_means_are_those_that_it_has_beside_a_mixture(tmp_path: Path) -> None:
    clusters = kmeans(X, 5, progress=False)
    score, beside = evaluate(clusters, X, progress=False), evaluate(made("MFA"), X, clusters, progress=False)
    assert (score.rows, score.skipped, score.nll, score.tokens_per_second, score.active) == (59, 1, None, None, 1)
    assert score.mse == pytest.approx(beside.kmeans_mse)
    assert score.fvu == pytest.approx(beside.kmeans_fvu)
    assert score.live == beside.kmeans_live == 5
    assert "variance unexplained" in score_table(score, 5, "activations")
    done = write_codes(clusters, X, tmp_path / "codes", progress=False)
    assert done == (60, 59, 1)


def distances(x: Tensor, centroids: Tensor) -> Tensor:
    return (x.double().unsqueeze(1) - centroids.double()).norm(dim=-1)


def test_regions_of_k_means_in_their_text() -> None:
    _, store, _ = planted()
    clusters = kmeans(store.activations, 4, progress=False)
    words = Words()
    found = assignments(clusters, store, progress=False)
    finite = found.components >= 0
    assert found.skipped == int((~finite).sum()) == 2
    assert found.latents is None
    assert assignments(clusters, store, latents=True, progress=False).latents.shape == (len(store), 0)
    assert torch.equal(found.components.long(), clusters.assignment)
    expected = distances(store.activations[finite], clusters.centroids).amin(1)
    torch.testing.assert_close(found.distances[finite].double(), expected, rtol=1e-4, atol=1e-5)
    assert found.distances[~finite].isnan().all()
    shown = top_contexts(clusters, store, words, [0, 1], 3, "distance", assigned=found, progress=False)
    for k, contexts in shown.items():
        assert contexts[0].score == pytest.approx(float(found.distances[found.rows(k)].min()))
    summaries = region_summaries(clusters, store, words, [0], 2, 1, progress=False)
    assert summaries[0].rows == int(found.counts[0])
    assert interesting_regions(clusters, store, 2, min_rows=1, progress=False)


def test_what_k_means_lacks_is_said_by_name() -> None:
    _, store, _ = planted()
    clusters = kmeans(store.activations, 4, progress=False)
    with pytest.raises(TypeError, match=r"mfa must be a mixture .*, got KMeansResult, which has no rank, log_prob"):
        neighbors(clusters, 2, progress=False)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="axis"):
        top_contexts(clusters, store, Words(), 0, 3, "latent", axis=0, progress=False)
    with pytest.raises(TypeError, match="mfa must have a posterior, or assigned latents, got KMeansResult"):
        region_latents(clusters, store, 0, assignments(clusters, store, progress=False))
    with pytest.raises(TypeError, match="mfa must be a mixture .*, got Assignments, which has no n_features"):
        check_decomposition(Assignments(X, X, X, None, 4))


def test_what_a_sharded_mixture_holds_is_set_in_its_part() -> None:
    sharded = ShardedMFA(MFA(2, 3, 1))
    with pytest.raises(AttributeError, match="noise_floor is that of `local`: set it there"):
        sharded.noise_floor = 0.1
    sharded.local.noise_floor = 0.1
    assert sharded.noise_floor == 0.1


def test_a_code_without_values_has_a_dense_shape() -> None:
    made = MFA(2, 3, 1).encode(torch.zeros(5, 3), top_k=2)
    empty = Code(*(part.to("meta") for part in (made.components, made.responsibilities, made.latents, made.dropped)))
    assert empty.to_dense(2).shape == (5, 4)

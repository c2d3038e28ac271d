"""Rows and contexts of regions, compared with loops over everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.data import tiny_lm
from mfa_kernels.interpret.contexts import (
    assignments,
    axis_contexts,
    region_latents,
    show_text,
    show_token,
    top_contexts,
)
from mfa_kernels.interpret.regions import region_summaries
from mfa_kernels.mixture import screening
from tests.helpers.refusals import check_refused
from tests.interpret.planted import MemoryStore, Words, planted

WORDS = Words()


def _distances(mfa: MFA, x: Tensor) -> Tensor:
    """Mahalanobis distances to every component in float64, with the covariance written out: (N, K)."""
    covariance = mfa.loadings.double() @ mfa.loadings.double().mT
    covariance = covariance + torch.diag_embed(mfa.noise_variance.double().expand_as(mfa.means))
    offset = x.double().unsqueeze(1) - mfa.means.double()
    return torch.einsum("nkd,kde,nke->nk", offset, covariance.inverse(), offset).sqrt()


def _latents(mfa: MFA, x: Tensor, k: int) -> Tensor:
    """(W^T Psi^-1 W + I)^-1 W^T Psi^-1 (x - mu) in float64: (N, R)."""
    w, psi = mfa.loadings[k].double(), mfa.noise_variance.double().expand_as(mfa.means)[k]
    weighted = (w / psi.unsqueeze(-1)).mT
    inner = torch.eye(w.shape[1], dtype=torch.float64) + weighted @ w
    return torch.linalg.solve(inner, weighted @ (x.double() - mfa.means[k].double()).mT).mT.detach()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "·the"),
        ("the", "the"),
        ("\n", "⏎"),
        ("    ", "····"),
        ("\t", "⇥"),
        ("\x1b", "\\x1b"),
        ("\N{RIGHT-TO-LEFT OVERRIDE}x", "\\u202ex"),
        ("\ud800", "\\ud800"),
        ("<script>", "<script>"),
        ("", "<0>"),
    ],
)
def test_a_token_is_shown_with_its_spaces(text: str, shown: str) -> None:
    assert show_token(Words([text]), 0) == shown


def test_half_a_character_is_shown_as_its_piece() -> None:
    words = Words(["\N{REPLACEMENT CHARACTER}"])
    words.convert_ids_to_tokens = lambda index: "âĢ"  # type: ignore[method-assign]
    assert show_token(words, 0) == "âĢ"


@pytest.mark.parametrize("token_id", [10**9, 40])
def test_an_id_that_the_tokenizer_does_not_know_is_shown_as_one(token_id: int) -> None:
    assert show_token(tiny_lm.load()[1], 10**9) == "<id 1000000000>"
    words = Words(["the"])  # as SentencePiece says it
    with pytest.raises(IndexError):
        words.convert_ids_to_tokens(token_id)
    assert show_token(words, token_id) == f"<id {token_id}>"


@pytest.mark.parametrize("wrong", [-1, 2**40, 1.5, "a", None])
def test_what_is_no_id_is_named(wrong: object) -> None:
    with pytest.raises((TypeError, ValueError), match="token_id must be an integer"):
        show_token(WORDS, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokenizer must be one of transformers, got NoneType"):
        show_token(None, 0)


def test_the_space_that_sentencepiece_drops_comes_back() -> None:
    words = Words(["the", "cat"])
    words.convert_ids_to_tokens = lambda index: "▁" + words.vocabulary[index]  # type: ignore[method-assign]
    assert show_token(words, 0) == "·the"
    assert show_text(words, [1]) == " cat"


def test_text_keeps_its_spaces_and_shows_line_ends() -> None:
    assert show_text(WORDS, [0, 7, 2, 3, 11]) == " the cat⏎    ."
    assert show_text(WORDS, []) == ""


@pytest.mark.parametrize("per_component", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 400, 1000])
def test_assignments_are_those_of_the_dense_formula(per_component: bool, batch_size: int) -> None:
    mfa, store, region = planted(per_component=per_component)
    a = assignments(mfa, store, latents=True, batch_size=batch_size, progress=False)
    finite = store.activations.isfinite().all(-1)
    x = store.activations[finite]
    logits = (mfa.component_log_prob(x) + mfa.log_weights).detach().double()
    assert a.skipped == 2
    assert (a.components[~finite] == -1).all()
    assert a.distances[~finite].isnan().all()
    assert a.responsibilities[~finite].isnan().all()
    assert a.latents is not None
    assert a.latents[~finite].isnan().all()
    k = a.components[finite].long()
    assert torch.equal(k, logits.argmax(1))
    assert torch.equal(k, region[finite])
    torch.testing.assert_close(a.responsibilities[finite].double(), logits.softmax(1).amax(1), rtol=1e-4, atol=1e-5)
    expected = _distances(mfa, x).gather(1, k.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(a.distances[finite].double(), expected, rtol=1e-4, atol=1e-4)
    for c in range(mfa.n_components):
        rows = a.rows(c)
        assert torch.equal(rows, (a.components == c).nonzero().squeeze(1))
        torch.testing.assert_close(
            a.latents[rows].double(), _latents(mfa, store.activations[rows], c), rtol=1e-3, atol=1e-4
        )
    assert a.counts.tolist() == torch.bincount(k, minlength=4).tolist()


@pytest.mark.parametrize("spread", [6.0, 0.3])
def test_many_rows_are_screened_and_nothing_changes(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    means, loadings = spread * torch.randn(96, 64, generator=generator), torch.randn(96, 64, 3, generator=generator)
    mfa = MFA.from_parameters(means, loadings / 3, torch.full((64,), 0.5), torch.ones(96))
    x = mfa.sample(3000, generator)
    x[0, 0] = torch.nan
    store = MemoryStore(x, [[0] * 3000])
    dense = assignments(mfa, store, latents=True, progress=False)
    reading: list[MFA] = []
    screen = MFA.screen
    monkeypatch.setattr(MFA, "screen", lambda self, *a, **k: reading.append(self) or screen(self, *a, **k))
    monkeypatch.setattr(screening, "_MANY_ROWS", 3000)
    found = assignments(mfa, store, latents=True, progress=False)
    if mfa.woodbury().is_cpp:
        assert mfa.screened() == (False, None)  # the mixture is as it was
        assert mfa.evaluated is None
        (own,) = reading
        if spread > 1:  # else too little is ruled out, and the dense scan goes on
            assert own.evaluated is not None
            assert own.evaluated.float().mean() < 3
    for name in ("components", "responsibilities", "distances", "latents"):
        torch.testing.assert_close(getattr(found, name), getattr(dense, name), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(found.components, dense.components)


def test_a_screen_that_is_there_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    mfa, store, _ = planted(features=32)
    monkeypatch.setattr(screening, "_MANY_ROWS", 1)
    before = mfa.screen(store.activations[10:50]), mfa.screened()[1]
    assignments(mfa, store, progress=False)
    assert (before[0], mfa.screened()[1]) == before


def test_an_outlying_scale_keeps_the_digits_of_distances(mfa: MFA, store: MemoryStore, region: Tensor) -> None:
    with torch.no_grad():
        shift = torch.zeros(8)
        shift[2] = 1e4
        mfa.means += shift
        store.activations += shift
        mfa.center.copy_(mfa.means.mean(0))
    rows = torch.arange(10, 60)
    found = assignments(mfa, store, progress=False).distances[rows]
    expected = _distances(mfa, store.activations[rows]).gather(1, region[rows].unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_latents_of_a_region_read_its_rows_alone(mfa: MFA, store: MemoryStore) -> None:
    a = assignments(mfa, store, progress=False)
    kept = assignments(mfa, store, latents=True, progress=False)
    store.asked.clear()
    z = region_latents(mfa, store, 2, a)
    assert sum(store.asked) == len(a.rows(2)) > 0
    torch.testing.assert_close(z, region_latents(mfa, store, 2, kept))
    assert sum(store.asked) == len(a.rows(2))


@pytest.mark.parametrize("by", ["responsibility", "distance", "latent"])
@pytest.mark.parametrize("sign", [1, -1])
def test_top_contexts_are_the_best_of_all(mfa: MFA, store: MemoryStore, region: Tensor, by: str, sign: int) -> None:
    found = top_contexts(mfa, store, WORDS, 3, 9, by, axis=1, sign=sign, before=400, after=400, progress=False)
    rows = (region == 3).nonzero().squeeze(1)
    rows = rows[store.activations[rows].isfinite().all(-1)]
    x = store.activations[rows]
    scores = {"responsibility": _distances(mfa, x)[:, 3], "distance": _distances(mfa, x)[:, 3]}
    scores["latent"] = -sign * _latents(mfa, x, 3)[:, 1]
    assert [c.row for c in found] == rows[scores[by].argsort()][:9].tolist()
    expected = {
        "responsibility": torch.ones(9),  # regions far apart: a tie, which nearness decides
        "distance": scores["distance"].sort().values[:9],
        "latent": -sign * scores["latent"].sort().values[:9],
    }[by]
    torch.testing.assert_close(torch.tensor([c.score for c in found]), expected.float(), rtol=1e-3, atol=1e-4)
    for context in found:
        document = store.documents[store.document(context.row)]
        place = store.places[context.row][1]
        assert context.component == 3
        assert context.token_id == document[place]
        assert context.token == show_token(WORDS, document[place])
        assert context.before == show_text(WORDS, document[:place])
        assert context.after == show_text(WORDS, document[place + 1 :])


def test_responsibility_comes_before_nearness() -> None:
    mfa = MFA.from_parameters(torch.tensor([[0.0], [4.0]]), torch.zeros(2, 1, 0), torch.ones(1), torch.ones(2))
    store = MemoryStore(torch.tensor([[1.9], [1.0], [-2.0], [0.1]]), [[0, 7, 8, 9]])
    found = top_contexts(mfa, store, WORDS, 0, by="responsibility", progress=False)
    assert [c.row for c in found] == [2, 3, 1, 0]
    nearest = top_contexts(mfa, store, WORDS, 0, by="distance", progress=False)
    assert [c.row for c in nearest] == [3, 1, 0, 2]


@pytest.mark.parametrize("batch_size", [3, 64, 1000])
def test_results_do_not_depend_on_the_batch_size(mfa: MFA, store: MemoryStore, batch_size: int) -> None:
    whole = assignments(mfa, store, batch_size=len(store), progress=False)
    parts = assignments(mfa, store, batch_size=batch_size, progress=False)
    for by in ("responsibility", "distance"):
        results = [top_contexts(mfa, store, WORDS, range(4), 5, by, assigned=a, progress=False) for a in (whole, parts)]
        assert [c.row for k in range(4) for c in results[0][k]] == [c.row for k in range(4) for c in results[1][k]]
    assert region_summaries(mfa, store, WORDS, assigned=whole, n_contexts=0, progress=False) == region_summaries(
        mfa, store, WORDS, assigned=parts, n_contexts=0, progress=False
    )


def test_many_regions_at_once_are_each_region_alone(mfa: MFA, store: MemoryStore) -> None:
    together = top_contexts(mfa, store, WORDS, [2, 0], 4, progress=False)
    assert list(together) == [2, 0]
    for k in (0, 2):
        assert together[k] == top_contexts(mfa, store, WORDS, k, 4, progress=False)


def test_texts_that_repeat_are_shown_once(mfa: MFA, store: MemoryStore) -> None:
    x = store.activations[4:24].repeat(30, 1)
    repeating = MemoryStore(x, [store.tokens[4:24].tolist()] * 30)
    found = top_contexts(mfa, repeating, WORDS, 3, 5, by="distance", progress=False)
    assert len(found) == len({str(c) for c in found}) == 5
    assert len({c.row % 20 for c in found}) == 5


def test_a_region_without_rows_has_no_contexts(mfa: MFA, store: MemoryStore) -> None:
    with torch.no_grad():
        mfa.means[1] = 1e4
    assert top_contexts(mfa, store, WORDS, 1, progress=False) == []
    assert axis_contexts(mfa, store, WORDS, 1, 0, progress=False) == []
    summary = region_summaries(mfa, store, WORDS, [1], progress=False)[0]
    assert (summary.rows, summary.tokens, summary.contexts) == (0, [], [])


def test_an_axis_goes_from_one_extreme_to_the_other(mfa: MFA, store: MemoryStore, region: Tensor) -> None:
    rows = (region == 2).nonzero().squeeze(1)
    rows = rows[store.activations[rows].isfinite().all(-1)]
    z, order = _latents(mfa, store.activations[rows], 2)[:, 0].sort()
    rows = rows[order]
    groups = axis_contexts(mfa, store, WORDS, 2, 0, 3, (0.0, 0.5, 1.0), before=50, after=50, progress=False)
    assert [g.quantile for g in groups] == [0.0, 0.5, 1.0]
    middle = round(0.5 * (len(rows) - 1))
    expected = [rows[:3], rows[middle - 1 : middle + 2], rows[-3:]]
    for group, near in zip(groups, expected):
        assert [c.row for c in group.contexts] == near.tolist()
    assert [g.value for g in groups] == pytest.approx([float(z[0]), float(z[middle]), float(z[-1])], abs=1e-3)


def test_bad_input_is_named(mfa: MFA, store: MemoryStore) -> None:
    narrow = MemoryStore(torch.zeros(2, 5), [[0, 1]])
    check_refused(ValueError, "5 features, but the mixture has 8", assignments, mfa, narrow)
    check_refused(ValueError, "no rows", assignments, mfa, MemoryStore(torch.zeros(0, 8), []))
    check_refused(ValueError, "by must be one of", top_contexts, mfa, store, WORDS, 0, by="likelihood")
    check_refused(ValueError, "axis", top_contexts, mfa, store, WORDS, 0, by="latent")
    check_refused(IndexError, r"axis must be in \[0, 2\), got 2", axis_contexts, mfa, store, WORDS, 0, 2)
    check_refused(IndexError, r"component must be in \[0, 4\), got 4", top_contexts, mfa, store, WORDS, [0, 4])
    check_refused(ValueError, "n must be an integer >= 1", top_contexts, mfa, store, WORDS, 0, 0)
    check_refused(ValueError, "sign", top_contexts, mfa, store, WORDS, 0, by="latent", axis=0, sign=2)
    check_refused(ValueError, "quantiles", axis_contexts, mfa, store, WORDS, 0, 0, quantiles=(0, 1.5))
    other = assignments(planted(40)[0], planted(40)[1], progress=False)
    check_refused(ValueError, "assigned holds 40 rows", top_contexts, mfa, store, WORDS, 0, assigned=other)

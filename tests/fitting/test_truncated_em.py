from __future__ import annotations

import copy
import warnings

import pytest
import torch

from mfa_kernels import fit
from mfa_kernels.fitting import candidates
from mfa_kernels.fitting.candidates import KEPT, CandidateSets, Graph
from mfa_kernels.fitting.m_step import Prior, maximize
from mfa_kernels.mixture.screening import Screening
from mfa_kernels.ops.statistics.op import SufficientStatistics, expectation
from tests.fitting.parts import collect
from tests.fitting.planted import draw, nll, planted

TRUE = planted(40, 12, 2, spread=2.0)
ROWS = draw(TRUE, 4000)
TEST = draw(TRUE, 2000, seed=2)


def mfa_of(dtype):
    return copy.deepcopy(TRUE).to(dtype)


def screening(mfa):
    return Screening(mfa, ROWS[:64].to(mfa.means.dtype))


def test_reaches_what_scans_of_all_components_reach():
    options = {"n_components": 40, "rank": 2, "epochs": 8, "progress": False}
    found, whole = (fit(ROWS, method=method, **options) for method in ("truncated", "em"))
    assert nll(found, TEST) < nll(whole, TEST) + 0.1
    assert found.fit_report.method == "truncated"
    assert abs(found.fit_report.candidate_gap) < 0.05
    assert whole.fit_report.candidate_gap is None
    held_out = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))[:200]
    assert found.fit_report.held_out_nll == pytest.approx(nll(found, ROWS[held_out]), rel=1e-6)


def test_the_bound_never_falls():
    """With the prior, from a start that knows nothing, and with fewer candidates than rows would like to have."""
    x = ROWS[:600].double()
    mfa = planted(40, 12, 2, spread=1.0, seed=5).double()
    prior = Prior(torch.cov(x.mT).double() / 10, 4.0)
    graph = Graph(mfa)
    sets = CandidateSets(len(x), graph)
    sets.kept[:, 0] = torch.arange(len(x)) % 40
    posterior = []
    for _ in range(30):
        s = SufficientStatistics.zeros(mfa.means, 2, False)
        with torch.no_grad():
            active = sets.scan(x, torch.arange(len(x)), screening(mfa))
            expectation(x, mfa.parameters_in_compute_dtype(), mfa.woodbury(), s, None, active)
        assert (active.log_prob <= mfa.log_prob(x) + 1e-9).all(), "a lower bound"
        posterior.append(float(s.log_likelihood + prior.log_density(mfa)))
        maximize(mfa, s, prior)
        graph.refresh(sets)
    gains = torch.tensor(posterior).double().diff()
    assert gains.min() > -1e-9 * abs(posterior[-1])
    assert posterior[-1] > float(collect(planted(40, 12, 2, spread=1.0, seed=5).double(), x).log_likelihood)


def test_a_row_has_what_all_components_would_give_it():
    graph = Graph(TRUE)
    sets, whole = CandidateSets(len(ROWS), graph), TRUE.active_pairs(ROWS)
    numbers = torch.randperm(len(ROWS))
    first = sets.scan(ROWS[numbers], numbers, screening(TRUE))  # of rows without candidates: a scan of all
    assert torch.equal(first.components[numbers.argsort()], whole.components)
    assert torch.equal(first.counts[numbers.argsort()], whole.counts)
    again = sets.scan(ROWS, torch.arange(len(ROWS)), screening(TRUE))
    few = whole.counts <= KEPT
    assert few.float().mean() > 0.9
    assert torch.equal(again.components[few], whole.components[few])
    exact = mfa_of(torch.float64).log_prob(ROWS.double()).detach()
    scale = TRUE.noise_variance.detach().rsqrt()
    square = ((ROWS - TRUE.means.detach()[whole.components[:, 0].long()]) * scale).square().sum(1)
    # |v|^2 is rounded, and what the loadings explain of it, most of it here, is taken away again.
    rounding = 16 * torch.finfo(torch.float32).eps * square[few]
    for found in (again, whole):
        assert ((found.log_prob.detach() - exact)[few].abs() <= rounding + 1e-5).all()
    assert (again.counts <= KEPT).all()
    half = CandidateSets(len(ROWS), graph)
    half.kept[::2, 0] = whole.components[::2, 0]
    mixed = half.scan(ROWS, torch.arange(len(ROWS)), screening(TRUE))
    assert torch.equal(mixed.components[1::2], whole.components[1::2])
    assert torch.equal(mixed.components[:, 0], whole.components[:, 0])


def test_what_rows_keep_beside_the_best_comes_to_the_front():
    graph = Graph(TRUE)
    sets = CandidateSets(30, graph)
    sets.own[:] = True
    sets.kept[:, 0] = 3
    sets.others[:20, 0], sets.others[20:, 0] = 17, 9
    before = graph.neighbors.clone()
    graph.refresh(sets)
    assert graph.neighbors[3, :2].tolist() == [17, 9]
    rest = [k for k in before[3].tolist() if k not in (17, 9)]
    assert graph.neighbors[3, 2:].tolist() == rest[: graph.neighbors.shape[1] - 2]
    others = [k for k in range(40) if k != 3]
    assert torch.equal(graph.neighbors[others], before[others])


def test_rows_try_every_neighbor_and_one_that_took_half_of_their_own_next():
    graph = Graph(TRUE)
    best, rows, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.long), set()
    graph.turn = 1
    for _ in range(-(-candidates.NEIGHBORS // candidates.TRIED)):
        seen |= set(graph.tried(best, rows)[0, :-1].tolist())
        graph.turn += 1
    assert seen == set(graph.neighbors[0].tolist())
    graph.link(33, 0)
    assert 33 in graph.tried(best, rows)[0].tolist()
    assert 0 in graph.neighbors[33].tolist()


def test_rows_that_regions_left_find_others_by_the_search_in_one_of_eight_passes():
    """Rows that have come to keep one wrong component, whose neighbors are not theirs."""

    class Found:
        def candidates(self, x):
            return TRUE.active_pairs(x).components

    graph = Graph(TRUE)
    graph.neighbors.fill_(-1)
    sets, right = CandidateSets(len(ROWS), graph, search=Found()), TRUE.assign(ROWS)
    sets.kept[:, 0] = (right + 7) % 40
    rows = torch.arange(len(ROWS))
    for turn in range(8):
        graph.turn = turn
        sets.scan(ROWS, rows, screening(mfa_of(torch.float32)))
        share = (sets.kept[:, 0] == right).float().mean()
        assert share == 1 if turn >= 4 else share < 0.3
    assert candidates._SEARCH_EVERY == 8


def test_candidates_that_miss_too_much_are_told_of(monkeypatch):
    """Rows that begin with a wrong component, and try none."""
    whole = CandidateSets._full

    def wrong(self, x, rows, screening):
        active = whole(self, x, rows, screening)
        self.kept[rows, 0] = (active.components[:, 0] + 7) % 40
        self.kept[rows, 1:] = -1
        return active

    monkeypatch.setattr(CandidateSets, "_full", wrong)
    monkeypatch.setattr(Graph, "tried", lambda self, best, rows: torch.full((len(rows), 1), -1, dtype=torch.int32))
    for held_out in (0.05, 0.0):
        with pytest.warns(UserWarning, match="candidates missed"):
            mfa = fit(ROWS, 40, 2, method="truncated", epochs=2, held_out=held_out, progress=False)
        assert mfa.fit_report.candidate_gap > 0.1
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(ROWS, 40, 2, method="truncated", epochs=2, progress=False).fit_report.candidate_gap < 0.1


def test_bounds_are_prepared_for_rows_without_candidates_alone(monkeypatch):
    prepared, whole = [], Screening.prepare
    monkeypatch.setattr(
        Screening, "prepare", lambda self, rows, total: (prepared.append(rows), whole(self, rows, total))
    )
    fit(ROWS, 40, 2, method="truncated", epochs=4, progress=False)
    assert prepared[0] >= len(ROWS), "those of the first pass, held out, and of the guard"
    assert not any(prepared[2:])


def test_a_state_that_is_only_tried_leaves_no_candidates():
    mfa = copy.deepcopy(TRUE)
    found = fit(ROWS, start=mfa, method="truncated", epochs=1, progress=False)
    whole = fit(ROWS, start=mfa, method="em", epochs=1, progress=False)
    assert found.fit_report.prior_strength == whole.fit_report.prior_strength
    assert nll(found, TEST) == pytest.approx(nll(whole, TEST), abs=1e-4)

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch

from mfa_kernels import MFA, fit
from mfa_kernels.fitting import candidate_search, preparation
from mfa_kernels.fitting.candidate_search import LISTED, CandidateSearch
from mfa_kernels.mixture.screening import Screening
from tests.fitting.planted import CutOff, draw, nll, planted

pytestmark = pytest.mark.usefixtures("needs_cpp")

K, D, R = 600, 200, 4


def flat(components: int = K, features: int = D, coordinates: int = 40) -> MFA:
    """Means that differ along some directions alone, and lie in groups, as those of activations nearly do."""
    mfa, generator = planted(components, features, R, spread=0.5), torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(features, coordinates, generator=generator)).Q
    places = 2 * torch.randn(-(-components // 15), features, generator=generator)
    with torch.no_grad():
        mfa.means.add_(places.repeat_interleave(15, 0)[:components])
        mfa.means.copy_(mfa.means @ basis @ basis.T)
        mfa.loadings.mul_(0.3)
    return mfa


TRUE = flat()
ROWS = draw(TRUE, 4000)


search = CandidateSearch


def test_finds_what_a_scan_of_all_finds():
    found, whole = search(TRUE).scan(ROWS), TRUE.active_pairs(ROWS)
    assert (found.components[:, 0] == whole.components[:, 0]).float().mean() > 0.999
    gap = (whole.log_prob - found.log_prob).detach()
    assert gap.mean() < 0.01
    assert gap.min() > -2e-6 * float(whole.log_prob.detach().abs().max()), "a lower bound"
    assert search(TRUE).missed(ROWS) == pytest.approx(float(gap.double().mean()), abs=1e-4)


def test_candidates_are_components_and_none_comes_twice():
    found = search(TRUE).candidates(ROWS[:300])
    assert found.shape == (300, LISTED)
    assert found.dtype == torch.int32
    assert 0 <= int(found.min()) <= int(found.max()) < K
    ordered = found.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()


def test_follows_the_parameters():
    mfa = flat()
    own = search(mfa)
    own.candidates(ROWS[:10])
    with torch.no_grad():
        mfa.means.copy_(mfa.means.roll(1, 0))
        mfa.loadings.copy_(mfa.loadings.roll(1, 0))
        mfa.weight_logits.copy_(mfa.weight_logits.roll(1, 0))
    assert torch.equal(own.scan(ROWS).components[:, 0], search(mfa).scan(ROWS).components[:, 0])
    agree = own.scan(ROWS).components[:, 0] == (search(TRUE).scan(ROWS).components[:, 0] + 1) % K
    assert agree.float().mean() > 0.999


def test_components_of_no_weight_are_no_candidates():
    mfa = flat()
    with torch.no_grad():
        mfa.weight_logits[::2] = -math.inf
    assert (search(mfa).candidates(ROWS) % 2 != 0).all()


def test_rows_that_have_no_candidates_are_scanned_in_full():
    x = ROWS[:5].clone()
    x[1], x[2] = math.nan, 1e25  # whose squares are not finite
    found, whole = search(TRUE).scan(x), TRUE.active_pairs(x)
    assert torch.equal(found.components, whole.components)
    torch.testing.assert_close(found.log_prob, whole.log_prob, equal_nan=True)


def pays(mfa: MFA, of_all: float = 1.0) -> bool:
    """Whether a search pays where the scan of all costs a share of the one in float32, as with products of int8."""
    with patch.object(candidate_search, "dense_cost", lambda woodbury, rows: of_all):
        return CandidateSearch.where_it_pays(mfa, 1000) is not None


def test_where_a_scan_of_all_is_taken():
    many = MFA(4000, D, R)
    assert pays(many)
    assert pays(many.double())
    assert pays(many, of_all=0.4)
    assert not pays(flat(), of_all=0.4), "the same candidates cost a larger share of fewer components"
    assert not pays(MFA(100, D, R))
    assert not pays(MFA(4000, 100, R)), "half of the features are too few coordinates"
    assert not pays(MFA(4000, D, R, precision="reference"))
    assert not pays(MFA(4000, D, R, noise="per_component"))


@pytest.fixture
def any_search_pays(monkeypatch):
    """On any processor, and for so few components too."""
    monkeypatch.setattr(candidate_search, "_PAYS", math.inf)


OPTIONS = {"n_components": K, "rank": R, "progress": False}


@pytest.mark.parametrize("method", ["truncated", "online"])
def test_a_fit_by_searches_is_as_good_as_one_by_scans(method, monkeypatch, any_search_pays):
    rows = draw(TRUE, 12_000)
    found = fit(rows, method=method, epochs=2, **OPTIONS)
    assert abs(found.fit_report.candidate_gap) < 0.05
    monkeypatch.setattr(CandidateSearch, "where_it_pays", lambda mfa, rows: None)
    whole = fit(rows, method=method, epochs=2, **OPTIONS)
    test = draw(TRUE, 2000, seed=5)
    assert nll(found, test) == pytest.approx(nll(whole, test), abs=0.05)
    assert found.fit_report.live_components == pytest.approx(whole.fit_report.live_components, rel=0.01)


def test_rows_are_scanned_in_full_where_a_search_misses_components(monkeypatch, any_search_pays):
    looked_at = []

    def missed(self, x):
        looked_at.append(len(x))
        return 0.6

    monkeypatch.setattr(CandidateSearch, "missed", missed)
    found = fit(draw(TRUE, 8000), method="online", epochs=1, **OPTIONS)
    assert found.fit_report.candidate_gap is None
    assert looked_at == [min(1024, found.fit_report.held_out_rows)]


@pytest.fixture
def small_start(monkeypatch, any_search_pays):
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 2000)
    monkeypatch.setattr(preparation, "START_ROWS_PER_COMPONENT", 1)


def test_a_stream_scans_no_row_in_full(small_start, monkeypatch):
    """But for those that say at the end what was missed."""
    scanned = []
    of_all = Screening.scan

    def scan(self, x, beyond=0.0):
        scanned.append(len(x))
        return of_all(self, x, beyond)

    monkeypatch.setattr(Screening, "scan", scan)
    found = fit(iter(draw(TRUE, 15_000).split(1000)), batch_size=4096, **OPTIONS)
    assert not scanned
    assert found.fit_report.method == "online"
    assert found.fit_report.candidate_gap is not None
    assert found.fit_report.held_out_nll == pytest.approx(found.fit_report.history[-1]["held_out_nll"], abs=0.2)


def test_a_stream_goes_on_as_if_it_had_not_been_cut_off(small_start, tmp_path):
    rows = draw(TRUE, 15_000)
    options = OPTIONS | {"batch_size": 4096, "eval_every": 1}
    whole = fit(iter(rows.split(1000)), **options)
    seen = []

    def cut(mfa, record):
        seen.append(record)
        if len(seen) == 3:
            raise CutOff

    place = tmp_path / "checkpoint"
    with pytest.raises(CutOff):
        fit(iter(rows.split(1000)), checkpoint=place, checkpoint_seconds=0, callbacks=[cut], **options)
    again = fit(iter(rows.split(1000)), checkpoint=place, resume=True, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize(("first", "later"), [(0.6, 0.0), (0.0, 0.6)], ids=["scans", "searches"])
def test_a_fit_that_goes_on_searches_as_it_did(first, later, small_start, tmp_path, monkeypatch):
    """Whatever it would decide by the parameters that it has come to, and in the groups that it had."""
    monkeypatch.setattr(candidate_search, "_LEAST", 1)  # group: what a row finds depends on which there are
    monkeypatch.setattr(candidate_search, "_SHARE", K)
    rows, place = draw(TRUE, 15_000), tmp_path / "checkpoint"
    options = OPTIONS | {"batch_size": 4096, "eval_every": 1}

    def cut(mfa, record):
        if record["step"] == 2:
            raise CutOff

    monkeypatch.setattr(CandidateSearch, "missed", lambda self, x: first)
    whole = fit(iter(rows.split(1000)), **options)
    with pytest.raises(CutOff):
        fit(iter(rows.split(1000)), checkpoint=place, checkpoint_seconds=0, callbacks=[cut], **options)
    monkeypatch.setattr(CandidateSearch, "missed", lambda self, x: later)
    again = fit(iter(rows.split(1000)), checkpoint=place, resume=True, **options)
    assert (again.fit_report.candidate_gap is None) == (first > 0.5)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name

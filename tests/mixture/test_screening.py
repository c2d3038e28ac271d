"""EM through certified bounds: the same mixture as by dense scans, the same scans after a checkpoint, less work."""

from __future__ import annotations

import math

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.fitting import em_base, fit
from mfa_kernels.mixture import screening
from mfa_kernels.mixture.screening import Screening
from mfa_kernels.ops.scan.types import SLOTS
from tests.fitting.planted import draw, planted
from tests.fitting.test_checkpoint import in_lives, result

pytestmark = [
    pytest.mark.usefixtures("needs_screens"),
    pytest.mark.usefixtures("no_int8"),  # beside which these bounds gain nothing
]

TRUE = planted(40, 48, 3, spread=4.0)
ROWS = draw(TRUE, 3000)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds that a small fit passes, and batches that cut its passes up."""
    monkeypatch.setattr(screening, "_APART", 2500)
    monkeypatch.setattr(screening, "_STAGE_0", 1)
    monkeypatch.setattr(em_base, "_LEAST_BATCH", 900)
    monkeypatch.setattr(em_base, "_BATCH_ELEMENTS", 1)


def run(x=ROWS, **options) -> MFA:
    chosen = {"method": "em", "epochs": 3, "progress": False, "checkpoint_seconds": 0, "patience": None, **options}
    return fit(x, 40, 3, **chosen)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows scanned through bounds and otherwise, stages 0, and choices."""
    counts = dict.fromkeys(("screened", "dense", "stages", "choices"), 0)
    scan, choose, stage = Screening.scan, Screening._choose, screening.op.screen

    def counting_scan(self, x):
        counts["screened" if self.ready() else "dense"] += len(x)
        return scan(self, x)

    def counting_choose(self):
        counts["choices"] += 1
        choose(self)

    def counting_stage(*args, **kwargs):
        counts["stages"] += 1
        return stage(*args, **kwargs)

    monkeypatch.setattr(Screening, "scan", counting_scan)
    monkeypatch.setattr(Screening, "_choose", counting_choose)
    monkeypatch.setattr(screening.op, "screen", counting_stage)
    return counts


@pytest.mark.parametrize("method", ["em", "online"])
def test_the_mixture_is_that_of_dense_scans(method, counted, monkeypatch):
    screened = run(method=method)
    assert counted["dense"] == 0
    assert counted["screened"] >= 3 * 2850
    assert counted["choices"] >= 1
    monkeypatch.setattr(screening, "_APART", math.inf)
    dense = run(method=method)
    assert counted["dense"] >= 3 * 2850
    for a, b in zip(screened.parameters(), dense.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert screened.fit_report.held_out_nll == pytest.approx(dense.fit_report.held_out_nll, abs=1e-4)


def test_noise_per_component_and_the_reference_take_the_dense_scan(counted):
    run(noise="per_component", epochs=1)
    run(precision="reference", epochs=1)
    assert counted["screened"] == counted["choices"] == 0


def test_too_few_rows_for_stage_0(counted, monkeypatch):
    monkeypatch.setattr(screening, "_STAGE_0", 1000)
    run(epochs=1)
    assert counted["screened"] == 0


@pytest.mark.parametrize("method", ["em", "online"])
def test_cut_off_it_goes_on_to_the_same_bits(method, monkeypatch, tmp_path):
    """In the middle of passes, between them, and where another choice is due in the one to come."""
    monkeypatch.setattr(screening, "_DRIFT", 0.0)
    expected = result(run(method=method))
    mfa, cuts = in_lives(lambda: run(method=method, checkpoint=tmp_path, resume=True), monkeypatch)
    assert cuts > 8
    assert result(mfa) == expected


class TestDecisions:
    @pytest.fixture
    def mixture(self) -> Screening:
        return Screening(TRUE, ROWS)

    def test_once_for_each_state_of_the_parameters(self, mixture, counted):
        for _ in range(2):
            mixture.prepare(3000, 9000)
        assert counted == {"screened": 0, "dense": 0, "stages": counted["stages"], "choices": 1}
        basis, stages = mixture.basis, counted["stages"]
        mixture.scan(ROWS)
        mixture.parameters_moved()
        assert not mixture.ready()
        mixture.prepare(3000, 6000)
        assert mixture.ready()
        assert mixture.basis is basis, "nothing drifted"
        assert counted["stages"] == stages + 1

    def test_a_drift_leads_to_another_choice_and_back_to_dense_scans(self, counted):
        mfa = planted(40, 48, 3, spread=4.0)
        mixture = Screening(mfa, ROWS)
        mixture.prepare(3000, 9000)
        assert mixture.used
        with torch.no_grad():
            mfa.means.mul_(1e-3)
            mfa.loadings.mul_(1e-3)
        mixture.parameters_moved()
        mixture.prepare(3000, 9000)
        assert mixture.used, "not known yet"
        assert counted["choices"] == 1
        mixture.scan(ROWS)
        mixture.parameters_moved()
        mixture.prepare(3000, 6000)
        assert counted["choices"] == 2
        assert not mixture.used
        assert mixture.basis is None

    def test_rows_to_come_decide(self, mixture, counted):
        mixture.prepare(3000, 100)
        assert not mixture.used
        assert counted["choices"] == 0

    def test_parameters_that_a_callback_moved(self):
        mfa = planted(40, 48, 3, spread=4.0).double()
        mixture = Screening(mfa, ROWS)
        mixture.prepare(3000, 9000)
        with torch.no_grad():
            mfa.means.add_(0.0)
        assert not mixture.ready()
        dense = mixture.scan(ROWS)
        mixture.prepare(3000, 9000)
        assert mixture.ready()
        screened = mixture.scan(ROWS)
        torch.testing.assert_close(screened.log_prob, dense.log_prob)
        assert screened.components.shape == (3000, SLOTS)

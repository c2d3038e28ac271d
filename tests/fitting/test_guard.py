from __future__ import annotations

import copy
import math

import pytest
import torch

from mfa_kernels import MFA, fit
from mfa_kernels.fitting import guard, preparation
from mfa_kernels.fitting.guard import Guard
from tests.fitting.planted import SIX, draw, nll, planted

TRUE = planted()


def run(x, **options) -> MFA:
    return fit(x, **{**SIX, **options})


def test_the_rows_that_stick_out_stand_for_themselves(monkeypatch) -> None:
    monkeypatch.setattr(guard, "_OUTLYING", 3)
    monkeypatch.setattr(guard, "OTHERS", 50)
    x = draw(TRUE, 1000)
    x[[17, 400, 999], [0, 5, 11]] = torch.tensor([200.0, -90.0, 1e15])
    sample = Guard(x, x.device)
    assert len(sample.rows) == 53
    assert sorted(row.abs().max().item() for row in sample.rows[:3]) == [90, 200, pytest.approx(1e15)]
    assert sample.weights[:3].tolist() == [1, 1, 1]
    assert float(sample.weights.sum()) == pytest.approx(1000)
    unseen = draw(TRUE, 60, seed=4)
    sample = Guard(x, x.device, unseen)
    assert torch.equal(sample.rows[3:], unseen[:50])
    assert sample.weights[3:].tolist() == [997 / 50] * 50


def test_all_rows_where_there_are_few() -> None:
    x = draw(TRUE, 2000)
    sample = Guard(x, x.device)
    assert sample.weights.tolist() == [1.0] * 2000
    assert sample.log_likelihood(TRUE) == pytest.approx(-nll(TRUE, x), rel=1e-6)


@pytest.mark.parametrize("held_out", [0.05, 0.0])
@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_a_state_that_is_worse_than_the_start_is_not_kept(method: str, held_out: float, monkeypatch) -> None:
    x = draw(TRUE, 3000)
    options = {"method": method, "epochs": 2, "held_out": held_out, "eval_every": 1, "patience": None}
    start = run(x, **{**options, "epochs": 0})
    found = iter([-1.0] + [-9.0] * 1000)
    monkeypatch.setattr(Guard, "log_likelihood", lambda self, mfa, scan=None: next(found))
    with pytest.warns(UserWarning, match="states were not kept: rows that they were trained on"):
        kept = run(x, **options)
    assert kept.fit_report.best_step == 0
    assert kept.fit_report.refused_states > 0
    assert all(torch.equal(p, q) for p, q in zip(kept.parameters(), start.parameters()))
    gains = [record["gain"] for record in kept.fit_report.history]
    assert gains[0] == 0
    assert max(gains[1:]) < -7


def test_gains_are_those_of_the_objective() -> None:
    """Adam has no prior to weigh the likelihood against."""
    x = draw(TRUE, 1500)
    start, mfa = (run(x, epochs=epochs, method="sgd", held_out=0.0) for epochs in (0, 3))
    assert mfa.fit_report.history[-1]["gain"] == pytest.approx(nll(start, x) - nll(mfa, x), abs=1e-4)
    assert math.isfinite(mfa.fit_report.history[-1]["gain"])


def test_a_few_unseen_rows_do_not_stand_for_all(monkeypatch) -> None:
    monkeypatch.setattr(guard, "OTHERS", 200)
    x, unseen = draw(TRUE, 1000), draw(TRUE, 3, seed=7)
    sample = Guard(x, x.device, unseen)
    assert torch.equal(sample.rows[:3], unseen)
    assert len(sample.rows) == 200
    assert sample.weights.unique().tolist() == [5.0]


def test_a_row_without_a_density_does_not_switch_it_off() -> None:
    x, mfa = draw(TRUE, 500), copy.deepcopy(TRUE)
    x[3] = 5e18
    with torch.no_grad():
        mfa.log_noise -= 12
    sample = Guard(x, x.device)
    assert not math.isfinite(sample.log_likelihood(mfa))
    sample.settle(mfa)
    assert sample.log_likelihood(mfa) == pytest.approx(-nll(mfa, x[torch.arange(500) != 3]), rel=1e-6)


@pytest.mark.parametrize("method", ["em", "online"])
def test_polish_is_compared_with_the_start_of_the_fit(method: str) -> None:
    """Steps that are much too long leave what EM had."""
    x = draw(TRUE, 1000)
    options = {"method": method, "epochs": 2, "held_out": 0.0, "batch_size": 64}
    before = run(x, **options)
    with pytest.warns(UserWarning, match="states were not kept"):
        after = run(x, polish=1, lr=3.0, **options)
    assert nll(after, x) == pytest.approx(nll(before, x), rel=1e-6)
    assert min(record["gain"] for record in after.fit_report.history) < 0


def test_copies_of_a_row_are_seen_by_the_start_of_a_stream(monkeypatch) -> None:
    """A token that begins every text, whatever its bits."""
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 2000)
    monkeypatch.setattr(preparation, "START_ROWS_PER_COMPONENT", 10)
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = torch.randn(6000, 6, generator=g) * 0.5
        x[: len(x) // 2, 0] += 4
        x[::50] = (torch.tensor([100.0, 0.5, 0.25, -0.5, 30.0, 1.0]) + torch.randn(6, generator=g)).bfloat16().float()
        x = x[torch.randperm(len(x), generator=g)]
        mfa = fit(iter(x.split(500)), 4, 2, progress=False)
        assert nll(mfa, x) < 6
    x = 8 * torch.eye(6)[torch.randint(6, (6000,), generator=g)] + torch.randn(1, generator=g)
    assert fit(iter((x + 1e-3 * torch.randn(6000, 6, generator=g)).split(500)), 4, 2, progress=False)

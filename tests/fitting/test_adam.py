from __future__ import annotations

import math

import pytest
import torch

from mfa_kernels.fitting import adam, as_source, run
from mfa_kernels.fitting.run import mean_nll, read_ahead, shuffled, standard_deviation
from tests.fitting.parts import settings, stage
from tests.fitting.planted import Store, draw, planted


def test_learning_rate():
    cosine = [adam.learning_rate(i, 1000, settings()) for i in range(1000)]
    assert cosine[0] == pytest.approx(1e-2 / 50)
    assert max(cosine) == pytest.approx(1e-2)
    assert cosine.index(max(cosine)) in (49, 50)
    assert cosine[525] == pytest.approx(0.5e-2, rel=1e-2)
    assert 0 < cosine[-1] < 1e-6
    constant = [adam.learning_rate(i, 1000, settings(schedule="constant")) for i in range(1000)]
    assert constant[:50] == cosine[:50]
    assert set(constant[50:]) == {1e-2}
    assert adam.learning_rate(0, 1, settings()) == 1e-2, "a single step is no warm-up"


def test_every_row_once_in_batches_of_equal_size():
    rows = torch.arange(100, 203)
    generator = torch.Generator().manual_seed(0)
    batches = list(shuffled(rows, 25, generator))
    assert [len(batch) for batch in batches] == [21, 21, 21, 20, 20]
    assert torch.equal(torch.cat(batches).sort().values, rows)
    assert all(torch.equal(batch, batch.sort().values) for batch in batches)
    again = list(shuffled(rows, 25, generator))
    assert not torch.equal(torch.cat(batches), torch.cat(again)), "each epoch has its own order"


@pytest.mark.parametrize("wrap", [lambda x: x, Store])
def test_reading_ahead_keeps_the_order(wrap):
    x = torch.arange(30.0).view(10, 3)
    indices = [torch.tensor(i) for i in ([3, 1], [0], [9, 9, 2])]
    read = list(read_ahead(as_source(wrap(x)), iter(indices)))
    assert all(torch.equal(a, x[i]) for a, i in zip(read, indices))
    assert list(read_ahead(as_source(wrap(x)), iter([]))) == []


def test_an_error_while_reading_ahead_arrives():
    with pytest.raises(IndexError):
        list(read_ahead(as_source(Store(torch.ones(4, 2))), iter([torch.tensor([0]), torch.tensor([9])])))


def test_standard_deviation():
    mfa = planted()
    x = draw(mfa, 50000)
    owner = mfa.assign(x)
    expected = (x - mfa.means.detach()[owner]).square().mean(0).sqrt()
    torch.testing.assert_close(standard_deviation(mfa), expected, rtol=0.03, atol=0)


def test_adam_does_not_depend_on_the_unit_of_a_dimension():
    scale = torch.logspace(-2, 3, 12)
    x = draw(planted(), 64)
    found = []
    for unit in (torch.ones(12), scale):
        mfa = planted()
        with torch.no_grad():
            mfa.means.mul_(unit)
            mfa.loadings.mul_(unit.unsqueeze(1))
            mfa.log_noise.add_(2 * unit.log())
            mfa.center.copy_(mfa.means.mean(0))
        optimizer = adam.StandardizedAdam(mfa, unit, 1e-2)
        before = [p.detach().clone() for p in mfa.parameters()]
        for _ in range(3):
            mfa.zero_grad()
            mfa(x * unit).backward()
            assert optimizer.step(1e-2)
        moved = [p.detach() - b for p, b in zip(mfa.parameters(), before)]
        found.append([moved[0] / unit, moved[1] / unit.unsqueeze(1), *moved[2:], torch.tensor(optimizer.typical)])
    torch.testing.assert_close(found[0].pop(), found[1].pop(), rtol=1e-3, atol=0)
    for a, b in zip(*found):
        assert 0.003 < b.abs().max() < 0.05
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)


def test_a_gradient_that_is_not_finite_moves_nothing():
    mfa = planted()
    optimizer = adam.StandardizedAdam(mfa, torch.ones(12), 1e-2)
    before = [p.detach().clone() for p in mfa.parameters()]
    for parameter in mfa.parameters():
        parameter.grad = torch.ones_like(parameter)
    mfa.loadings.grad[0, 0, 0] = float("nan")
    assert not optimizer.step(1e-2)
    assert all(torch.equal(p, b) for p, b in zip(mfa.parameters(), before))


def test_an_outlying_gradient_is_clipped():
    mfa = planted()
    optimizer = adam.StandardizedAdam(mfa, torch.ones(12), 1e-2)
    for size in (1.0, 1.0, 1e6):
        for parameter in mfa.parameters():
            parameter.grad = torch.full_like(parameter, size)
        optimizer.step(1e-2)
    moment = optimizer.adam.state[optimizer.parameters[0]]["exp_avg_sq"]
    assert moment.max() < 0.1, "its square would weigh 1e9"
    assert optimizer.typical < 1.2 * math.sqrt(sum(p.numel() for p in mfa.parameters()))


def test_mean_nll_does_not_depend_on_the_chunks(monkeypatch):
    mfa = planted()
    x = draw(mfa, 500)
    whole = mean_nll(mfa, x)
    monkeypatch.setattr(run, "EVALUATION_ROWS", 64)
    assert mean_nll(mfa, x) == pytest.approx(whole, rel=1e-6)


def test_training_gives_up_when_nothing_is_finite():
    mfa = planted()
    mfa.forward = lambda x: mfa.means.sum() * float("nan")
    before = mfa.means.detach().clone()
    training = stage(adam.Training, mfa, draw(planted(), 5000))
    with pytest.raises(RuntimeError, match="10 steps in a row had a loss or gradient that is not finite"):
        training.run()
    assert training.report.skipped_steps == 10
    assert torch.equal(mfa.means, before)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    mfa = planted()
    forward, calls = mfa.forward, []

    def sometimes(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return forward(x) * (float("inf") if len(calls) % 3 == 0 else 1.0)

    mfa.forward = sometimes
    training = stage(adam.Training, mfa, draw(planted(), 1200), trained=1000)
    training.run()
    report = training.report
    assert report.skipped_steps == 5
    assert report.history[-1]["step"] == len(calls) == 16
    assert math.isfinite(report.history[-1]["train_nll"])
    assert all(p.isfinite().all() for p in mfa.parameters())

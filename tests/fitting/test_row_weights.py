"""Rows that weigh: weight 2 is the row twice, weight 0 the row left out, in all that a fit does with rows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.data.store import ActivationStore, ActivationStoreWriter
from mfa_kernels.fitting import FitReport, adam, as_source, fit, stages, start_from_clusters
from mfa_kernels.fitting.guard import Guard
from mfa_kernels.fitting.m_step import DEFAULT_STRENGTH, Prior, maximize, pooled_covariance
from mfa_kernels.fitting.row_weights import Weighed, weighted
from mfa_kernels.fitting.run import Settings, mean_nll
from mfa_kernels.ops.statistics.op import SufficientStatistics, expectation
from tests.fitting.planted import Store, draw, nll, planted, raising, same

TRUE = planted(4, 8, spread=4.0).double()
ROWS = draw(TRUE, 1200)
COUNTS = torch.randint(1, 4, (len(ROWS),), generator=torch.Generator().manual_seed(0))
WEIGHTS = 0.2 + torch.rand(len(ROWS), generator=torch.Generator().manual_seed(1))
HALF = torch.arange(len(ROWS)) % 2 == 0
WAYS = [(method, noise) for method in ("em", "online", "sgd") for noise in ("shared", "per_component")]
CLOSE = {"rtol": 1e-7, "atol": 1e-8}


def near(seed: int = 0, noise: str = "shared") -> MFA:
    """The truth, moved."""
    g = torch.Generator().manual_seed(seed)
    means = TRUE.means.detach() + torch.randn(TRUE.means.shape, generator=g)
    psi = TRUE.noise_variance.detach()
    psi = psi if noise == "shared" else psi.expand_as(means) * (1 + torch.rand(means.shape, generator=g))
    return MFA.from_parameters(means, 0.5 * TRUE.loadings.detach(), psi, torch.full((4,), 0.25, dtype=torch.float64))


def run(x=ROWS, weights=None, **options) -> MFA:
    options = {"method": "em", "epochs": 3, "dtype": torch.float64, "progress": False, "patience": None, **options}
    if "start" not in options:
        options = {"n_components": 4, "rank": 2, **options}
    return fit(x, row_weights=weights, **options)


def repeated() -> Tensor:
    return ROWS.repeat_interleave(COUNTS, 0)


def agree(a: MFA, b: MFA, **close: float) -> None:
    for (name, one), other in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(one, other, **(close or CLOSE), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("noise", ["shared", "per_component"])
@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_integer_weights_are_repeated_rows(method, noise):
    """Step by step, where a step is of all rows: which rows share a batch is a matter of chance."""
    options = {"method": method, "start": near(noise=noise), "held_out": 0.0, "batch_size": 10_000, "epochs": 4}
    one, other = run(weights=COUNTS, **options), run(repeated(), **options)
    agree(one, other)
    for a, b in zip(one.fit_report.history, other.fit_report.history):
        assert a["gain"] == pytest.approx(b["gain"], abs=1e-9)
        assert a["train_nll"] == pytest.approx(b["train_nll"], abs=1e-9)
    assert one.fit_report.prior_strength == other.fit_report.prior_strength
    plain = run(**options)
    assert (one.means - plain.means).abs().max() > 1e-3


@pytest.mark.parametrize(("method", "noise"), WAYS)
def test_weights_of_0_are_rows_left_out(method, noise):
    """To the bit, from K-means to the held-out rows; of a store, which is read by row, too."""
    options = {"method": method, "noise": noise, "batch_size": 100}
    weights = WEIGHTS * HALF
    expected = run(ROWS[HALF], WEIGHTS[HALF], **options)
    dirty = ROWS.clone()
    dirty[~HALF] = math.nan
    for x in (ROWS, Store(ROWS), dirty):
        found = run(x, weights, **options)
        assert same(found, expected)
        assert found.fit_report.held_out_nll == expected.fit_report.held_out_nll
        assert found.fit_report.skipped_rows == 0


@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_weights_of_1_are_none(method):
    options = {"method": method, "batch_size": 100}
    agree(run(weights=torch.ones(len(ROWS)), **options), run(**options))


def test_the_scale_of_weights_changes_nothing_but_what_the_prior_is_worth():
    options = {"method": "sgd", "batch_size": 100, "start": near()}
    assert same(run(weights=WEIGHTS, **options), run(weights=4 * WEIGHTS, **options))
    few, many = (run(weights=w, start=near(), held_out=0.0) for w in (WEIGHTS, 64 * WEIGHTS))
    assert max(float((a - b).detach().abs().max()) for a, b in zip(few.parameters(), many.parameters())) > 1e-3
    assert (few.log_weights - many.log_weights).abs().max() < 0.05
    # 64 times the rows are worth 64 times the prior's tokens.
    s = SufficientStatistics.zeros(TRUE.means, 2, False)
    covariance = pooled_covariance(TRUE, ROWS)
    x, woodbury = ROWS, TRUE.woodbury()
    expectation(x, TRUE.parameters_in_compute_dtype(), woodbury, s, WEIGHTS.double())
    one, other = copy.deepcopy(TRUE), copy.deepcopy(TRUE)
    maximize(one, s, Prior(covariance, 10.0, 1.0))
    s.scale_(64)
    maximize(other, s, Prior(covariance, 640.0, 64.0))
    agree(one, other)


def dense_statistics(mfa: MFA, x: Tensor, w: Tensor) -> SufficientStatistics:
    """By definition, component by component."""
    means, loadings, psi, log_pi = (p.detach() for p in mfa.parameters_in_compute_dtype())
    s = SufficientStatistics.zeros(means, mfa.rank, psi.dim() == 2)
    covariance = loadings @ loadings.mT + (psi.diag() if psi.dim() == 1 else psi.diag_embed())
    joint = torch.distributions.MultivariateNormal(means, covariance).log_prob(x.unsqueeze(1)) + log_pi
    r = joint.softmax(1) * w.unsqueeze(1)
    for k in range(len(means)):
        own, y = r[:, k : k + 1], x - means[k]
        noise = psi if psi.dim() == 1 else psi[k]
        m = torch.linalg.inv(torch.eye(mfa.rank, dtype=x.dtype) + loadings[k].mT @ (loadings[k] / noise.unsqueeze(1)))
        z = (y / noise) @ loadings[k] @ m
        s.mass[k], s.shift[k], s.latent[k] = own.sum(), (own * y).sum(0), (own * z).sum(0)
        s.second[k], s.cross[k] = (own * z).mT @ z + own.sum() * m, (own * z).mT @ y
        squares = (own * y.square()).sum(0)
        s.squares.add_(squares) if psi.dim() == 1 else s.squares[k].add_(squares)
    s.log_likelihood.add_((joint.logsumexp(1) * w).sum())
    return s


@pytest.mark.parametrize("noise", ["shared", "per_component"])
def test_a_step_of_em_is_that_of_the_definition(noise):
    w, start = WEIGHTS.double(), near(noise=noise)
    expected = copy.deepcopy(start)
    expected.noise_floor = 1e-6 * float(start.noise_variance.detach().median())
    with torch.no_grad():
        expected.log_noise.copy_((start.noise_variance - expected.noise_floor).log())
    y = ROWS - expected.means[expected.assign(ROWS)]
    covariance = ((y * w.unsqueeze(1)).mT @ y / w.sum()).detach()
    s = dense_statistics(expected, ROWS, w)
    maximize(expected, s, Prior(covariance, DEFAULT_STRENGTH))
    found = run(weights=WEIGHTS, start=start, epochs=1, held_out=0.0)
    for name in ("means", "noise_variance", "log_weights"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.loadings.abs(), expected.loadings.abs(), rtol=1e-9, atol=1e-9)
    assert found.fit_report.history[1]["train_nll"] == pytest.approx(-float(s.log_likelihood / w.sum()), rel=1e-12)


def training(x: Tensor, weights: Tensor | None, batch_size: int) -> adam.Training:
    settings = Settings(1, batch_size, 1e-2, "constant", None, None, (), None, False)
    source = weighted(as_source(x), weights)
    arguments = near(), source, torch.arange(len(source)), x[:0], settings, torch.Generator().manual_seed(0)
    return adam.Training(*arguments, FitReport(), Guard(x, x.device))


def gradients(run: adam.Training, index: Tensor) -> list[Tensor]:
    """Of what a step on these rows minimises."""
    weights = run.source.weights
    kept: list[Tensor] = []
    run.adam.step = lambda lr: bool(kept.extend(p.grad.clone() for p in run.mfa.parameters())) or True
    run._step(Weighed(run.source.rows(index), None if weights is None else weights[index]), 0.0, False)
    return kept


def test_gradients_are_those_of_the_weighted_mean():
    every = torch.arange(len(ROWS))
    repeats = repeated()
    of_weights = gradients(training(ROWS, COUNTS, 5000), every)
    of_rows = gradients(training(repeats, None, 5000), torch.arange(len(repeats)))
    for one, other in zip(of_weights, of_rows):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    run, total = training(ROWS, COUNTS, 100), None
    for part in every.split(100):
        found = gradients(run, part)
        total = found if total is None else [a + b for a, b in zip(total, found)]
    for one, other in zip(total, of_weights):
        torch.testing.assert_close(one / 12, other, rtol=1e-9, atol=1e-12, msg="batches add up to the whole")


@pytest.mark.parametrize(("init", "noise"), [("pca", "shared"), ("pca", "per_component"), ("random", "shared")])
def test_a_start_from_clusters_takes_weights(init, noise):
    clusters = TRUE.means.detach()
    options = {"rank": 2, "noise": noise, "init": init, "progress": False}
    one = start_from_clusters(ROWS, clusters, weights=COUNTS, **options)
    agree(one, start_from_clusters(repeated(), clusters, **options))
    zero = start_from_clusters(ROWS, clusters, weights=COUNTS * HALF, **options)
    agree(zero, start_from_clusters(ROWS[HALF], clusters, weights=COUNTS[HALF], **options))
    few = (torch.arange(len(ROWS)) < 20).double()  # which show fewer directions than there are
    options["rank"] = 4
    start = start_from_clusters(ROWS, clusters, weights=few, **options)
    agree(start, start_from_clusters(ROWS[:20], clusters, **options))
    light = start_from_clusters(ROWS, clusters, weights=1e-3 * WEIGHTS, **options)
    between = nll(MFA.from_centroids(clusters, 2, noise_variance=ROWS.var(0)), ROWS)
    assert nll(light, ROWS) < between, "the variance of few rows is no guess, however light they are"


@pytest.mark.parametrize("noise", ["shared", "per_component"])
def test_light_rows_are_hardly_seen(noise):
    """A fifth of the rows is of another place, and weighs a thousandth."""
    strays = draw(planted(4, 8, seed=9, spread=4.0).double(), 300, seed=3)
    x = torch.cat([ROWS, strays])
    weights = torch.cat([torch.ones(len(ROWS)), torch.full((300,), 1e-3)])
    for method in ("em", "online", "sgd"):
        options = {"method": method, "noise": noise, "epochs": 10, "batch_size": 100}
        mfa, without = run(x, weights, **options), run(**options)
        assert nll(mfa, ROWS) < nll(without, ROWS) + 0.1, method
        assert mfa.fit_report.held_out_nll < nll(TRUE, ROWS) + 0.5, "by weight"


def test_held_out_rows_weigh():
    mfa = run(weights=WEIGHTS, held_out=0.25, start=TRUE, epochs=0)
    held = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))[:300]
    w = WEIGHTS[held].double()
    expected = -float((TRUE.log_prob(ROWS[held]) * w).sum() / w.sum())
    assert mfa.fit_report.held_out_nll == pytest.approx(expected, rel=1e-9)
    assert mean_nll(TRUE, ROWS[held], weights=w * 3) == pytest.approx(expected, rel=1e-9)


def test_evaluations_of_every_stage_are_by_weight():
    held = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))[:300]
    seen = []

    def look(mfa: MFA, record: dict) -> None:
        seen.append(mean_nll(mfa, ROWS[held], weights=WEIGHTS[held].double()))

    report = run(weights=WEIGHTS, held_out=0.25, start=near(), epochs=1, polish=1, callbacks=[look]).fit_report
    assert [record["held_out_nll"] for record in report.history] == pytest.approx(seen, rel=1e-9)
    assert {"em", "polish"} <= set(report.seconds)


def test_the_guard_weighs():
    x = ROWS.clone()
    x[5, 0] = 300.0  # sticks out
    guard = Guard(x, x.device, weights=WEIGHTS.double())
    assert float(guard.weights.sum()) == pytest.approx(float(WEIGHTS.double().sum()))
    assert float(guard.weights[0]) == pytest.approx(float(WEIGHTS[5]))
    expected = float((TRUE.log_prob(x) * WEIGHTS).sum() / WEIGHTS.double().sum())
    assert guard.log_likelihood(TRUE) == pytest.approx(expected, rel=1e-6)
    unseen = Guard(x[:600], x.device, x[600:], weights=WEIGHTS[:600].double(), other_weights=WEIGHTS[600:].double())
    assert float(unseen.weights.sum()) == pytest.approx(float(WEIGHTS[:600].double().sum()))


def test_kmeans_and_the_start_get_them(monkeypatch):
    """Each row its own."""
    seen = []

    def spy(made):
        def inside(x, *args, weights, **kwargs):
            seen.append(torch.cat([x.chunk(0, len(x)), weights.unsqueeze(1)], 1))
            return made(x, *args, weights=weights, **kwargs)

        return inside

    for name in ("kmeans", "start_from_clusters"):
        monkeypatch.setattr(stages, name, spy(getattr(stages, name)))
    run(weights=WEIGHTS, epochs=0, held_out=0.0)
    expected = torch.cat([ROWS, WEIGHTS.double().unsqueeze(1)], 1)
    for found in seen:
        assert torch.equal(found[found[:, 0].argsort()], expected[ROWS[:, 0].argsort()])
    assert len(seen) == 2


def test_whole_texts_are_held_out_of_rows_that_weigh(tmp_path):
    with ActivationStoreWriter(tmp_path, 8) as writer:
        for part in ROWS.float().split(20):
            writer.add_document(range(20), range(20), part)
    weights = torch.where(torch.arange(len(ROWS)) % 20 < 10, 1.0, 0.0)
    report = run(ActivationStore(tmp_path), weights, held_out=0.1, epochs=1).fit_report
    assert (report.held_out_by, report.held_out_rows) == ("text", 60)


def test_rows_that_are_not_finite_take_their_weights_along():
    x = ROWS.clone()
    x[::7] = math.nan
    clean = x.isfinite().all(1)
    for method in ("em", "online"):
        options = {"method": method, "start": near(), "held_out": 0.0, "batch_size": 5000, "epochs": 1}
        one, other = run(x, WEIGHTS, **options), run(x[clean], WEIGHTS[clean], **options)
        agree(one, other, rtol=0.0, atol=1e-9 if method == "em" else 0.05)


def test_a_checkpoint_knows_the_weights(tmp_path):
    whole = run(weights=WEIGHTS, checkpoint=tmp_path, held_out=0.1)
    assert same(run(weights=WEIGHTS, checkpoint=tmp_path, held_out=0.1, resume=True), whole)
    with pytest.raises(ValueError, match="other settings: here row_weights = '"):
        run(weights=2 * WEIGHTS, checkpoint=tmp_path, held_out=0.1, resume=True)
    with pytest.raises(ValueError, match="row_weights = None, there '"):
        run(checkpoint=tmp_path, held_out=0.1, resume=True)


@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_a_fit_that_was_cut_off_goes_on_to_the_same_bits(method, tmp_path):
    options = {"method": method, "batch_size": 100, "weights": WEIGHTS}
    with pytest.raises(KeyError):
        run(**options, checkpoint=tmp_path, checkpoint_seconds=0, callbacks=[raising(KeyError("killed"))])
    assert same(run(**options, checkpoint=tmp_path, resume=True), run(**options))


def test_kinds_of_weights():
    expected = run(weights=COUNTS.double(), epochs=1)
    for weights in (COUNTS, COUNTS.tolist(), COUNTS.numpy(), COUNTS.numpy()[::-1][::-1], COUNTS.float()):
        assert same(run(weights=weights, epochs=1), expected)
    assert same(run((part for part in ROWS.split(100)), COUNTS, epochs=1), expected), "an iterator that is held"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": WEIGHTS[1:]}, ValueError, r"row_weights must have shape \(N,\) = \(1200,\), got \(1199,\)"),
        ({"weights": -WEIGHTS}, ValueError, "row_weights must be finite and non-negative"),
        ({"weights": WEIGHTS / 0}, ValueError, "row_weights must be finite, got 1200 entries"),
        ({"weights": "heavy"}, TypeError, "row_weights must be a tensor or an array, got str"),
        ({"weights": 0 * WEIGHTS}, ValueError, r"row_weights must have a sum in \(0, .*\], as they count rows, got 0"),
        ({"weights": WEIGHTS.double() * 1e300}, ValueError, "row_weights must have a sum in"),
        ({"weights": WEIGHTS * 1j}, TypeError, "row_weights must be real, got torch.complex"),
        ({"weights": WEIGHTS.to("meta")}, ValueError, "row_weights must hold values"),
        ({"weights": WEIGHTS / WEIGHTS.sum()}, ValueError, "row_weights must be n_components = 4 in all at least"),
        ({"weights": WEIGHTS, "x": iter(ROWS.split(100)), "method": "online"}, ValueError,
         "row_weights must be None for an iterator that is fitted online"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)

from __future__ import annotations

import copy
import functools
import math
from itertools import product

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.fitting import dead_regions, em, em_base, fit, m_step, online_em, preparation
from mfa_kernels.fitting.guard import Guard
from mfa_kernels.ops.common import backends
from mfa_kernels.ops.m_step import op as m_step_op
from tests.fitting.parts import collect, stage
from tests.fitting.planted import Store, counted_batches, draw, nll, planted, same
from tests.fitting.test_fit import BEST, METHODS, ROWS, TEST, TRUE
from tests.fitting.test_fit import run as run_method

run = functools.partial(run_method, method="em")


def poor(components: int, rank: int, noise: str, x: Tensor) -> MFA:
    """A start that knows nothing but a few rows."""
    generator = torch.Generator().manual_seed(3)
    loadings = torch.randn(components, x.shape[1], rank, generator=generator, dtype=x.dtype)
    psi = x.var(0) if noise == "shared" else x.var(0).expand(components, -1)
    return MFA.from_parameters(x[:components], loadings, psi, torch.ones(components, dtype=x.dtype))


def covariance_of(x: Tensor) -> Tensor:
    return torch.cov(x.mT).double() / 10


@pytest.mark.parametrize("noise", ["shared", "per_component"])
@pytest.mark.parametrize(("rank", "strength"), [(0, 4.0), (2, 0.0), (2, 4.0), (12, 4.0)])
def test_the_log_posterior_never_falls(noise, rank, strength):
    x = ROWS[:600].double()
    mfa = poor(6, rank, noise, x)
    prior = m_step.Prior(covariance_of(x), strength)
    posterior = []
    for _ in range(60):
        s = collect(mfa, x)
        posterior.append(float(s.log_likelihood + prior.log_density(mfa)))
        m_step.maximize(mfa, s, prior)
    gains = torch.tensor(posterior).double().diff()
    assert gains.min() > -1e-11 * abs(posterior[-1])
    assert gains.sum() > 1000


@pytest.mark.parametrize("noise", ["shared", "per_component"])
def test_where_it_settles_the_gradient_is_zero(noise):
    """The log posterior written out anew: a wrong M-step, or a wrong density of the prior, would settle elsewhere."""
    x = draw(planted(3, 6, 2), 300).double()
    mfa = poor(3, 2, noise, x)
    prior = m_step.Prior(covariance_of(x), 5.0, 2.0)

    def steepness() -> dict[str, float]:
        covariance = mfa.loadings @ mfa.loadings.mT + torch.diag_embed(mfa.noise_variance.expand_as(mfa.means))
        trace = (torch.linalg.inv(covariance) * prior.covariance).sum((1, 2))
        log_prior = -2.5 * (covariance.logdet() + trace).sum() + 2 * mfa.log_weights.sum()
        assert log_prior.item() == pytest.approx(float(prior.log_density(mfa)))
        mfa.zero_grad()
        (mfa.log_prob(x).sum() + log_prior).backward()
        return {name: float(parameter.grad.abs().max()) for name, parameter in mfa.named_parameters()}

    m_step.maximize(mfa, collect(mfa, x), prior)
    before = steepness()
    for _ in range(1500):
        m_step.maximize(mfa, collect(mfa, x), prior)
    assert all(after < 1e-3 * before[name] for name, after in steepness().items())


@pytest.mark.parametrize("noise", ["shared", "per_component"])
def test_a_region_without_tokens_stays_and_hurts_nobody(noise):
    mfa = poor(6, 2, noise, ROWS.double())
    with torch.no_grad():
        mfa.means[2] = 1e3
    before = copy.deepcopy(mfa)
    s = collect(mfa, ROWS.double())
    assert s.mass[2] == 0
    change = m_step.maximize(mfa, s, m_step.Prior(covariance_of(ROWS)))
    assert (change[2] == 0).all()
    assert torch.equal(mfa.means[2], before.means[2])
    assert torch.equal(mfa.loadings[2], before.loadings[2])
    assert not torch.equal(mfa.loadings[1], before.loadings[1])
    assert all(p.isfinite().all() for p in mfa.parameters())
    assert mfa.log_weights[2].exp().item() == pytest.approx(1 / 6006)


def test_the_m_step_does_not_depend_on_its_chunks(monkeypatch):
    x = ROWS.double()
    mfa = poor(6, 2, "per_component", x)
    other = copy.deepcopy(mfa)
    s, prior = collect(mfa, x), m_step.Prior(covariance_of(x))
    density = prior.log_density(mfa)
    m_step.maximize(mfa, s, prior)
    monkeypatch.setattr(m_step_op, "_CHUNK_ELEMENTS", 2 * 12 * 3)  # three chunks of two components
    torch.testing.assert_close(prior.log_density(other), density)
    m_step.maximize(other, s, prior)
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(mfa.parameters(), other.parameters()))


def test_the_noise_floor_holds():
    x = ROWS.clone()
    x[:, 3] = 7.0
    for noise in ("shared", "per_component"):
        mfa = run(x, noise=noise)
        assert mfa.noise_floor > 0
        assert (mfa.noise_variance[..., 3] >= mfa.noise_floor).all()
        assert mfa.log_prob(x).isfinite().all()


def test_pooled_covariance(monkeypatch):
    monkeypatch.setattr(m_step, "_COVARIANCE_CHUNK", 700)
    owner = TRUE.assign(ROWS)
    y = (ROWS - TRUE.means.detach()[owner]).double()
    x = torch.cat([ROWS, torch.full((3, 12), 1e6)])
    torch.testing.assert_close(m_step.pooled_covariance(TRUE, x), y.mT @ y / 6000, rtol=1e-4, atol=1e-3)


def test_the_prior_is_chosen_by_the_rows_held_out():
    many, few = planted(4, 12, 2), planted(40, 12, 2)
    strength = {}
    for name, true, rows in (("many", many, 20000), ("few", few, 200)):
        x, mfa = draw(true, rows), copy.deepcopy(true)
        s = collect(mfa, x)
        before = [p.detach().clone() for p in mfa.parameters()]
        held_out = draw(true, 2000, seed=5)
        strength[name] = em_base.choose_prior(
            mfa, s, m_step.pooled_covariance(mfa, x), functools.partial(nll, mfa, held_out)
        ).strength
        assert all(torch.equal(p, b) for p, b in zip(mfa.parameters(), before))
    assert strength["many"] < strength["few"]
    assert em_base.choose_prior(many, collect(many, ROWS[:50]), torch.eye(12).double(), None).strength == 10


def test_overlap_finds_duplicates_alone():
    mfa = MFA.from_parameters(
        torch.cat([TRUE.means, TRUE.means[:1]]).detach(),
        torch.cat([TRUE.loadings, TRUE.loadings[:1]]).detach(),
        TRUE.noise_variance.detach(),
        torch.tensor([0.9, 1, 1, 1, 1, 1, 0.1]),
    )
    overlap, mass = dead_regions.Overlap(7), torch.zeros(7, dtype=torch.float64)
    for part in ROWS.split(1700):
        mass += collect(mfa, part, overlap).mass
    assert overlap.duplicates(mass) == [(0, 6)]


@pytest.mark.parametrize("rank", [0, 2])
def test_revived_regions_take_half_of_the_largest(rank):
    mfa = poor(4, rank, "per_component", ROWS)
    with torch.no_grad():
        mfa.loadings[1] *= torch.linspace(1, 3, rank)
    before = copy.deepcopy(mfa)
    mass = torch.tensor([500.0, 3000.0, 0.0, 600.0]).double()
    found = dead_regions.find(mfa, mass, dead_regions.Overlap(4), Guard(ROWS[mfa.assign(ROWS) != 2], ROWS.device))
    assert (found.moves, found.lost, found.touched) == ([(2, 1)], [], [1, 2])
    dead_regions.move(mfa, found, covariance_of(ROWS))
    assert found.mass.tolist() == [500, 1500, 1500, 600]
    halves = mfa.means[[1, 2]].mean(0)
    torch.testing.assert_close(halves, before.means[1])
    assert (mfa.means[1] - mfa.means[2]).norm() > 1
    assert torch.equal(mfa.means[[0, 3]], before.means[[0, 3]])
    if rank:  # the two together have the covariance of the one
        step = (mfa.means[1] - halves).unsqueeze(1)
        covariance = mfa.loadings[2] @ mfa.loadings[2].mT + step @ step.mT
        torch.testing.assert_close(covariance, before.loadings[1] @ before.loadings[1].mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mfa.weight_logits[[1, 2]].exp().sum(), before.weight_logits[1].exp())


@pytest.mark.parametrize(("method", "wrong"), [("em", "dead"), ("em", "duplicated"), ("online", "dead")])
def test_dead_and_duplicated_regions_come_back(method, wrong):
    centroids = TRUE.means.detach().clone()
    centroids[4:] = 1e3 + torch.arange(2.0).unsqueeze(1) if wrong == "dead" else centroids[0]
    report = (mfa := run(method=method, clusters=centroids, epochs=20)).fit_report
    assert report.revived_components >= 2
    assert report.live_components == 6
    assert nll(mfa, TEST) < BEST + 0.3


@pytest.mark.parametrize("noise", ["shared", "per_component"])
def test_online_statistics_agree_with_revived_regions(noise):
    """One dead region, one duplicate: the next M-step leaves what was moved where it is, and the noise as it was."""
    x = ROWS.double()
    noise_variance = TRUE.noise_variance if noise == "shared" else TRUE.noise_variance.expand(8, -1)
    means = torch.cat([TRUE.means, torch.full((1, 12), 1e3), TRUE.means[:1]])
    mfa = MFA.from_parameters(
        means.double(),
        TRUE.loadings[[*range(6), 0, 0]],
        noise_variance,
        torch.tensor([0.7] + [1.0] * 6 + [0.3]),
    )
    online = stage(online_em.OnlineEM, mfa, x, start_rows=x)
    online.start_rows = None
    none = m_step.Prior(torch.zeros(12, 12).double(), 0.0, 0.0)
    for _ in range(2):
        online._maximize(collect(mfa, x), none)
    before, s = copy.deepcopy(mfa), online.statistics
    collect(mfa, x, online.overlap)
    online.counted = s.mass.clone()
    online.revive(none, tokens=float(len(x)))
    assert online.report.revived_components == 2
    assert not torch.equal(mfa.means[6:], before.means[6:])
    moved = copy.deepcopy(mfa)
    m_step.maximize(mfa, s, none)
    changed = [k for k in range(8) if not torch.equal(before.means[k], moved.means[k]) or k == 0]
    assert {6, 7} < set(changed)
    for a, b in ((mfa.means, moved.means), (mfa.loadings, moved.loadings), (mfa.noise_variance, moved.noise_variance)):
        some = slice(None) if a.shape[0] == 12 else changed
        torch.testing.assert_close(a[some], b[some], rtol=1e-3, atol=1e-3)
    assert mfa.weight_logits.softmax(0)[[6, 7]].min() > 0.02


@pytest.mark.parametrize(
    ("method", "init", "noise"), [*product(["em", "online"], ["pca", "random"], ["shared", "per_component"])]
)
def test_reaches_the_likelihood_of_the_truth(method, init, noise):
    mfa = run(method=method, init=init, noise=noise, epochs=25 if init == "random" else 8)
    assert nll(mfa, TEST) < BEST + 0.15
    assert nll(mfa, TEST) > BEST - 0.05, "nothing is better than the truth"
    assert mfa.noise_variance.shape == ((12,) if noise == "shared" else (6, 12))


@pytest.mark.parametrize(("method", "noise"), [*product(["em", "online"], ["shared", "per_component"])])
def test_the_held_out_curve_does_not_rise(method, noise, monkeypatch):
    """12 tokens for a region of 40 features: without a prior, it rises by tens of nats."""
    x = draw(planted(50, 40, 4), 900)

    def curve() -> list[float]:
        mfa = run(x, 50, 4, method=method, noise=noise, held_out=0.33, epochs=15, patience=None)
        return [record["held_out_nll"] for record in mfa.fit_report.history]

    found = curve()
    assert max(b - min(found[: i + 1]) for i, b in enumerate(found)) < 0.5
    assert found[-1] < found[0] - 1
    monkeypatch.setattr(em_base, "STRENGTHS", (1e-3,))
    without = curve()
    assert without[-1] > min(without) + 5


@pytest.mark.parametrize(("method", "more"), [("sgd", {"batch_size": 256}), ("em", {}), ("online", {})])
def test_same_seed_same_bits_and_global_generator_untouched(method, more):
    state = torch.get_rng_state()
    a, b, c = (run(method=method, epochs=2, seed=seed, **more) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(a, b)
    assert not same(a, c)


@pytest.mark.parametrize("method", ["em", "online"])
def test_kinds_of_data_agree(method, monkeypatch):
    monkeypatch.setattr(em_base, "_LEAST_BATCH", 1000)
    monkeypatch.setattr(em_base, "_BATCH_ELEMENTS", 1000)
    expected = run(method=method, epochs=2)
    for data in (ROWS.numpy(), Store(ROWS), list(ROWS.split(700))):
        assert same(run(data, method=method, epochs=2), expected), type(data)


def test_passes_do_not_depend_on_the_batches(monkeypatch):
    whole = run(epochs=3)
    monkeypatch.setattr(em_base, "_LEAST_BATCH", 700)
    monkeypatch.setattr(em_base, "_BATCH_ELEMENTS", 700)
    parts = run(epochs=3)
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


def test_float64():
    mfa = run(ROWS.double(), dtype=torch.float64)
    assert mfa.means.dtype == torch.float64
    assert nll(mfa, TEST) < BEST + 0.1


def test_report():
    report = run(epochs=4, patience=None).fit_report
    assert report.method == "em"
    assert [record["step"] for record in report.history] == [0, 1, 2, 3, 4]
    assert [record["epoch"] for record in report.history] == [0, 1, 2, 3, 4]
    assert report.history[0]["train_nll"] is None
    train = [record["train_nll"] for record in report.history[1:]]
    assert train == sorted(train, reverse=True)
    assert set(report.seconds) == {"kmeans", "start", "em"}
    assert report.prior_strength in em_base.STRENGTHS
    assert report.revived_components == 0
    assert not report.interrupted
    assert report.held_out_nll == min(record["held_out_nll"] for record in report.history)


def test_longer_steps_need_fewer_passes(monkeypatch):
    """Factor analysis is where EM is slow."""
    x = draw(planted(1, 12, 2), 4000)
    options = {"init": "random", "epochs": 40, "patience": None}
    curves = []
    for times in (em._OVERRELAXED, 1.0):
        monkeypatch.setattr(em, "_OVERRELAXED", times)
        curves.append([record["held_out_nll"] for record in run(x, 1, 2, **options).fit_report.history])
    longer, plain = curves
    assert longer[-1] < plain[-1] + 1e-2
    reached = [next(i for i, nll in enumerate(curve) if nll < plain[-1] + 1e-2) for curve in curves]
    assert reached[0] < 0.7 * reached[1], reached


def test_a_step_that_went_too_far_is_taken_back(monkeypatch):
    """The log posterior falls from no step of EM's own to the next."""
    monkeypatch.setattr(em, "_OVERRELAXED", 6.0)
    posteriors = []
    step = em.BatchEM.m_step

    def watched(self, s, overlap, log_posterior, last):
        done = step(self, s, overlap, log_posterior, last)
        posteriors.append((log_posterior, self.log_posteriors[-1]))
        return done

    monkeypatch.setattr(em.BatchEM, "m_step", watched)
    mfa = run(planted(6, 12, 2, spread=1.0).sample(3000, torch.Generator().manual_seed(1)), epochs=20, patience=None)
    assert any(seen != kept for seen, kept in posteriors), "some were taken back"
    kept = [k for _, k in posteriors]
    assert kept == sorted(kept)
    assert mfa.fit_report.history[-1]["held_out_nll"] < mfa.fit_report.history[0]["held_out_nll"]


def test_ends_when_there_is_nothing_to_gain():
    report = run(epochs=200, patience=None).fit_report
    assert report.history[-1]["step"] < 150
    assert not report.stopped_early


def test_online_statistics_follow_means_that_a_callback_moves():
    seen: list[MFA] = []

    def shake(mfa: MFA, record: dict) -> None:
        seen.append(copy.deepcopy(mfa))
        with torch.no_grad():
            mfa.means.add_(0.5 if record["step"] % 2 else -0.5)

    run(method="online", epochs=1, eval_every=1, patience=None, callbacks=[shake], held_out=0)
    assert nll(seen[-1], TEST) < BEST + 0.3


@METHODS
def test_interrupted_it_returns_the_best_so_far(method):
    held = []

    def interrupt(mfa: MFA, record: dict) -> None:
        held.append(mfa.means.detach().clone())
        if len(held) == 3:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted; the mixture is the best so far"):
        mfa = run(method=method, callbacks=[interrupt])
    report = mfa.fit_report
    assert report.interrupted
    best = min(range(3), key=lambda i: report.history[i]["held_out_nll"])
    assert torch.equal(mfa.means, held[best])


def test_a_row_that_is_met_too_far_out_changes_nothing():
    """1e25 squared overflows float32: it has no density, and no part in the statistics."""
    centroids = TRUE.means.detach()
    dirty = ROWS.clone()
    dirty[-1] = 1e25
    mfa = MFA.from_parameters(centroids, TRUE.loadings, TRUE.noise_variance, TRUE.log_weights.exp())
    s, clean = collect(mfa, dirty), collect(mfa, ROWS[:-1])
    assert s.mass.sum() == pytest.approx(5999)
    assert m_step.pooled_covariance(mfa, dirty).isfinite().all()
    torch.testing.assert_close(s.cross, clean.cross, rtol=1e-6, atol=1e-6)


def test_nothing_with_a_finite_density_is_an_error():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) * 1e18
    mfa = MFA.from_parameters(torch.zeros(2, 3), torch.zeros(2, 3, 1), torch.full((3,), 1e-6), torch.ones(2))
    batch = stage(em.BatchEM, mfa, x, start_rows=x)
    with pytest.raises(RuntimeError, match="no row has a finite density"):
        batch.run()


def test_polish_goes_on_from_em():
    plain = run(epochs=2)
    mfa = run(epochs=2, polish=2, batch_size=256)
    report = mfa.fit_report
    assert [record["step"] for record in report.history] == [0, 1, 2, 25, 48]
    assert [record["epoch"] for record in report.history] == [0, 1, 2, 3, 4]
    assert set(report.seconds) == {"kmeans", "start", "em", "polish"}
    seconds = [record["seconds"] for record in report.history]
    assert seconds == sorted(seconds)
    assert report.held_out_nll <= plain.fit_report.held_out_nll
    assert mfa.fit_report.best_step in (1, 2, 25, 48)


def test_auto():
    assert fit(ROWS, 6, 2, epochs=1, progress=False).fit_report.method == "em", "what fit does when not told"
    assert run(method="auto", epochs=1).fit_report.method == "em"
    assert run(list(ROWS.split(700)), method="auto", epochs=1).fit_report.method == "em"
    assert run(method="auto", n_components=2, epochs=1, batch_size=56).fit_report.method == "online"
    assert run(method="auto", n_components=2, epochs=1, batch_size=58).fit_report.method == "em"
    assert run(method="auto", n_components=50, epochs=1, batch_size=1).fit_report.method == "em"
    assert run(iter(ROWS.split(700)), method="auto", epochs=1).fit_report.method == "em", "it is all in the head"


def test_auto_truncates_where_many_components_are_scanned_again():
    assert preparation.chosen_method(1e5, 128, 1024, passes=2) == "truncated"
    assert preparation.chosen_method(1e5, 128, 1024, passes=1) == "em"
    assert preparation.chosen_method(1e5, 1024, 1024, passes=0) == "truncated"
    assert preparation.chosen_method(1e5, 1024, 1024) == "em"
    assert preparation.chosen_method(1e5, 127, 1024, passes=9) == "em"
    assert preparation.chosen_method(1e6, 128, 1024, passes=9) == "online"
    with_kernels = backends.serving(ROWS, 2) == "cpp"
    options = {"n_components": 128, "rank": 1, "epochs": 2, "method": "auto"}
    assert run(**options).fit_report.method == ("truncated" if with_kernels else "em")
    assert run(**options, precision="reference").fit_report.method == "em"


class TestStreams:
    @pytest.fixture(autouse=True)
    def small_head(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mfa_kernels.fitting import preparation

        monkeypatch.setattr(preparation, "LEAST_START_ROWS", 1500)

    def test_every_row_is_read_once_and_let_go(self):
        alive: list[int] = []
        mfa = run(counted_batches(ROWS, 300, alive), method="online", seed=1)
        assert len(alive) == 20
        assert max(alive) < 10, "the head, and what is read"
        assert nll(mfa, TEST) < BEST + 0.15
        report = mfa.fit_report
        assert report.method == "online"
        assert report.held_out_rows == round(0.05 * 1800)
        assert report.history[-1]["step"] == 5, "4200 rows after the head, 1024 at a time"

    def test_bad_rows_and_ragged_batches(self):
        dirty = ROWS.clone()
        dirty[::50] = float("nan")
        mfa = run(iter(dirty.split([1, 2999, 7, 1500, 1493])), method="online", eval_every=1)
        assert mfa.fit_report.skipped_rows == 120
        assert nll(mfa, TEST) < BEST + 0.15

    def test_longer_than_its_head_it_is_fitted_online(self):
        assert run(iter(ROWS.split(700)), method="auto").fit_report.method == "online"

    @pytest.mark.parametrize("method", ["auto", "online"])
    def test_one_that_ends_within_its_head_is_data_like_any_other(self, method):
        mfa, expected = (run(x, method=method) for x in (iter(ROWS[:1000].split(130)), ROWS[:1000]))
        assert mfa.fit_report.method == expected.fit_report.method == {"auto": "em"}.get(method, method)
        assert mfa.fit_report.history[-1]["epoch"] > 1
        assert same(mfa, expected)

    def test_widths_must_agree(self):
        with pytest.raises(ValueError, match="batch 6 has width 11, but batch 0 has width 12"):
            run(iter([*ROWS.split(1000), ROWS[:10, :11]]), method="online")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polish": -1}, "polish must be an integer >= 0, got -1"),
        ({"polish": 1, "method": "sgd"}, "polish must be 0 with method sgd, got 1"),
        ({"polish": 1, "method": "online", "x": iter([])}, "polish must be 0 for an iterator, got 1"),
        ({"method": "online", "x": iter([])}, "activations is an iterable without batches"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_activations_of_a_language_model(activations_of_text):
    found = run(activations_of_text, 16, 5, epochs=5).fit_report
    sgd = fit(activations_of_text, 16, 5, method="sgd", epochs=5, progress=False).fit_report
    assert math.isfinite(found.held_out_nll)
    assert found.held_out_nll < sgd.held_out_nll
    assert found.live_components == 16

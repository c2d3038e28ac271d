"""A fit that begins with a mixture: it goes on from its parameters, and leaves it as it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA, fit_many
from mfa_kernels.fitting import fit, stages
from mfa_kernels.fitting.start_from_mixture import start_from_mixture
from tests.fitting.planted import draw, nll, planted, raising

TRUE = planted()
ROWS = draw(TRUE, 3000)
KEPT = {name: getattr(stages, name) for name in ("kmeans", "start_from_clusters")}
WAYS = [(method, noise) for method in ("em", "online", "sgd") for noise in ("shared", "per_component")]


@pytest.fixture(autouse=True)
def no_clusters(monkeypatch):
    """Whoever makes clusters does so by `first`."""
    for name in KEPT:
        monkeypatch.setattr(stages, name, lambda *_, **__: pytest.fail("clusters were looked at"))


def first(**options) -> MFA:
    """A fit of 2 epochs from clusters that are far from settled."""
    with pytest.MonkeyPatch.context() as patch:
        for name, made in KEPT.items():
            patch.setattr(stages, name, made)
        options = {"method": "em", "epochs": 2, "progress": False, "init": "random", **options}
        return fit(ROWS, 6, 2, **options)


def on(start: MFA | None, x: Tensor = ROWS, **options) -> MFA:
    return fit(x, start=start, **{"epochs": 3, "progress": False, **options})


def same(a: MFA, b: MFA) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize(("method", "noise"), WAYS)
def test_more_epochs(method, noise):
    one = first(method=method, noise=noise, batch_size=256)
    before = copy.deepcopy(one.state_dict())
    two = on(one, method=method, batch_size=256)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), one.state_dict().values())), "it stays as it is"
    assert (two.n_components, two.rank, two.noise) == (6, 2, noise)
    report, earlier = two.fit_report, one.fit_report
    assert report.history[0]["held_out_nll"] == pytest.approx(earlier.held_out_nll, abs=1e-4), "of the same rows"
    assert report.held_out_nll < earlier.held_out_nll - 1e-3
    assert report.history[0]["step"] == 0
    assert set(report.seconds) == {"start", method}


@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_the_truth_stays_where_it_is(method):
    mfa = on(TRUE, method=method, batch_size=256, lr=1e-3, held_out=0.2)
    held_out = mfa.fit_report
    assert held_out.held_out_nll <= held_out.history[0]["held_out_nll"]
    assert held_out.held_out_nll > held_out.history[0]["held_out_nll"] - 0.05, "there is little to be gained"
    torch.testing.assert_close(mfa.means, TRUE.means, atol=0.3, rtol=0)
    torch.testing.assert_close(mfa.noise_variance, TRUE.noise_variance, rtol=0.15, atol=0)
    torch.testing.assert_close(mfa.log_weights.exp(), TRUE.log_weights.exp(), atol=0.03, rtol=0)


def test_where_every_step_is_worse_the_start_is_kept():
    """Adam at a rate that leads away."""
    mfa = on(TRUE, method="sgd", lr=3.0, schedule="constant", held_out=0.2)
    assert mfa.fit_report.best_step == 0
    assert torch.equal(mfa.means, TRUE.means)
    torch.testing.assert_close(nll(mfa, ROWS), nll(TRUE, ROWS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("into", [torch.float32, torch.float64])
def test_any_dtype_goes_on_in_that_of_the_fit(dtype, into):
    start = planted(spread=3.0).to(dtype)
    mfa = on(start, epochs=0, dtype=into)
    assert mfa.means.dtype == into
    assert torch.equal(mfa.means, start.means.to(into))
    assert torch.equal(mfa.loadings.abs(), start.loadings.to(into).abs()), "but for signs, which are those of a fit"
    x = draw(planted(spread=3.0), 500).to(into)
    assert nll(mfa, x) == pytest.approx(nll(start.to(into), x), rel=1e-6)


def test_modes_of_the_start_do_not_matter():
    """Frozen, screened, made in inference mode, of another precision."""
    with torch.inference_mode():
        made = copy.deepcopy(TRUE)
    frozen = copy.deepcopy(TRUE).requires_grad_(False)
    screened = copy.deepcopy(TRUE)
    screened.screen(ROWS)
    fast = copy.deepcopy(TRUE)
    fast.precision = "fast"
    expected = on(TRUE, method="sgd", epochs=1)
    assert expected.means.requires_grad
    for start in (made, frozen, screened, fast):
        assert same(on(start, method="sgd", epochs=1), expected)
    assert not frozen.means.requires_grad
    assert fast.precision == "fast"


def test_a_noise_floor_goes_on_and_a_missing_one_is_made_up_for():
    one = first()
    two = on(one, epochs=0)
    assert two.noise_floor == one.noise_floor > 0
    assert same(two, one)
    assert TRUE.noise_floor == 0
    narrow = planted()
    with torch.no_grad():
        narrow.log_noise[3] = -30.0
    made = start_from_mixture(narrow, "exact", torch.float64, torch.device("cpu"))
    assert made.noise_floor == pytest.approx(math.exp(-30) / 2)
    torch.testing.assert_close(made.noise_variance, narrow.noise_variance.double(), rtol=1e-6, atol=0)
    x = ROWS.clone()
    x[:, 5] = 1.0  # a dimension that does not vary
    mfa = on(TRUE, x, method="em", epochs=30, patience=None)
    assert mfa.log_prob(x).isfinite().all()
    assert mfa.noise_variance[5] >= 2 * mfa.noise_floor > 0


def test_the_centre_is_the_mean_of_the_mixture():
    far = MFA.from_parameters(TRUE.means + 1e4, TRUE.loadings, TRUE.noise_variance, TRUE.log_weights.exp())
    mfa = on(far, ROWS + 1e4, epochs=0)
    torch.testing.assert_close(mfa.center, (ROWS + 1e4).mean(0), atol=1.0, rtol=0)


@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_regions_of_weight_0(method):
    weights = TRUE.log_weights.exp().detach().clone()
    weights[2] = 0
    start = MFA.from_parameters(TRUE.means, TRUE.loadings, TRUE.noise_variance, weights)
    assert start.log_weights[2] == -math.inf
    mfa = on(start, method=method, batch_size=256)
    report = mfa.fit_report
    assert all(math.isfinite(record["gain"]) for record in report.history)
    assert report.history[0]["held_out_nll"] < 60, "it explains its rows, were it by next to nothing"
    assert mfa.log_weights.isfinite().all()
    if method != "sgd":
        assert report.held_out_nll < first(epochs=10, method=method).fit_report.held_out_nll + 0.1, "it is back"


def test_checkpoints_know_the_start(tmp_path):
    whole = on(TRUE, method="em", checkpoint=tmp_path)
    assert same(on(TRUE, method="em", checkpoint=tmp_path, resume=True), whole)
    with pytest.raises(ValueError, match="other settings: here start = '"):
        on(first(), method="em", checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match="start = None, there '"):
        fit(ROWS, 6, 2, method="em", epochs=3, progress=False, checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_an_interrupted_fit_goes_on_to_the_same_bits(method, tmp_path):
    options = {"method": method, "batch_size": 256, "patience": None, "held_out": 0.1}
    start = first()
    whole = on(start, **options)
    with pytest.raises(KeyError):
        on(start, **options, checkpoint=tmp_path, checkpoint_seconds=0, callbacks=[raising(KeyError("killed"))])
    assert same(on(start, **options, checkpoint=tmp_path, resume=True), whole)


def test_streams_and_fit_many():
    start = first()

    def batches():
        return iter(ROWS.split(300))

    alone = on(start, batches())
    several = fit_many(batches(), {"a": {}, "b": {"start": TRUE}}, start=start, progress=False, epochs=3)
    assert same(several["a"], alone)
    assert same(several["b"], on(TRUE, batches()))
    assert alone.fit_report.held_out_nll <= start.fit_report.held_out_nll


def test_a_sharded_fit_goes_on_from_a_mixture():
    start = first()
    whole = on(start, method="em")
    found = fit(ROWS, 6, 2, split="components", method="em", start=start, epochs=3, progress=False)
    for name in ("means", "loadings", "log_noise", "weight_logits"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="rank must be that of start, 2, or left out, got 3"):
        fit(ROWS, 6, 3, split="components", start=start, progress=False)


def test_extra_is_kept():
    start = copy.deepcopy(TRUE)
    start.extra = {"layer": 3, "more": [1]}
    mfa = on(start, epochs=0)
    assert mfa.extra == start.extra
    assert mfa.extra["more"] is not start.extra["more"]


def bad(name: str, value: float) -> MFA:
    mfa = planted()
    with torch.no_grad():
        getattr(mfa, name)[1] = value
    return mfa


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": "mixture"}, TypeError, r"start must be a mixture \(mfa_kernels.MFA\), got str"),
        ({"start": TRUE, "n_components": 5}, ValueError, "n_components must be that of start, 6, or left out, got 5"),
        ({"start": TRUE, "n_components": "6"}, TypeError, "n_components must be an integer, got '6'"),
        ({"start": TRUE, "rank": 10}, ValueError, "rank must be that of start, 2, or left out, got 10"),
        (
            {"start": TRUE, "noise": "per_component"}, ValueError,
            "noise must be that of start, 'shared', or left out, got 'per_component'",
        ),
        ({"start": TRUE, "init": "random"}, ValueError, "init must be left out beside start"),
        ({"start": TRUE, "clusters": TRUE.means.detach()}, ValueError, "clusters must be left out beside start"),
        ({"start": planted(features=11)}, ValueError, "start must have the width of the activations, 12, got 11"),
        ({"start": MFA(6, 12, 2, device="meta")}, ValueError, "start must hold values, got means on the meta device"),
        ({"start": bad("means", math.nan)}, ValueError, "start.means must be finite, got 12 entries"),
        ({"start": bad("log_noise", math.inf)}, ValueError, "start.noise_variance must be finite"),
        ({"start": bad("log_noise", -math.inf)}, ValueError, "start.noise_variance must be positive"),
        ({"start": bad("weight_logits", math.nan)}, ValueError, "start.weight_logits must have a softmax"),
        ({"start": planted().double().requires_grad_(False).apply(lambda m: m.means.mul_(1e300))}, ValueError,
         "start.means in torch.float32 must be finite"),
        ({"start": None}, TypeError, "n_components must be an integer, or be left to a start, got neither"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(options, error, message):
    with pytest.raises(error, match=message):
        on(**options)

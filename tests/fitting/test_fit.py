from __future__ import annotations

import gc
import json
import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor

import mfa_kernels
from mfa_kernels import MFA
from mfa_kernels.data.store import ActivationStore, ActivationStoreWriter
from mfa_kernels.fitting import FitReport, as_source, fit, fit_sharded, kmeans, preparation, stages
from tests.fitting.planted import Store, draw, nll, planted, same
from tests.fitting.test_initialization import overlap

TRUE = planted()
ROWS = draw(TRUE, 6000)
TEST = draw(TRUE, 3000, seed=2)
BEST = nll(TRUE, TEST)
METHODS = pytest.mark.parametrize("method", ["sgd", "em", "truncated", "online"])


def run(x=ROWS, n_components: int = 6, rank: int = 2, method: str = "sgd", **options) -> MFA:
    own = {"batch_size": 256, "epochs": 5} if method == "sgd" else {"epochs": 8}
    return fit(x, n_components, rank, method=method, **{"progress": False, **own, **options})


@pytest.mark.parametrize(("init", "noise"), [*product(["pca", "random"], ["shared", "per_component"])])
def test_reaches_the_likelihood_of_the_truth(init, noise):
    mfa = run(init=init, noise=noise, epochs=40 if init == "random" else 5)
    assert nll(mfa, TEST) < BEST + (0.15 if noise == "shared" else 0.25)
    assert nll(mfa, TEST) > BEST - 0.05, "nothing is better than the truth"
    assert mfa.noise_variance.shape == ((12,) if noise == "shared" else (6, 12))


def test_recovers_the_parameters_up_to_order():
    mfa = run(epochs=10)
    distance = torch.cdist(TRUE.means.detach(), mfa.means.detach())
    order = list(min(permutations(range(6)), key=lambda p: float(distance[range(6), p].sum())))
    assert distance[range(6), order].max() < 0.8
    assert overlap(TRUE.loadings.detach(), mfa.loadings.detach()[order]).min() > 0.98
    torch.testing.assert_close(mfa.noise_variance, TRUE.noise_variance, rtol=0.12, atol=0)
    torch.testing.assert_close(mfa.log_weights.exp()[order], TRUE.log_weights.exp(), atol=0.02, rtol=0)


def test_pca_start_is_worth_many_steps():
    report = {init: run(init=init).fit_report for init in ("pca", "random")}
    assert report["pca"].history[0]["held_out_nll"] < report["random"].history[1]["held_out_nll"]


def test_training_improves_on_the_start():
    history = run(n_components=4, init="random").fit_report.history
    assert history[-1]["held_out_nll"] < history[0]["held_out_nll"] - 1
    assert history[-1]["train_nll"] < history[1]["train_nll"]


@pytest.mark.parametrize(
    ("options", "room", "near"),
    [
        ({"method": "sgd", "epochs": 20}, 0.02, {"rtol": 0.1, "atol": 0.15}),
        ({"method": "em", "epochs": 40, "held_out": 0}, 0.01, {"rtol": 0.05, "atol": 0.1}),
    ],
)
def test_one_component_is_factor_analysis(options, room, near):
    x = draw(planted(1, 8, 2), 4000)
    mfa = run(x, 1, **options)
    fitted, sample = mfa.loadings[0].detach(), torch.cov(x.t())
    covariance = fitted @ fitted.t() + mfa.noise_variance.detach().diag()
    exact = -torch.distributions.MultivariateNormal(x.mean(0), sample).log_prob(x).mean()
    assert nll(mfa, x) < float(exact) + room, "the maximum over all covariances"
    torch.testing.assert_close(covariance, sample, **near)


def test_rank_0_is_a_mixture_of_diagonal_gaussians():
    true = planted(rank=0)
    mfa = run(draw(true, 4000), 6, 0)
    assert mfa.loadings.shape == (6, 12, 0)
    assert nll(mfa, draw(true, 2000, seed=2)) < nll(true, draw(true, 2000, seed=2)) + 0.1


def test_full_rank():
    mfa = run(n_components=2, rank=12, epochs=1)
    assert math.isfinite(nll(mfa, TEST))


def test_kinds_of_data_agree(tmp_path):
    expected = run(epochs=1)
    np.save(tmp_path / "x.npy", ROWS.numpy())
    kinds = [
        ROWS.numpy(),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        Store(ROWS),
        (batch for batch in ROWS.split(700)),
        ROWS.view(60, 100, 12),
    ]
    for data in kinds:
        assert same(run(data, epochs=1), expected), type(data)


def test_an_activation_store(tmp_path):
    with ActivationStoreWriter(tmp_path, 12, rows_per_shard=2500) as writer:
        for part in ROWS.split(1000):
            writer.add_document(range(1000), range(1000), part)
    whole = {"epochs": 1, "held_out": 0.0}  # as the texts are known, others would be held out
    assert same(run(ActivationStore(tmp_path), **whole), run(**whole))


def test_half_precision_data():
    mfa = run(ROWS.half(), epochs=2)
    assert mfa.means.dtype == torch.float32
    assert nll(mfa, TEST) < BEST + 0.5


def test_float64_parameters():
    mfa = run(ROWS.double(), epochs=1, dtype=torch.float64)
    assert mfa.means.dtype == torch.float64
    assert nll(mfa, TEST) < BEST + 0.5


def test_the_best_state_is_restored():
    held: dict[int, list[Tensor]] = {}

    def ruin(mfa: MFA, record: dict) -> None:
        held[record["step"]] = [p.detach().clone() for p in mfa.parameters()]
        if record["epoch"] >= 3:
            with torch.no_grad():
                mfa.means.add_(50.0)

    mfa = run(callbacks=[ruin])
    report = mfa.fit_report
    nlls = [record["held_out_nll"] for record in report.history]
    assert nlls[4] > nlls[3] + 100, "the ruin is seen"
    assert report.best_step == report.history[3]["step"] == report.history[nlls.index(min(nlls))]["step"]
    assert report.held_out_nll == min(nlls)
    assert all(torch.equal(p, q) for p, q in zip(mfa.parameters(), held[report.best_step]))
    assert nll(mfa, TEST) < BEST + 0.3


def test_a_callback_that_changes_nothing_changes_nothing():
    seen = []
    mfa = run(epochs=2, callbacks=[lambda m, record: seen.append(record["step"])])
    assert same(mfa, run(epochs=2))
    assert seen == [record["step"] for record in mfa.fit_report.history] == [0, 23, 46]


@METHODS
def test_the_rows_of_the_start_are_not_held_while_it_trains(method):
    x, held = draw(TRUE, 10_000), []

    def look(mfa: MFA, record: dict) -> None:
        shapes = [tuple(one.shape) for one in gc.get_objects() if type(one) is torch.Tensor]
        held.append(shapes.count((9500, 12)))

    run(x, method=method, epochs=2, held_out=0.05, callbacks=[look])
    assert held[-1] == 0


@pytest.mark.parametrize("method", ["sgd", "em"])
def test_patience_stops_early(method):
    def ruin(mfa: MFA, record: dict) -> None:
        with torch.no_grad():
            mfa.means.add_(50.0)

    report = run(method=method, epochs=20, patience=3, callbacks=[ruin]).fit_report
    assert report.stopped_early
    assert len(report.history) == 4
    assert report.best_step == 0
    assert not run(method=method, epochs=2, patience=3).fit_report.stopped_early


def test_report():
    mfa = run(epochs=2, eval_every=10)
    report = mfa.fit_report
    assert [record["step"] for record in report.history] == [0, 10, 20, 30, 40, 46]
    assert [record["epoch"] for record in report.history] == [0, 1, 1, 2, 2, 2]
    assert set(report.history[0]) == {
        "step", "epoch", "train_nll", "held_out_nll", "live", "active", "gain", "seconds",
        "tokens_per_second", "memory",
    }  # fmt: skip
    assert report.history[0]["train_nll"] is None
    seconds = [record["seconds"] for record in report.history]
    assert seconds == sorted(seconds)
    assert all(record["tokens_per_second"] > 0 for record in report.history[1:])
    assert set(report.seconds) == {"kmeans", "start", "sgd"}
    assert report.held_out_rows == 300
    assert report.live_components == 6
    assert report.live_rows == 300 + 64 * 6
    assert report.skipped_rows == report.skipped_steps == 0


def test_log(tmp_path):
    path = tmp_path / "fit.jsonl"
    mfa = run(epochs=2, log=path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == mfa.fit_report.history


def test_held_out_rows_are_not_trained_on():
    store = Store(ROWS)
    read = []
    rows = store.rows
    store.rows = lambda index: (read.append(index), rows(index))[1]
    run(store, epochs=1, held_out=0.25, clusters=TRUE.means.detach())
    # The first three find the dtype, and whether it is one buffer; some from all over are for the fingerprint.
    some, held, start, *batches, live = read[3:]
    assert len(held) == 1500
    assert len(some) == 256
    assert torch.equal(torch.cat(batches).sort().values, start.sort().values)
    assert torch.equal(live, start[: 64 * 6])
    assert torch.equal(torch.cat([held, start]).sort().values, torch.arange(6000))


class Texts(Store):
    """Rows of texts, each of which has a direction of its own."""

    def __init__(self, sizes: list[int]) -> None:
        self.texts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        g = torch.Generator().manual_seed(0)
        own = torch.randn(len(sizes), 12, generator=g) * 3
        super().__init__(draw(TRUE, len(self.texts)) + own[self.texts])


@METHODS
def test_whole_texts_are_held_out(method: str):
    """Rows of the texts that were trained on promise what no other text keeps."""
    store = Texts([40] * 100)
    mfa = run(store, method=method, epochs=2, held_out=0.1)
    assert (mfa.fit_report.held_out_by, mfa.fit_report.held_out_rows) == ("text", 400)
    assert "(held out by text)" in str(mfa.fit_report)
    by_row = run(store.data, method=method, epochs=2, held_out=0.1)
    assert (by_row.fit_report.held_out_by, by_row.fit_report.held_out_rows) == ("row", 400)
    again = run(store, method=method, epochs=2, held_out=0.1)
    assert all(torch.equal(p, q) for p, q in zip(mfa.parameters(), again.parameters()))


def test_the_rows_held_out_are_of_texts_that_no_other_row_is_from():
    store, report = Texts([3, 50, 1, 200, 30, 7, 90] * 20), FitReport()
    rows, held = preparation.split_rows(as_source(store), 0.1, torch.Generator().manual_seed(3), report)
    assert report.held_out_by == "text"
    assert not set(store.texts[rows].tolist()) & set(store.texts[held].tolist())
    assert sorted([*rows.tolist(), *held.tolist()]) == list(range(len(store)))
    assert 0.09 * len(store) < len(held) <= 0.1 * len(store)


@pytest.mark.parametrize("sizes", [[3000], [2000, 2000], [700, 600, 500, 650]], ids=str)
def test_too_few_texts_are_held_out_row_by_row(sizes: list[int]):
    report = FitReport()
    rows, held = preparation.split_rows(as_source(Texts(sizes)), 0.1, torch.Generator().manual_seed(3), report)
    assert (report.held_out_by, len(held), len(rows) + len(held)) == ("row", round(0.1 * sum(sizes)), sum(sizes))


def test_texts_that_are_none_are_refused():
    store = Texts([40] * 10)
    store.texts = store.texts[:-1]
    with pytest.raises(ValueError, match=r"activations.texts must be integers of shape \(400,\), a text for each row"):
        run(store)


@pytest.mark.parametrize(("method", "epochs", "room"), [("sgd", 5, 0.3), ("em", 3, 0.1), ("online", 3, 0.1)])
def test_without_held_out_rows_the_last_state_is_returned(method, epochs, room):
    states = []
    options = {"method": method, "epochs": epochs, "held_out": 0}
    mfa = run(**options, callbacks=[lambda m, _: states.append(m.means.detach().clone())])
    assert torch.equal(mfa.means, states[-1])
    report = mfa.fit_report
    assert report.held_out_nll is None
    assert report.best_step == report.history[-1]["step"]
    assert report.history[-1]["held_out_nll"] is None
    assert method == "sgd" or report.prior_strength == 10
    assert nll(mfa, TEST) < BEST + room


@METHODS
def test_rows_that_are_not_finite_are_skipped_and_counted(method):
    dirty = ROWS.clone()
    dirty[::50] = float("nan")
    dirty[1::50, 3] = float("inf")
    mfa = run(dirty, method=method)
    report = mfa.fit_report
    assert report.skipped_rows == 240
    assert report.skipped_steps == 0
    assert 200 < report.held_out_rows < 300
    assert nll(mfa, TEST) < BEST + 0.3
    assert run(dirty, method=method, epochs=0).fit_report.skipped_rows == 240


@METHODS
def test_rows_whose_squares_overflow_are_skipped_and_counted(method):
    """One of them among the held-out rows, and no state would be better than another."""
    dirty = ROWS.clone()
    dirty[::50] = 1e25
    dirty[1::50, 3] = -3e38
    report = run(dirty, method=method).fit_report
    assert report.skipped_rows == 240
    assert report.skipped_steps == 0
    assert 200 < report.held_out_rows < 300
    assert report.held_out_nll < BEST + 0.5


def test_whole_batches_that_are_not_finite():
    dirty = torch.cat([ROWS[:400], torch.full((5600, 12), float("nan"))])
    mfa = run(dirty, batch_size=4, epochs=1)
    assert mfa.fit_report.skipped_rows == 5600
    assert math.isfinite(nll(mfa, TEST))


@METHODS
def test_constant_and_outlier_dimensions(method):
    x = ROWS.clone()
    x[:, 0] = 3.0
    x[:, 1] = 1e4 + 100 * x[:, 1]
    mfa = run(x, method=method)
    assert mfa.log_prob(x).isfinite().all()
    assert mfa.fit_report.skipped_steps == 0
    assert mfa.fit_report.held_out_nll <= mfa.fit_report.history[1]["held_out_nll"]
    assert mfa.center[1] == pytest.approx(float(x[:, 1].mean()), rel=1e-3)


def test_the_scale_of_the_data_does_not_matter():
    base = run(epochs=2).fit_report.held_out_nll
    for scale in (1e-3, 1e3):
        scaled = run(ROWS * scale, epochs=2).fit_report.held_out_nll
        assert scaled - 12 * math.log(scale) == pytest.approx(base, abs=0.02)


def test_no_epochs_is_the_start():
    report = run(epochs=0).fit_report
    assert len(report.history) == 1
    assert report.best_step == 0


def test_clusters_are_reused(monkeypatch):
    result = kmeans(ROWS, 6, progress=False)
    monkeypatch.setattr(stages, "kmeans", lambda *a, **k: pytest.fail("K-means ran"))
    assert same(run(clusters=result, epochs=1), run(clusters=result.centroids, epochs=1))


@pytest.mark.parametrize("split", ["rows", "components"])
def test_dead_components_are_warned_of(split):
    far = torch.cat([TRUE.means.detach(), torch.full((6, 12), 1e3) + torch.arange(6.0).unsqueeze(1)])
    with pytest.warns(UserWarning, match="6 of 12 components are not the most responsible for any") as told:
        mfa = fit(ROWS, 12, 2, split=split, clusters=far, epochs=0, progress=False)
    assert mfa.fit_report.live_components == 6
    assert [warning.filename for warning in told] == [__file__], "it is told of the line that fits"


def test_as_many_components_as_rows_to_train_on():
    x = ROWS[:20]
    mfa = run(x, 16, 2, held_out=0.2, epochs=1)
    assert mfa.log_prob(x).isfinite().all()


def test_public_name():
    assert mfa_kernels.fit is fit


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"method": "adam"},
            ValueError,
            "method must be one of 'sgd', 'em', 'truncated', 'online', 'auto', got 'adam'",
        ),
        ({"init": "kmeans"}, ValueError, "init must be one of 'pca', 'random'"),
        ({"noise": "full"}, ValueError, "noise must be one of"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of"),
        ({"precision": "double"}, ValueError, "precision must be one of"),
        ({"n_components": 0}, ValueError, "n_components must be an integer >= 1, got 0"),
        ({"n_components": 6.0}, TypeError, "n_components must be an integer, got 6.0"),
        ({"batch_size": "64"}, TypeError, "batch_size must be an integer, got '64'"),
        ({"n_components": 5701}, ValueError, r"n_components = 5701 needs .* got 5700 of 6000 \(held out: 300\)"),
        ({"rank": 13}, ValueError, "rank must be at most the width of the activations, 12, got 13"),
        ({"rank": -1}, ValueError, "rank"),
        ({"epochs": -1}, ValueError, "epochs"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"eval_every": 0}, ValueError, "eval_every"),
        ({"patience": 0}, ValueError, "patience"),
        ({"lr": 0.0}, ValueError, "lr must be positive and finite, got 0.0"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"held_out": 1.0}, ValueError, r"held_out must be a share in \[0, 1\), got 1.0"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype must be torch.float32 or torch.float64"),
        ({"clusters": torch.zeros(5, 12)}, ValueError, r"clusters must have centroids .* got \(5, 12\)"),
        ({"x": ROWS.long()}, TypeError, "activations must have a floating-point dtype, got torch.int64"),
        ({"x": ROWS[:0]}, ValueError, "activations must hold at least one row"),
        ({"x": ROWS[:1], "n_components": 1}, ValueError, r"got 0 of 1 \(held out: 1\)"),
        ({"x": torch.full((50, 12), float("nan"))}, ValueError, "held_out: none of the 2 held-out rows is finite"),
        ({"x": torch.full((50, 12), float("nan")), "held_out": 0}, ValueError, "finite rows to train on, got 0 of 50"),
        ({"x": torch.ones(50, 12), "n_components": 1}, ValueError, "activations do not vary"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_activations_of_a_language_model(activations_of_text):
    pca, random = (run(activations_of_text, 16, 5, init=init, epochs=3).fit_report for init in ("pca", "random"))
    assert pca.held_out_nll < pca.history[0]["held_out_nll"] - 1
    assert pca.history[0]["held_out_nll"] < random.history[1]["held_out_nll"]
    assert pca.live_components == 16
    assert pca.skipped_rows == pca.skipped_steps == 0


def test_a_held_out_row_too_far_for_the_dtype_does_not_stop_the_choice():
    """In units of the noise 1e18 is 1e20, whose square overflows float32: the held-out mean is not finite, and the fit
    must not fall back to its start."""
    generator = torch.Generator().manual_seed(0)
    x = 0.01 * torch.randn(600, 6, generator=generator)
    held_out = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:180]
    x[held_out[::12]] = 1e18
    clusters = 0.01 * torch.randn(2, 6, generator=generator)
    seen = []
    mfa = fit(
        x, 2, 1, method="sgd", epochs=2, held_out=0.3, patience=None, clusters=clusters,
        callbacks=[lambda mfa, record: seen.append(record["held_out_nll"])], progress=False,
    )  # fmt: skip
    assert not math.isfinite(seen[-1])
    assert mfa.fit_report.best_step == mfa.fit_report.history[-1]["step"] > 0


def test_activations_too_small_to_square_are_told_of_their_scale():
    rows = draw(planted(), 600)
    for scale in (1e-25, 1e-30):
        with pytest.raises(ValueError, match=r"activations .*: look at their scale"):
            fit(rows * scale, 6, 2, epochs=1, progress=False)


def test_a_device_without_values_is_refused():
    with pytest.raises(ValueError, match="device must be one that holds values"):
        fit(draw(planted(), 600), 6, 2, device="meta", progress=False)


@pytest.mark.parametrize(("epochs", "settled"), [(2, False), (200, True)])
def test_a_fit_that_came_to_rest_says_so(epochs, settled):
    mfa = fit(draw(planted(), 1200), 6, 2, method="em", epochs=epochs, patience=None, progress=False)
    assert mfa.fit_report.settled == settled
    assert (mfa.fit_report.history[-1]["step"] < epochs) == settled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sgd"}, "method must be one of 'em', 'online', 'auto', got 'sgd'"),
        ({"row_weights": torch.ones(6000)}, r"row_weights must be left out with split = 'components', got a tensor"),
        ({"init": "random"}, "init must be left out with split = 'components', got 'random'"),
        ({"polish": 2}, "polish must be left out with split = 'components', got 2"),
        ({"split": "columns"}, "split must be one of 'rows', 'components', got 'columns'"),
    ],
)
def test_what_a_split_into_components_cannot_do_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fit(ROWS, 6, 2, **{"split": "components", "epochs": 1, "progress": False, **options})


def test_the_name_that_a_split_into_components_had():
    options = {"method": "em", "epochs": 2, "progress": False}
    with pytest.warns(FutureWarning, match=r"fit_sharded is fit\(..., split='components'\) now") as told:
        found = fit_sharded(ROWS, 6, 2, **options)
    assert [warning.filename for warning in told] == [__file__]
    assert same(found, fit(ROWS, 6, 2, split="components", **options))
    with pytest.raises(TypeError, match="unexpected keyword argument 'lr'"):
        fit_sharded(ROWS, 6, 2, lr=0.1)


@pytest.mark.parametrize(
    ("components", "rows"), [(100, 100_000), (1000, 128_000), (2048, 1 << 18), (8192, 1 << 18), (32_768, 1 << 20)]
)
def test_how_many_rows_a_start_reads(components, rows):
    assert preparation.start_rows(components) == rows

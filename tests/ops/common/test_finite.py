"""One definition of a finite row, and whoever averages over rows keeps to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA, fit, kmeans
from mfa_kernels.evaluation.reconstruction import evaluate
from mfa_kernels.fitting import fit_sharded, start_from_clusters
from mfa_kernels.ops.common.finite import finite_rows
from mfa_kernels.ops.kmeans.basis import leading_directions
from tests.fitting.planted import draw, planted

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BAD = (1e30, math.inf, -math.inf, math.nan)
CLUSTERS, FEATURES, RANK = 4, 8, 2


def spoiled(dtype: torch.dtype, bad: tuple[float, ...] = BAD) -> tuple[Tensor, Tensor]:
    """Rows, some of them with one entry that is not to be used, and which ones are good."""
    x = draw(planted(CLUSTERS, FEATURES, RANK), 400)
    good = torch.ones(len(x), dtype=torch.bool)
    x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for i, value in enumerate(bad):
        x[40 * i + 7, i] = value
        good[40 * i + 7] = False
    return x.to(dtype), good


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_definition(dtype):
    x, good = spoiled(dtype)
    assert torch.equal(finite_rows(x, torch.float32), good)
    good[7] = dtype == torch.float64  # in its own, 1e30 has a square
    assert torch.equal(finite_rows(x), good)


def test_squares_that_add_up_to_too_much():
    x = torch.full((1, 4), 1e19)
    assert not finite_rows(x)
    assert finite_rows(x[:, :2])
    assert finite_rows(x.double())
    assert not finite_rows(torch.full((1, 1), 1e200, dtype=torch.float64))
    assert finite_rows(x[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", [None, 200])
def test_kmeans(dtype, sample):
    x, good = spoiled(dtype)
    found = kmeans(x, CLUSTERS, sample=sample, progress=False)
    good = finite_rows(x)
    assert found.skipped == int((~good).sum())
    assert torch.equal(found.assignment >= 0, good)
    assert int(found.counts.sum()) == int(good.sum())
    assert found.centroids.isfinite().all()


def test_a_row_is_not_owned_for_being_near_a_centroid():
    """|x|^2 overflows, |x - c|^2 does not."""
    x = torch.full((60, 4), 9.5e18)
    x[:, 0] += torch.linspace(0, 1e17, 60)
    x[::2] = torch.full((4,), 1e18)  # of these alone the norms are finite
    init = torch.stack([x[0], torch.full((4,), 8e18)])
    with pytest.warns(UserWarning, match="own no row") as seen:
        found = kmeans(x, 2, init=init, iterations=0, progress=False)
    assert torch.equal(found.assignment >= 0, finite_rows(x))
    assert found.skipped == 30
    assert seen[0].filename == __file__  # it points at the caller


def test_directions_are_those_of_finite_rows():
    x = draw(planted(CLUSTERS, 64, RANK), 400)
    expected = leading_directions(x[1:], torch.zeros(64))
    x[0, 0] = 1e30
    found = leading_directions(x, torch.zeros(64))
    assert found is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["em", "online", "sgd", "sharded"])
def test_fit(method, dtype):
    """Of data in float64 too, for a float32 mixture: it is the mixture's range that counts."""
    x, good = spoiled(dtype)
    if method == "sharded":
        mfa = fit_sharded(x, CLUSTERS, RANK, epochs=2, held_out=0.2, progress=False, group=False)
    else:
        mfa = fit(x, CLUSTERS, RANK, method=method, epochs=2, held_out=0.2, batch_size=128, progress=False)
    assert mfa.fit_report.skipped_rows == int((~good).sum())
    assert all(math.isfinite(record["held_out_nll"]) for record in mfa.fit_report.history)
    assert all(p.isfinite().all() for p in mfa.parameters())
    assert mfa.log_prob(x[good].float()).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_start_from_clusters(dtype):
    x, good = spoiled(dtype)
    mfa = start_from_clusters(x, x[good][::99][:CLUSTERS].float(), RANK, dtype=torch.float32, progress=False)
    clean = start_from_clusters(x[good], x[good][::99][:CLUSTERS].float(), RANK, dtype=torch.float32, progress=False)
    for name, tensor in clean.state_dict().items():
        torch.testing.assert_close(mfa.state_dict()[name], tensor)


@pytest.mark.parametrize("mixture_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluate(dtype, mixture_dtype):
    mfa = planted(CLUSTERS, FEATURES, RANK).to(mixture_dtype)
    x, good = spoiled(dtype)
    # Its range is float64's only where both are: what a half, or float32, was read as has the square it has.
    kept = finite_rows(x, mixture_dtype)
    if mixture_dtype == torch.float32:
        assert torch.equal(kept, good)
    score, clean = evaluate(mfa, x, x[good][:3], progress=False), evaluate(mfa, x[kept], x[good][:3], progress=False)
    assert score.skipped == int((~kept).sum())
    assert clean.skipped == 0
    for name, value in clean.as_dict().items():
        if name not in ("skipped", "tokens_per_second"):
            assert math.isfinite(value), name
            assert score.as_dict()[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("value", [1e16, 1e18])
def test_a_row_without_a_density_is_left_out_of_an_evaluation(value):
    """Its norm is finite, but not in units of the noise."""
    m = planted(CLUSTERS, FEATURES, RANK)
    mfa = MFA.from_parameters(m.means, m.loadings, torch.full((FEATURES,), 1e-10), m.log_weights.exp())
    x, _ = spoiled(torch.float32, ())
    clean = evaluate(mfa, x, progress=False)
    spoiled_too = torch.cat([x, torch.full((1, FEATURES), value)])
    assert finite_rows(spoiled_too).all()
    score = evaluate(mfa, spoiled_too, progress=False)
    assert score.skipped == 1
    assert score.nll == pytest.approx(clean.nll)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_answers_row_by_row_says_nan_for_these_alone(dtype):
    mfa = planted(CLUSTERS, FEATURES, RANK)
    x, good = spoiled(dtype)
    code = mfa.encode(x)
    assert torch.equal(code.components[:, 0] >= 0, good)
    assert torch.equal(code.responsibilities[:, 0].isnan(), ~good)
    assert torch.equal(mfa.log_prob(x).isnan(), ~good)
    assert torch.equal(mfa.assign(x) >= 0, good)
    assert torch.equal(mfa.reconstruct(x).isfinite().all(1), good)

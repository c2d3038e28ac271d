"""The certificate of log p(x): never violated, finite where the result is, and not vacuous."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.scan.error_bound import _per_squared_residual, error_bound
from tests.helpers.mixtures import Mixture, mixture, tokens

CASES = ("one_hot", "diffuse", "collinear", "huge_loadings", "small_noise", "far_away", "outlier_dimension")


def problem(case: str, per_component: bool) -> tuple[Mixture, Tensor]:
    m = mixture(41, 90, 5, per_component=per_component, spread=0.05 if case == "diffuse" else 3, dtype=torch.float64)
    if case == "collinear":
        m.loadings[:, :, 1:] = m.loadings[:, :, :1] * (1 + 1e-6 * m.loadings[:, :, 1:])
    if case == "huge_loadings":
        m.loadings.mul_(1e3)
    if case == "small_noise":
        m.noise_variance.mul_(1e-6)
    if case == "outlier_dimension":
        m.means[:, 7] += 1e4
        m.noise_variance[..., 7] *= 1e4
    x = tokens(m, 120)
    if case == "far_away":
        x = x * 30
    return m.to(torch.float32), x.float()


def bound_of(m: Mixture, x: Tensor, slots: int = 16) -> tuple[Tensor, Tensor]:
    active = m.active(x, slots, m.means.mean(0))
    return active.log_prob, error_bound(x, m, m.woodbury(m.means.mean(0)), active)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_never_violated(backend, case, per_component):
    m, x = problem(case, per_component)
    log_prob, bound = bound_of(m, x)
    error = (log_prob.double() - m.log_prob_fp64(x)).abs()
    assert bound.isfinite().all()
    assert (error <= bound).all()


def test_few_slots_are_no_less_certain(backend):
    m, x = problem("diffuse", False)
    log_prob, bound = bound_of(m, x, slots=2)
    assert ((log_prob.double() - m.log_prob_fp64(x)).abs() <= bound).all()


def test_says_something(backend):
    m, x = problem("one_hot", False)
    _, bound = bound_of(m, x)
    assert bound.max() < 0.02  # nats, where log p(x) is about -120
    wide = m.to(torch.float64)
    _, bound = bound_of(wide, x.double())
    assert bound.max() < 1e-10


def test_grows_with_the_distance(backend):
    m, x = problem("one_hot", False)
    near, far = bound_of(m, x)[1], bound_of(m, 100 * x)[1]
    assert (far > near).all()


def test_a_token_that_is_not_finite(backend):
    m, x = problem("one_hot", False)
    x[3, 5] = torch.nan
    log_prob, bound = bound_of(m, x)
    assert torch.equal(bound.isnan(), log_prob.isnan())
    assert bound.isnan().sum() == 1


def test_nothing():
    m, x = problem("one_hot", False)
    assert bound_of(m, x[:0])[1].shape == (0,)


def test_it_is_read_as_the_readme_says(backend):
    """The part per squared residual is nearly all of it, and errors are some hundred times less."""
    m = mixture(16, 256, 10, spread=3, dtype=torch.float64)
    x, narrow = tokens(m, 200).float(), m.to(torch.float32)
    log_prob, bound = bound_of(narrow, x)
    woodbury = narrow.woodbury(narrow.means.mean(0))
    best = narrow.active(x, 16, narrow.means.mean(0)).components[:, 0].long()
    residual = (x.double() - narrow.means[best].double()) * narrow.noise_variance.double().rsqrt()
    per_residual = _per_squared_residual(woodbury, 256, torch.finfo(torch.float32).eps / 2)
    share = per_residual * residual.square().sum(1) / bound
    assert 0.95 < share.median() < 1
    error = (log_prob.double() - narrow.log_prob_fp64(x)).abs()
    assert (bound.median() / error.median()) > 100

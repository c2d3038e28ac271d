from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.mixture import functional
from tests.helpers.mixtures import Mixture, mixture, tokens


@pytest.fixture
def m() -> Mixture:
    return mixture(4, 5, 2)


@pytest.fixture
def x(m: Mixture) -> Tensor:
    return tokens(m, 6)


@pytest.mark.parametrize("precision", functional.PRECISIONS)
def test_log_prob(backend, precision):
    m = mixture(20, 15, 3, dtype=torch.float64)
    x = tokens(m, 30)
    expected = m.log_prob_fp64(x)
    out = functional.log_prob(x.reshape(5, 6, 15), *m, center=m.means.mean(0), precision=precision)
    torch.testing.assert_close(out, expected.reshape(5, 6), rtol=1e-11, atol=1e-10)


def test_gradcheck():
    m = mixture(4, 5, 2, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (tokens(m, 6), *m)]
    assert torch.autograd.gradcheck(functional.log_prob, leaves)


def test_half_parameters_compute_in_fp32():
    m = mixture(4, 5, 2).to(torch.bfloat16)
    x = tokens(m.to(torch.float32), 6)
    torch.testing.assert_close(functional.log_prob(x, *m), m.log_prob_fp64(x).float(), rtol=1e-4, atol=1e-3)


def test_compiles_without_graph_breaks(m, x):
    out = torch.compile(functional.log_prob, fullgraph=True)(x, *m)
    torch.testing.assert_close(out, functional.log_prob(x, *m))


def test_bad_arguments(m, x):
    with pytest.raises(ValueError, match="precision must be one of"):
        functional.log_prob(x, *m, precision="tf32")
    with pytest.raises(TypeError, match="loadings is torch.float64, but means is torch.float32"):
        functional.log_prob(x, m.means, m.loadings.double(), m.noise_variance, m.log_weights)
    with pytest.raises(ValueError, match=r"log_weights must have shape \(K,\) = \(4,\), got \(3,\)"):
        functional.log_prob(x, m.means, m.loadings, m.noise_variance, m.log_weights[:3])
    with pytest.raises(ValueError, match="more than the 5 features"):
        functional.log_prob(x, m.means, torch.zeros(4, 5, 6), m.noise_variance, m.log_weights)
    with pytest.raises(ValueError, match=r"means must have shape \(K, D\)"):
        functional.log_prob(x, m.means[0], m.loadings, m.noise_variance, m.log_weights)
    with pytest.raises(ValueError, match="x must have shape"):
        functional.log_prob(x[:, :4], *m)


@pytest.mark.parametrize("precision", functional.PRECISIONS)
def test_weights_that_are_no_logarithms_are_refused(m, x, precision):
    given = {
        "weights": m.log_weights.exp(), "of one": torch.ones(4) / 4, "logits": m.log_weights + 0.1,
        "nothing": torch.full((4,), -torch.inf), "NaN": m.log_weights * torch.nan,
    }  # fmt: skip
    for name, log_weights in given.items():
        with pytest.raises(ValueError, match="log_weights must be logarithms of weights that add up to at most 1, got"):
            pytest.fail(f"{name}: {functional.log_prob(x, *m[:3], log_weights, precision=precision)}")
    with pytest.raises(ValueError, match="logsumexp of 1:"):  # the least that weights can have
        functional.log_prob(x, m.means[:1], m.loadings[:1], m.noise_variance, torch.ones(1), precision=precision)


def test_parts_of_a_mixture_make_the_whole():
    m = mixture(8, 5, 2, dtype=torch.float64)
    x = tokens(m, 6)
    parts = [functional.log_prob(x, m.means[p], m.loadings[p], m.noise_variance, m.log_weights[p])
             for p in (slice(0, 3), slice(3, 8))]  # fmt: skip
    torch.testing.assert_close(torch.stack(parts).logsumexp(0), functional.log_prob(x, *m), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_rounded_are_taken(dtype):
    for components in (1, 3, 4096):
        for spread in (0.0, 1.0, 8.0):
            generator = torch.Generator().manual_seed(components)
            log_weights = (spread * torch.randn(components, generator=generator)).log_softmax(0)
            m = mixture(components, 2, 0)
            given = [t.to(dtype) for t in (*m[:3], log_weights)]
            assert functional.log_prob(torch.zeros(1, 2), *given).isfinite().all()


@pytest.mark.parametrize("precision", functional.PRECISIONS)
@pytest.mark.parametrize("shape", [(5,), (4, 5)])
@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_a_noise_variance_that_is_none_is_refused(value, shape, precision):
    m = mixture(4, 5, 2, per_component=len(shape) == 2)
    m.noise_variance[..., 3] = value
    with pytest.raises(ValueError, match=r"noise_variance must be positive and finite, got values from"):
        functional.log_prob(tokens(m, 6), *m, precision=precision)


def test_what_nobody_can_look_at_is_taken(m, x):
    """Under vmap there are no single values, and under torch.compile and on the meta device none at all."""
    weights = torch.stack([m.log_weights, m.log_weights.flip(0)])
    expected = torch.stack([functional.log_prob(x, *m[:3], w) for w in weights])
    found = torch.vmap(lambda w: functional.log_prob(x, *m[:3], w))(weights)
    torch.testing.assert_close(found, expected)
    on_meta = [t.to("meta") for t in (x, *m)]
    assert functional.log_prob(*on_meta).shape == (6,)


def test_a_mixture_pays_for_no_check(m, x, monkeypatch):
    """Its weights are normalised as they are made, and its noise variance is an exponential."""
    monkeypatch.setattr(functional, "_check_values", lambda *given: pytest.fail("checked"))
    for precision in functional.PRECISIONS:
        mfa = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp(), precision=precision)
        torch.testing.assert_close(mfa.log_prob(x), m.log_prob_fp64(x).float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(pytest.fail.Exception, match="checked"):
        functional.log_prob(x, *m)

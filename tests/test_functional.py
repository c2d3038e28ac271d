from __future__ import annotations

import pytest
import torch

from mfa_kernels import functional
from tests.mixtures import mixture, tokens


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


def test_compiles_without_graph_breaks():
    m = mixture(4, 5, 2)
    x = tokens(m, 6)
    out = torch.compile(functional.log_prob, fullgraph=True)(x, *m)
    torch.testing.assert_close(out, functional.log_prob(x, *m))


def test_bad_arguments():
    m = mixture(4, 5, 2)
    x = tokens(m, 6)
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

from __future__ import annotations

import pytest
import torch

from mfa_kernels.ops.m_step import op, portable
from mfa_kernels.ops.statistics.op import SufficientStatistics, expectation
from mfa_kernels.ops.woodbury.types import Parameters
from tests.helpers.mixtures import Mixture, drawn

# (N, K, D, R). Features go in vectors of up to 16, components in 64 chunks: a ragged tail of each.
SHAPES = [(40, 1, 1, 1), (300, 5, 12, 2), (500, 67, 33, 5), (200, 7, 61, 13), (100, 3, 20, 0), (400, 70, 128, 4)]


def statistics(m: Mixture, x: torch.Tensor) -> SufficientStatistics:
    s = SufficientStatistics.zeros(m.means, m.loadings.shape[2], m.noise_variance.dim() == 2)
    expectation(x, Parameters(*m), m.woodbury(), s)
    return s


def covariance(features: int) -> torch.Tensor:
    a = torch.randn(features, 2 * features, dtype=torch.float64)
    return a @ a.mT / features


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("strength", [0.3, 30.0])
def test_as_plain_pytorch_has_it(shape, per_component, strength, monkeypatch):
    m, x = drawn(*shape, per_component=per_component, spread=1.0, dtype=torch.float64)
    s, prior, parameters = statistics(m, x), covariance(shape[2]), Parameters(*m)
    monkeypatch.setattr(op, "_CHUNK_ELEMENTS", 8 * m.loadings[0].numel() + 8)
    found = op.solve(s, parameters, m.woodbury(), prior, strength, 0.5)
    every = op.chunks(m.loadings)
    expected = op.Maximum(*portable.solve(s, parameters, prior, strength, 0.5, every))
    for own, wanted in zip(found, expected):
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(own, wanted, rtol=1e-8, atol=1e-9 * scale)
    noise = m.noise_variance.expand_as(m.means)
    exact = torch.linalg.inv(m.loadings @ m.loadings.mT + torch.diag_embed(noise))
    torch.testing.assert_close(op.traces(parameters, m.woodbury(), prior), (exact * prior).sum((1, 2)))


def test_float32_is_near(backend):
    m, x = drawn(900, 20, 71, 4, spread=1.0)
    wide = m.to(torch.float64)
    s, prior = statistics(m, x), covariance(71)
    found = op.solve(s, Parameters(*m), m.woodbury(), prior, 10.0, 0.0)
    expected = op.solve(s, Parameters(*wide), wide.woodbury(), prior, 10.0, 0.0)
    for own, wanted in zip(found, expected):
        torch.testing.assert_close(own.double(), wanted.double(), rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_component_without_tokens_keeps_its_parameters(backend):
    m, x = drawn(100, 8, 20, 3, spread=3.0)
    s = statistics(m, x)
    for part in (s.mass, s.shift, s.latent, s.second, s.cross):
        part[5] = 0
    found = op.solve(s, Parameters(*m), m.woodbury(), covariance(20), 10.0, 1e-3)
    assert torch.equal(found.loadings[5], m.loadings[5])
    assert not found.change[5].any()
    assert not torch.equal(found.loadings[4], m.loadings[4])


def test_statistics_of_no_tokens_are_refused(backend):
    m, x = drawn(100, 8, 20, 3, spread=3.0)
    s = statistics(m, x)
    s.second[2] = -1e6 * torch.eye(3)
    with pytest.raises(torch.linalg.LinAlgError):
        op.solve(s, Parameters(*m), m.woodbury(), covariance(20), 10.0, 0.0)


def test_the_number_of_threads_changes_no_bit():
    m, x = drawn(700, 70, 40, 5, spread=0.5, dtype=torch.float64)
    s, prior, before = statistics(m, x), covariance(40), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(op.solve(s, Parameters(*m), m.woodbury(), prior, 10.0, 0.0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))

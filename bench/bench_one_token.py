"""One generated token against all components. The floor is reading every row once: the baseline is a sum over them."""

from __future__ import annotations

import pytest
import torch

from bench import baselines
from mfa_kernels import MFA

SHAPES = {"K1024_D768_R10": (1, 1024, 768, 10), "K4096_D768_R10": (1, 4096, 768, 10)}


@pytest.fixture(params=SHAPES, scope="module")
def mfa(request: pytest.FixtureRequest) -> MFA:
    _, (means, loadings, noise_variance, log_weights) = baselines.problem(SHAPES[request.param])
    return MFA.from_parameters(means, loadings, noise_variance, log_weights.exp())


def measure(benchmark, mfa: MFA, function) -> None:
    rows = mfa.woodbury().rows
    benchmark.group = (
        f"one token, K={mfa.n_components} D={mfa.n_features} R={mfa.rank}, {rows.nbytes / 1e6:.0f} MB of rows"
    )
    with torch.no_grad():
        benchmark.pedantic(function, rounds=50, warmup_rounds=5)


def test_read_rows(benchmark, mfa):
    rows = mfa.woodbury().rows
    measure(benchmark, mfa, rows.sum)


def test_log_prob(benchmark, mfa):
    x = mfa.sample(1)
    measure(benchmark, mfa, lambda: mfa.log_prob(x))


def test_encode(benchmark, mfa):
    x = mfa.sample(1)
    measure(benchmark, mfa, lambda: mfa.encode(x))

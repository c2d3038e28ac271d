"""log p(x) and the training step against matrix products of the same flops. `python -m bench.table` prints the ratios
to the faster of them; `bench/scan_rates.py` measures ours with everything in turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import baselines
from mfa_kernels import MFA, ops
from mfa_kernels.ops.common.products import yardsticks

LogProb = Callable[..., Tensor]


@pytest.fixture(params=baselines.SHAPES, scope="module")
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    return baselines.SHAPES[request.param]


@pytest.fixture(scope="module")
def problem(shape: tuple[int, int, int, int]) -> tuple[Tensor, list[Tensor]]:
    return baselines.problem(shape)


@pytest.fixture(scope="module")
def mfa(problem: tuple[Tensor, list[Tensor]]) -> MFA:
    means, loadings, noise_variance, log_weights = problem[1]
    return MFA.from_parameters(means, loadings, noise_variance, log_weights.exp())


def measure(benchmark, function: Callable[[], object], shape: tuple[int, int, int, int], rounds: int = 9) -> None:
    n, k, d, r = shape
    benchmark.group = f"N={n} K={k} D={d} R={r}"
    benchmark.extra_info.update(shape=list(shape), flops=2 * n * k * (r + 1) * d, threads=torch.get_num_threads())
    benchmark.pedantic(function, rounds=rounds, warmup_rounds=1)


def train(log_prob: LogProb, x: Tensor, parameters: list[Tensor]) -> Callable[[], None]:
    leaves = [p.clone().requires_grad_() for p in parameters]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        (-log_prob(x, *leaves).mean()).backward()

    return step


def test_gemm(benchmark, shape):
    a, b = baselines.gemm(shape)
    measure(benchmark, lambda: torch.mm(a, b), shape)


def test_onednn(benchmark, shape):
    n, k, d, r = shape
    measure(benchmark, yardsticks(n, k * (r + 1), d)["oneDNN"], shape)


def test_factors(benchmark, shape, mfa):
    parameters = [p.detach() for p in mfa.parameters_in_compute_dtype()[:3]]
    measure(benchmark, lambda: ops.factorize(*parameters, mfa.center), shape)


def test_log_prob(benchmark, shape, problem, mfa):
    with torch.no_grad():
        measure(benchmark, lambda: mfa.log_prob(problem[0]), shape)


def test_step(benchmark, shape, problem, mfa):
    def step() -> None:
        mfa.zero_grad()
        mfa.refresh()  # an optimiser would have changed the parameters: stage 0 counts
        mfa(problem[0]).backward()

    measure(benchmark, step, shape)


def test_diffuse_step(benchmark, shape, problem):
    """Every component active for every token, as after a random start: the dense fallback."""
    n, k, d, r = shape
    diffuse = MFA(k, d, r)
    with torch.no_grad():
        diffuse.means.mul_(0.01)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        diffuse.zero_grad()
        diffuse.refresh()
        diffuse(x).backward()

    measure(benchmark, step, shape, rounds=3)


def test_plain_log_prob(benchmark, shape, problem):
    x, parameters = problem
    with torch.no_grad():
        measure(benchmark, lambda: baselines.plain_log_prob(x, *parameters), shape, rounds=3)


def test_plain_step(benchmark, shape, problem):
    measure(benchmark, train(baselines.plain_log_prob, *problem), shape, rounds=3)


def test_compiled_log_prob(benchmark, shape, problem):
    x, parameters = problem
    compiled = torch.compile(baselines.plain_log_prob)
    with torch.no_grad():
        measure(benchmark, lambda: compiled(x, *parameters), shape, rounds=3)


def test_compiled_step(benchmark, shape, problem):
    measure(benchmark, train(torch.compile(baselines.plain_log_prob), *problem), shape, rounds=3)


def test_distributions_log_prob(benchmark, shape, problem):
    x, parameters = problem
    x = x[:64]  # it forms N x K x D: a few tokens, scaled up by the table
    with torch.no_grad():
        measure(benchmark, lambda: baselines.distributions_log_prob(x, *parameters), shape, rounds=2)
    benchmark.extra_info["scale"] = problem[0].shape[0] / x.shape[0]

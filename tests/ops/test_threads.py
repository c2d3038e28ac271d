"""The C++ kernels give the same bits for any number of threads, whatever the BLAS beside them does."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mfa_kernels import ops
from mfa_kernels.ops.intervene.op import intervene
from mfa_kernels.ops.kmeans.op import cluster_sums, screened
from mfa_kernels.ops.kmeans.types import ClusterSums
from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.screen import op as screen_op
from mfa_kernels.ops.screen.types import AnyScreen
from mfa_kernels.ops.statistics.op import SufficientStatistics, accumulate, expectation
from tests.helpers.mixtures import Mixture, drawn, mixture, random_mfa, tokens
from tests.helpers.threads import same_bits
from tests.helpers.unsteady_blas import unsteady_blas
from tests.ops.intervene.cases import case

pytestmark = pytest.mark.usefixtures("needs_cpp")

COUNTS = (1, 2, 6, 16)
MORE_COUNTS = (1, 2, 3, 5, 6, 7, 8, 16, 33)
NOISE = pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@pytest.fixture(autouse=True)
def counts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor of few cores, every further number costs as much as all others."""
    if request.config.getoption("--more"):
        monkeypatch.setattr(sys.modules[__name__], "COUNTS", MORE_COUNTS)


@pytest.fixture(autouse=True)
def any_blas() -> Iterator[None]:
    """Whoever asked a BLAS for a number would have another one for every number of threads."""
    with unsteady_blas():
        yield


def check(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The results, NaN replaced, the same bits for every number of threads."""
    return same_bits(lambda: [t.nan_to_num(7) for t in run()], COUNTS)


def test_the_blas_of_these_tests_is_unsteady():
    """Without which they would say nothing on a processor whose BLAS happens to be steady."""
    a = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="on 2 threads"):
        check(lambda: [a @ a])


# (N, K, D, R): one token, few (a path of their own), one panel, ragged panels; components in one range, in several, in
# ragged ones; enough panels for one range.
SHAPES = [(1, 1300, 71, 3), (2, 391, 200, 7), (4, 1023, 301, 10), (5, 1300, 71, 3), (37, 700, 391, 2),
          (101, 389, 391, 13), (300, 523, 240, 4), (2100, 97, 33, 3)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [2.0, 0.05, 0.003], ids=["one_hot", "diffuse", "all_alike"])
@NOISE
@DTYPES
def test_log_prob_and_pairs(shape, spread, per_component, dtype):
    n, k, d, r = shape
    m = mixture(k, d, r, per_component=per_component, spread=spread, dtype=dtype)
    x, f = tokens(m, n), m.woodbury()
    for slots in (1, 3, 16):
        found = check(lambda slots=slots: list(ops.log_prob(x, *m, f, slots)))
        assert (found[3] > slots).any() or spread > 0.01 or r > 8, "tokens that overflow are what this is about"
    check(lambda: [ops.component_log_prob(x, *m[:3], f)])


@NOISE
def test_factors(per_component):
    m = mixture(67, 71, 5, per_component=per_component)
    check(lambda: list(torch.ops.mfa_kernels.factors(*m[:3])))


def test_what_a_mixture_says_of_tokens():
    mfa = random_mfa(90, 64, 4)
    x = tokens(mixture(90, 64, 4), 70)

    def run() -> list[Tensor]:
        code = mfa.encode(x, top_k=3)
        parts = [t for t in vars(code).values() if isinstance(t, Tensor)]
        return [mfa.log_prob(x), mfa.responsibilities(x), mfa.reconstruct(x), mfa.decode(code), *parts]

    with torch.no_grad():
        check(run)


@NOISE
@DTYPES
def test_gradients_of_the_pairs(per_component, dtype):
    m, x = drawn(300, 150, 70, 5, per_component=per_component, spread=2.0, dtype=dtype)
    upstream = torch.randn(300, generator=torch.Generator().manual_seed(5)).to(dtype)
    assert (m.active(x).counts <= 16).all(), "tokens that overflow go by GEMM"

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *m)]
        active = Mixture(*leaves[1:]).active(leaves[0])
        pull = active.log_prob + active.logits[:, 0].masked_fill(active.components[:, 0] < 0, 0)
        return list(torch.autograd.grad(pull, leaves, upstream))

    check(run)


@NOISE
@pytest.mark.parametrize("spread", [1.0, 0.02], ids=["one_hot", "diffuse"])
def test_statistics(per_component, spread):
    m = mixture(150, 70, 5, per_component=per_component, spread=spread)
    x, f = tokens(m, 300), m.woodbury()

    def run() -> list[Tensor]:
        out = SufficientStatistics.zeros(m.means, 5, per_component)
        expectation(x, m, f, out)
        return list(out.tensors())

    def of_pairs() -> list[Tensor]:
        out = SufficientStatistics.zeros(m.means, 5, per_component)
        active = m.active(x)
        accumulate(x, active.components, active.responsibilities(), f, out)
        return list(out.tensors())[:6]

    check(of_pairs)
    if spread == 1.0:
        check(run)


@DTYPES
def test_k_means(dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 96, generator=generator, dtype=torch.float64).to(dtype)
    centroids, center = x[:130] * 0.9, x.mean(0)
    basis = torch.eye(96, dtype=dtype)[:, :32].contiguous()
    weights = torch.rand(500, generator=generator, dtype=torch.float64)

    def run() -> list[Tensor]:
        sums = ClusterSums.zeros(centroids)
        without, found = screened(x, centroids, center, None), screened(x, centroids, center, basis)
        cluster_sums(x, center, found[0], found[1], weights, sums)
        return [*without[:2], *found[:2], *sums]

    check(run)


@functools.cache
def with_screen(spread: float) -> tuple[Mixture, ops.Woodbury, AnyScreen]:
    """A mixture, its factors and its screen, made once for all scans of it."""
    m = mixture(391, 64, 5, spread=spread)
    f = m.woodbury(m.means.mean(0))
    return m, f, screen_op.screen(m, f, 48)


@pytest.mark.parametrize("count", [1, 3, 5, 128 + 129, 700])
@pytest.mark.parametrize("spread", [1.5, 0.7, 0.05], ids=["one_hot", "overlapping", "diffuse"])
def test_scans_of_one_screen(count, spread):
    """What bounds are made of comes from a BLAS: one screen is made, and every scan of it is the same."""
    m, f, screen = with_screen(spread)
    x = tokens(m, count)
    constants, threshold = f.constants(m.log_weights), activity_threshold(391, m.means.dtype)

    def run() -> list[Tensor]:
        found = screen_op.scan(x, f, constants, screen, threshold, 8)
        return [*found.active, *found[1:], screen_op.bounds(x, f, constants, screen)]

    evaluated = check(run)[5]
    assert (evaluated > 0).any() or spread < 1


def test_intervene():
    for way in ("norm", "all", "spread"):
        c = case(way, batch=12, shape=(5, 130, 10), dtype=torch.float32)
        check(lambda c=c: list(intervene(*c.arguments())))

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.statistics import op, portable, reference
from mfa_kernels.ops.statistics.op import SufficientStatistics, accumulate, expectation
from mfa_kernels.ops.woodbury.types import Woodbury
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, drawn, mixture, tokens
from tests.helpers.threads import same_bits

# (N, K, D, R): features in vectors of 8 or 16, tokens in groups of 8, 4 and 1, components in 64 chunks
SHAPES = [(40, 1, 1, 0), (93, 3, 37, 1), (150, 5, 70, 10), (300, 200, 9, 2), (60, 2, 40, 17)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of pairs, and of diffuse tokens, in tests of a few tokens."""
    monkeypatch.setattr(portable, "CHUNK", 4000)
    monkeypatch.setattr(op, "CHUNK", 4000)


def zeros(m: Mixture) -> SufficientStatistics:
    return SufficientStatistics.zeros(m.means, m.loadings.shape[2], m.noise_variance.dim() == 2)


def collect(m: Mixture, x: Tensor, weights: Tensor | None = None) -> SufficientStatistics:
    out = zeros(m)
    expectation(x, m, m.woodbury(), out, weights)
    return out


def oracle(m: Mixture, x: Tensor, weights: Tensor | None = None) -> SufficientStatistics:
    logits = m.logits_fp64(x)
    weights = torch.ones(len(x), dtype=torch.float64) if weights is None else weights
    sums = reference.statistics(x.double(), logits.softmax(-1) * weights.unsqueeze(-1), *m.to(torch.float64)[:3])
    return SufficientStatistics(*sums, (logits.logsumexp(-1) * weights).sum())


def close(found: SufficientStatistics, expected: SufficientStatistics, tolerance: float = 1e-10) -> None:
    for a, b in zip(found.tensors(), expected.tensors()):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) if b.numel() else 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("spread", [3.0, 0.05], ids=["one-hot", "diffuse"])
@pytest.mark.usefixtures("poisoned")
def test_the_definition(backend, shape, per_component, spread):
    m, x = drawn(*shape, per_component=per_component, spread=spread, dtype=torch.float64)
    if shape == (300, 200, 9, 2) and spread < 1:
        assert (m.active(x).counts > 16).all(), "every token overflows its slots"
    close(collect(m, x), oracle(m, x))


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_float32_is_off_by_a_few_roundings_of_the_terms(backend, per_component):
    m, x = drawn(900, 5, 130, 10, per_component=per_component)
    responsibilities = m.logits_fp64(x).softmax(-1).float()
    every = torch.arange(5, dtype=torch.int32).expand(len(x), -1)
    found = zeros(m)
    accumulate(x, every, responsibilities, m.woodbury(), found)
    exact = reference.statistics(x.double(), responsibilities.double(), *m.to(torch.float64)[:3])
    sizes = Terms(m, x).statistics(responsibilities)
    for name, *tensors in zip(("mass", "shift", "latent", "second", "cross", "squares"), found.tensors(), exact, sizes):
        budgets.check(*tensors, name)


def test_weights_count_tokens(backend):
    m, x = drawn(60, 4, 21, 3, dtype=torch.float64)
    weights = torch.arange(60) % 3
    close(collect(m, x, weights.double()), collect(m, x.repeat_interleave(weights, 0)))
    close(collect(m, x, weights.double() / 7), oracle(m, x, weights.double() / 7))


def test_weights_of_diffuse_tokens(backend):
    m = mixture(20, 9, 2, spread=0.05, dtype=torch.float64)
    x, weights = tokens(m, 30), torch.linspace(0, 2, 30, dtype=torch.float64)
    close(collect(m, x, weights), oracle(m, x, weights))


def test_shards_add_up(backend):
    m, x = drawn(90, 20, 33, 4, spread=0.3, dtype=torch.float64)
    parts = [collect(m, part) for part in x.split([33, 1, 56])]
    close(parts[0] + parts[1] + parts[2], collect(m, x), 1e-12)
    out = zeros(m)
    for part in x.split(37):
        expectation(part, m, m.woodbury(), out)
    close(out, collect(m, x), 1e-12)


def test_scale():
    m, x = drawn(50, 4, 9, 2, dtype=torch.float64)
    s = collect(m, x)
    s.scale_(0.25)
    close(s, collect(m, x, torch.full((50,), 0.25, dtype=torch.float64)), 1e-12)


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_moved_is_about_other_means(per_component):
    m, x = drawn(50, 4, 9, 2, per_component=per_component, spread=0.5, dtype=torch.float64)
    s, change = oracle(m, x), torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = m.logits_fp64(x).softmax(-1)
    y = x.unsqueeze(1) - (m.means + change)
    covariance = m.loadings @ m.loadings.mT + torch.diag_embed(m.noise_variance.expand_as(m.means))
    z = torch.einsum("krd,nkd->nkr", torch.linalg.solve(covariance, m.loadings).mT, x.unsqueeze(1) - m.means)
    squares = torch.einsum("nk,nkd->kd", r, y.square())
    expected = SufficientStatistics(
        s.mass,
        torch.einsum("nk,nkd->kd", r, y),
        s.latent,
        s.second,
        torch.einsum("nk,nkr,nkd->krd", r, z, y),
        squares if per_component else squares.sum(0),
        s.log_likelihood,
    )
    s.move_(change)
    close(s, expected)


def test_tokens_that_are_not_finite_add_nothing(backend):
    m, x = drawn(60, 4, 21, 3)
    dirty = x.clone()
    dirty[7], dirty[20, 3], dirty[41, 0] = float("nan"), float("inf"), 1e30  # the last: its square overflows
    kept = torch.tensor([i for i in range(60) if i not in (7, 20, 41)])
    out = zeros(m)
    active, _ = expectation(dirty, m, m.woodbury(), out)
    assert (active.components[:, 0] < 0).nonzero().squeeze(1).tolist() == [7, 20, 41]
    close(out, collect(m, x[kept]), 1e-6)
    assert all(t.isfinite().all() for t in out.tensors())


def test_nothing_in_nothing_out(backend):
    m = mixture(4, 21, 3)
    assert all((t == 0).all() for t in collect(m, tokens(m, 5)[:0]).tensors())
    out = zeros(m)
    accumulate(tokens(m, 3), torch.full((3, 2), -1, dtype=torch.int32), torch.ones(3, 2), m.woodbury(), out)
    accumulate(tokens(m, 3), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2), m.woodbury(), out)
    assert all((t == 0).all() for t in out.tensors())


def test_a_component_that_owns_nothing_and_one_that_owns_all(backend):
    m, x = drawn(30, 3, 21, 3, dtype=torch.float64)
    out = zeros(m)
    accumulate(x, torch.ones(30, 1, dtype=torch.int32), torch.ones(30, 1, dtype=torch.float64), m.woodbury(), out)
    one = torch.zeros(30, 3, dtype=torch.float64)
    one[:, 1] = 1
    close(out, SufficientStatistics(*reference.statistics(x, one, *m[:3]), out.log_likelihood))
    assert out.mass.tolist() == [0, 30, 0]


def test_same_bits_twice(backend):
    m, x = drawn(60, 40, 33, 4, spread=0.5)
    assert all(torch.equal(a, b) for a, b in zip(collect(m, x).tensors(), collect(m, x).tensors()))


def test_the_kernel_adds_in_one_order_for_any_number_of_threads():
    m = mixture(70, 33, 4, spread=0.5)
    x, f = tokens(m, 500), m.woodbury()
    if not f.is_cpp:
        pytest.skip("PyTorch's own sums may depend on the threads")
    active = m.active(x)
    weights = active.logits.softmax(-1)

    def run() -> list[Tensor]:
        out = zeros(m)
        accumulate(x, active.components, weights, f, out)
        return out.tensors()

    same_bits(run, (1, 3))


def test_half_precision_tokens(backend):
    m = mixture(4, 21, 3)
    x = tokens(m, 60).bfloat16()
    close(collect(m, x), collect(m, x.float()), 0)


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_opcheck(backend, per_component):
    m = mixture(4, 21, 2, per_component=per_component, dtype=torch.float64)
    f = m.woodbury()
    x = tokens(m, 6)
    active = m.active(x)
    torch.library.opcheck(
        torch.ops.mfa_kernels.statistics.default,
        (
            x, active.components, active.logits.softmax(-1), f.rows, f.cholesky, f.scale, f.center, f.per_component,
            *zeros(m).tensors()[:6],
        ),
    )  # fmt: skip


def test_outputs_that_do_not_fit_are_refused():
    m = mixture(4, 21, 2)
    f: Woodbury = m.woodbury()
    components, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    x = tokens(m, 3)
    wrong = SufficientStatistics.zeros(m.means[:3], 2, False)
    with pytest.raises(
        ValueError, match=r"statistics: mass must be float64 of shape \(4,\), .*got float64 of shape \(3,\)"
    ):
        accumulate(x, components, weights, f, wrong)
    with pytest.raises(IndexError, match="components must be in"):
        accumulate(x, components + 4, weights, f, zeros(m))
    with pytest.raises(TypeError, match=r"statistics: weights must be float32 of shape \(3, 1\)"):
        accumulate(x, components, weights.double(), f, zeros(m))

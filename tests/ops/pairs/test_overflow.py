from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mfa_kernels import ops
from mfa_kernels.ops.pairs import overflow
from mfa_kernels.ops.scan import portable, reference
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, drawn, mixture, tokens

NAMES = ("x", *Mixture._fields)
NOISE = pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
# (N, K, D, R); with seven components a block, K crosses three blocks and a ragged tail.
SHAPES = [(1, 1, 1, 1), (5, 24, 17, 0), (40, 24, 17, 1), (33, 31, 70, 10), (20, 23, 9, 17)]


def by_autograd(m: Mixture, x: Tensor, weight: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of sum_nk w_nk logit_nk through the reference formula."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, *m)]
    logits = leaves[4] + reference.component_log_prob(*leaves[:4])
    return list(torch.autograd.grad((logits * weight.to(dtype)).sum(), leaves))


def zeros(m: Mixture, x: Tensor) -> list[Tensor]:
    return [torch.zeros_like(t) for t in (x, *m)]


def by_gemm(m: Mixture, x: Tensor, weight: Tensor) -> list[Tensor]:
    found = zeros(m, x)[:4]
    overflow.accumulate(x, weight, m.woodbury(), x.mean(0), found)
    return found


def problem(n: int, k: int, d: int, r: int, **options: Any) -> tuple[Mixture, Tensor, Tensor]:
    """A mixture, tokens, and what pulls at their logits: of both signs, and some of it zero."""
    m, x = drawn(n, k, d, r, **options)
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return m, x, weight.masked_fill(weight.abs() < 0.2, 0).to(x.dtype)


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [((f.double() - w).norm() / w.norm().clamp_min(1e-300)).item() for f, w in zip(found, wanted)]


def check(found: list[Tensor], wanted: list[Tensor], terms: list[Tensor]) -> None:
    """Every entry of every gradient that was found within its budget."""
    for name, *tensors in zip(NAMES, found, wanted, terms):
        budgets.check(*tensors, name)


def seven_to_a_block(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int, int]) -> None:
    n, _, d, r = shape
    monkeypatch.setattr(overflow, "BLOCK", 7 * (r + 1) * max(n, d))


@pytest.fixture
def all_by_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a single token is too few, too sparse or too near for the GEMMs."""
    monkeypatch.setattr(overflow, "DENSITY", 0.0)
    monkeypatch.setattr(overflow, "OVERHEAD", 0)
    monkeypatch.setattr(overflow, "CANCELLATION", torch.inf)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@NOISE
@pytest.mark.usefixtures("poisoned")
def test_accumulates_the_gradients_of_autograd(backend, monkeypatch, shape, per_component):
    seven_to_a_block(monkeypatch, shape)
    m, x, weight = problem(*shape, per_component=per_component, spread=0.5, dtype=torch.float64)
    before = [torch.randn_like(t) for t in (x, *m[:3])]
    found = [t.clone() for t in before]
    overflow.accumulate(x, weight, m.woodbury(), x.mean(0), found)
    for name, a, b, c in zip(NAMES, found, before, by_autograd(m, x, weight, torch.float64)):
        scale = c.abs().amax().item() if c.numel() else 1.0
        torch.testing.assert_close(a - b, c, rtol=1e-9, atol=1e-9 * (1 + scale), msg=name)


CASES = {  # (N, K, D, R), spread of the means, their common offset, scale of the loadings
    "diffuse": ((300, 100, 200, 10), 0.2, 0.0, 1),
    "far_from_the_origin": ((300, 100, 200, 10), 0.2, 1e3, 1),
    "close_components": ((300, 100, 200, 10), 0.01, 0.0, 1),
    "many_tokens": ((3000, 12, 40, 4), 0.2, 0.0, 1),
    "many_features": ((70, 20, 2304, 4), 0.2, 0.0, 1),
    "rank_0": ((300, 50, 100, 0), 0.2, 1e3, 1),
    "loadings_above_the_noise": ((4000, 10, 64, 8), 0.1, 0.0, 3),
}


@pytest.mark.parametrize("case", CASES)
@NOISE
def test_fp32_error_is_a_few_roundings_of_the_terms(backend, case, per_component):
    (n, k, d, r), spread, offset, scale = CASES[case]
    m = mixture(k, d, r, per_component=per_component, spread=spread)
    m = m._replace(means=m.means + offset, loadings=m.loadings * scale)
    x = tokens(m, n)
    # Diffuse, as the responsibilities of a mixture with far too much noise.
    weight = m.logits_fp64(x).mul(0.05).softmax(-1).float()
    check(by_gemm(m, x, weight), by_autograd(m, x, weight, torch.float64), Terms(m, x, x.mean(0)).gradients(weight))


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the tokens that go by GEMM and the pairs that go as pairs."""
    seen = {"tokens": 0, "pairs": 0}
    accumulate, accumulate_gradients = overflow.accumulate, overflow.accumulate_gradients

    def by_gemm(x, *rest):
        seen["tokens"] += x.shape[0]
        accumulate(x, *rest)

    def by_pairs(pairs, *rest):
        seen["pairs"] += pairs.tokens.numel()
        accumulate_gradients(pairs, *rest)

    monkeypatch.setattr(overflow, "accumulate", by_gemm)
    monkeypatch.setattr(overflow, "accumulate_gradients", by_pairs)
    return seen


@NOISE
def test_tokens_with_few_components_stay_pairs(backend, paths, per_component):
    n, k = 400, 40
    m, x, weight = problem(n, k, 30, 3, per_component=per_component, spread=0.2, dtype=torch.float64)
    weight[::3, 4:] = 0
    few = weight[::3].count_nonzero().item()
    index = torch.arange(n) + 5  # the tokens of a longer x
    x = torch.cat([torch.full((5, 30), torch.nan, dtype=x.dtype), x])
    found = zeros(m, x)
    overflow.backward(x, index, weight, m.woodbury(), found)
    assert paths == {"tokens": n - len(weight[::3]), "pairs": few}
    wanted = by_autograd(m, x[5:], weight, torch.float64)
    assert (found[0][:5] == 0).all()
    assert max(errors([found[0][5:], *found[1:]], wanted)) < 1e-13


@pytest.mark.parametrize("n", [0, 1, 100])
def test_few_tokens_stay_pairs(backend, paths, n):
    """The GEMMs read and write every row and gradient whatever n is."""
    m, x = drawn(n, 40, 30, 3, spread=0.2, dtype=torch.float64)
    weight, found = torch.ones(n, 40, dtype=torch.float64), zeros(m, x)
    overflow.backward(x, torch.arange(n), weight, m.woodbury(), found)
    assert paths == {"tokens": 0, "pairs": n * 40}
    assert max(errors(found, by_autograd(m, x, weight, torch.float64))) < 1e-13


@NOISE
def test_groups_far_apart_keep_their_digits(backend, paths, per_component):
    """Half the components weigh, all close, and far from the centre of the tokens: there the expansion cancels."""
    n, k, d = 400, 40, 60
    m = mixture(k, d, 3, per_component=per_component, spread=0.1)
    far = torch.where(torch.arange(k) % 2 == 0, 300.0, -300.0)
    m = m._replace(means=m.means + far.unsqueeze(1))
    x = tokens(m, n)
    weight = (m.logits_fp64(x).mul(0.05)).softmax(-1).float()
    assert (weight.count_nonzero(-1) == k // 2).all()
    found = zeros(m, x)
    overflow.backward(x, torch.arange(n), weight, m.woodbury(), found)
    assert paths == {"tokens": 0, "pairs": n * k // 2}
    wanted, terms = by_autograd(m, x, weight, torch.float64), Terms(m, x).gradients(weight)
    check(found, wanted, terms)
    assert budgets.roundings(by_gemm(m, x, weight)[1], wanted[1], terms[1]) > 4 * budgets.ROUNDINGS, "or why the rule?"


def test_a_bad_token_without_weight_changes_nothing(backend):
    m, x, weight = problem(300, 40, 30, 3, spread=0.2)
    weight[17] = 0
    runs = []
    for bad in (0.0, torch.nan, torch.inf):
        x[17, 3] = bad
        runs.append(zeros(m, x))
        overflow.backward(x, torch.arange(300), weight, m.woodbury(), runs[-1])
        assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[-1], strict=True))


@pytest.mark.parametrize("wanted", range(4))
@NOISE
def test_only_the_gradients_asked_for(backend, monkeypatch, wanted, per_component):
    shape = (40, 24, 17, 3)
    seven_to_a_block(monkeypatch, shape)
    m, x, weight = problem(*shape, per_component=per_component, spread=0.3)
    every = by_gemm(m, x, weight)
    one: list[Tensor | None] = [torch.zeros_like(t) if i == wanted else None for i, t in enumerate((x, *m[:3]))]
    overflow.accumulate(x, weight, m.woodbury(), x.mean(0), one)
    assert torch.equal(one[wanted], every[wanted])


@NOISE
def test_bitwise_repeatable(backend, per_component):
    case = problem(400, 150, 90, 5, per_component=per_component, spread=0.2)
    assert all(torch.equal(a, b) for a, b in zip(by_gemm(*case), by_gemm(*case), strict=True))


def test_without_onednn(monkeypatch):
    m, x, weight = problem(200, 30, 90, 5, spread=0.2)
    wanted, terms = by_autograd(m, x, weight, torch.float64), Terms(m, x, x.mean(0)).gradients(weight)
    check(by_gemm(m, x, weight), wanted, terms)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    check(by_gemm(m, x, weight), wanted, terms)


class Largest(TorchDispatchMode):
    """The largest storage that any operation returns."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(out is a for a in args):
            self.values = max(self.values, out.numel())
        return out


@NOISE
def test_no_temporary_passes_its_bound(monkeypatch, per_component):
    n, k, d, r = 90, 100, 40, 5
    m, x, weight = problem(n, k, d, r, per_component=per_component, spread=0.3)
    woodbury, found = m.woodbury(), zeros(m, x)[:4]
    monkeypatch.setattr(overflow, "BLOCK", 5 * (r + 1) * n)
    rows = woodbury.rows.numel()  # views of it are no temporaries
    with Largest() as largest:
        overflow.accumulate(x, weight, woodbury, x.mean(0), found)
    assert largest.values <= max(n * d, overflow.BLOCK, rows) < n * k * r


@NOISE
@pytest.mark.usefixtures("all_by_gemm")
def test_gradcheck(backend, paths, per_component):
    m = mixture(5, 4, 2, per_component=per_component, spread=0.1, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (tokens(m, 6), *m)]

    def log_prob(*args):
        return Mixture(*args[1:]).active(args[0], slots=3).log_prob

    def component_log_prob(*args):
        return ops.component_log_prob(*args, Mixture(*args[1:], m.log_weights).woodbury())

    assert torch.autograd.gradcheck(log_prob, leaves)
    assert torch.autograd.gradcheck(component_log_prob, leaves[:4])
    assert paths["tokens"] > 0
    assert paths["pairs"] == 0


@NOISE
@pytest.mark.usefixtures("all_by_gemm")
def test_chunks_of_tokens_add_up(backend, monkeypatch, paths, per_component):
    n, k, d = 110, 20, 30
    m, x, pull = problem(n, k, d, 3, per_component=per_component, spread=0.1, dtype=torch.float64)
    monkeypatch.setattr(portable, "CHUNK", 34 * 2 * k)  # three chunks and a ragged tail
    leaves = [t.clone().requires_grad_() for t in (x, *m)]
    (ops.component_log_prob(*leaves[:4], m.woodbury()) * pull).sum().backward()
    found = [t.grad for t in leaves[:4]]
    assert max(errors(found, by_autograd(m, x, pull, torch.float64)[:4])) < 1e-13
    leaves = [t.clone().requires_grad_() for t in (x, *m)]
    (Mixture(*leaves[1:]).active(leaves[0], slots=2).log_prob * pull[:, 0]).sum().backward()
    weight = pull[:, :1] * m.logits_fp64(x).softmax(-1)
    assert max(errors([t.grad for t in leaves], by_autograd(m, x, weight, torch.float64))) < 1e-13
    assert paths["tokens"] > n

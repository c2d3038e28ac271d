"""The budgets of float32 hold whatever the seed, and catch what they are there for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.pairs import overflow
from mfa_kernels.ops.scan import reference
from tests.helpers import budgets
from tests.helpers.budgets import ROUNDINGS, Terms, roundings
from tests.helpers.mixtures import Mixture, mixture, tokens

NAMES = ("x", *Mixture._fields)
SHAPE = 60, 9, 130, 5  # (N, K, D, R)


def problem(seed: int = 0, per_component: bool = False, spread: float = 0.3) -> tuple[Mixture, Tensor, Terms, Tensor]:
    n, k, d, r = SHAPE
    m = mixture(k, d, r, per_component=per_component, spread=spread, seed=seed)
    x = tokens(m, n, seed=seed + 1000)
    return m, x, Terms(m, x), m.logits_fp64(x)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_results_stay_well_within(backend, seed, per_component):
    """Half of what is allowed, whatever the numbers are: no test decides by luck."""
    m, x, terms, truth = problem(seed, per_component)
    assert roundings(m.active(x).log_prob, truth.logsumexp(-1), terms.log_prob(truth)) < ROUNDINGS / 2
    leaves, wide = ([t.to(dtype, copy=True).requires_grad_() for t in (x, *m)] for dtype in (x.dtype, torch.float64))
    found = torch.autograd.grad(Mixture(*leaves[1:]).active(leaves[0]).log_prob.sum(), leaves)
    wanted = torch.autograd.grad(reference.log_prob(*wide).sum(), wide)
    for name, *tensors in zip(NAMES, found, wanted, terms.gradients(terms.responsibilities(truth))):
        assert roundings(*tensors) < ROUNDINGS / 2, name


def truncated(t: Tensor, bits: int) -> Tensor:
    """Returns values with so many bits of mantissa, as tf32 (10) and bfloat16 (7) operands have."""
    return (t.view(torch.int32) & (-1 << (23 - bits))).view(torch.float32)


def logits_of(m: Mixture, x: Tensor, bits: int = 23, x_bits: int = 23, features: int | None = None) -> Tensor:
    """The formula in float32, with the operands of its products rounded, and without some features of t."""
    rows, _, log_det = reference.woodbury(m.loadings, m.noise_variance)
    v = (truncated(x, x_bits).unsqueeze(1) - m.means) * m.noise_variance.rsqrt()
    used = slice(0, features)
    t = torch.einsum("nkd,krd->nkr", truncated(v, bits)[..., used], truncated(rows, bits)[..., used])
    distance = v.square().sum(-1) - t.square().sum(-1)
    return m.log_weights - 0.5 * (x.shape[1] * math.log(2 * math.pi) + log_det + distance)


def test_the_plain_formula_passes_and_faults_in_a_logit_are_caught():
    m, x, terms, truth = problem()
    sizes = terms.logits()
    assert roundings(logits_of(m, x), truth, sizes) < ROUNDINGS / 2
    faults = {
        "products in tf32": logits_of(m, x, bits=10),
        "products in bfloat16": logits_of(m, x, bits=7),
        "x in bfloat16": logits_of(m, x, x_bits=7),
        "the last feature left out": logits_of(m, x, features=-1),
        "a logarithm of a weight forgotten": logits_of(m, x) - m.log_weights,
        "one part in 200,000": logits_of(m, x) * (1 + 5e-6),
    }
    for name, found in faults.items():
        assert roundings(found, truth, sizes) > 2 * ROUNDINGS, name
    # And in log p(x), which adds them up.
    for name in ("products in tf32", "x in bfloat16", "the last feature left out"):
        assert roundings(faults[name].logsumexp(-1), truth.logsumexp(-1), terms.log_prob(truth)) > 2 * ROUNDINGS, name


def test_a_square_that_is_expanded_far_from_the_origin_is_caught():
    """|x|^2 - 2 x.mu + |mu|^2, no centre subtracted."""
    m, x, _, _ = problem()
    m, x = m._replace(means=m.means + 100, loadings=m.loadings[..., :0]), x + 100
    terms, truth = Terms(m, x), m.logits_fp64(x)
    scale = m.noise_variance.rsqrt()
    a, b = x * scale, m.means * scale
    distance = a.square().sum(-1, keepdim=True) - 2 * a @ b.T + b.square().sum(-1)
    found = m.woodbury().constants(m.log_weights) - 0.5 * distance
    assert roundings(found, truth, terms.logits()) > 2 * ROUNDINGS
    assert roundings(logits_of(m, x), truth, terms.logits()) < ROUNDINGS / 2


def by_formula(m: Mixture, x: Tensor, weight: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, *m)]
    logits = leaves[4] + reference.component_log_prob(*leaves[:4])
    return list(torch.autograd.grad((logits * weight).sum(), leaves))


def test_faults_in_gradients_are_caught(monkeypatch):
    m, x, terms, truth = problem()
    weight = truth.mul(0.05).softmax(-1)
    wanted = by_formula(m.to(torch.float64), x.double(), weight)
    sizes = terms.gradients(weight)

    def off(found: list[Tensor]) -> list[float]:
        return [roundings(*tensors) for tensors in zip(found, wanted, sizes)]

    assert max(off(by_formula(m, x, weight.float()))) < ROUNDINGS / 2
    dropped = weight.clone()
    dropped[7, 3] = 0  # one pair of 540
    assert min(off(by_formula(m, x, dropped.float()))) > 2 * ROUNDINGS
    coarse = Mixture(*(truncated(t.contiguous(), 10) for t in m))
    assert min(off(by_formula(coarse, truncated(x, 10), weight.float()))[:4]) > 2 * ROUNDINGS

    # By products of blocks, whose budget knows the centre they are expanded about.
    def by_gemm(center: Tensor) -> list[Tensor]:
        found = [torch.zeros_like(t) for t in (x, *m[:3])]
        overflow.accumulate(x, weight.float(), m.woodbury(), center, found)
        return found

    sizes = Terms(m, x, x.mean(0)).gradients(weight)
    assert max(off(by_gemm(x.mean(0)))) < ROUNDINGS / 2
    assert max(off(by_gemm(x.mean(0) + 1000))) > 2 * ROUNDINGS, "a centre that is none"
    product = overflow.product
    monkeypatch.setattr(overflow, "product", lambda a, b: product(truncated(a, 10), truncated(b, 10)))
    assert min(off(by_gemm(x.mean(0)))) > 2 * ROUNDINGS, "products in tf32"


def test_faults_in_statistics_are_caught():
    m, x, terms, truth = problem()
    weight = truth.softmax(-1)
    from mfa_kernels.ops.statistics import reference as statistics

    exact, sizes = statistics.statistics(x.double(), weight, *m.to(torch.float64)[:3]), terms.statistics(weight)
    found = statistics.statistics(x, weight.float(), *m[:3])
    for a, b, c in zip(found, exact, sizes):
        budgets.check(
            a, b, c
        )  # PyTorch's own sums come to 4.4 eps where it uses no vectors (ATEN_CPU_CAPABILITY=default)
    found = statistics.statistics(truncated(x, 10), weight.float(), *m[:3])
    assert all(roundings(a, b, c) > 2 * ROUNDINGS for a, b, c in list(zip(found, exact, sizes))[1:])


def test_nan_is_in_no_budget():
    one = torch.ones(3)
    for bad in (torch.nan, torch.inf):
        found = torch.tensor([1.0, bad, 1.0])
        with pytest.raises(AssertionError, match="off by"):
            budgets.check(found, one, one)

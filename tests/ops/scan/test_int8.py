"""The int8 level: bounds never violated, results those of the scan in float32, tokens that it does not settle counted.

On a processor that gains nothing by int8 the same kernels run, with products that are put together from int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mfa_kernels import ops
from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.scan import int8
from mfa_kernels.ops.scan.types import ActivePairs, activity_threshold
from mfa_kernels.ops.woodbury.int8 import allocate, int8_rows, pays
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, adversarial, drawn, mixture, tokens
from tests.helpers.threads import same_bits

pytestmark = pytest.mark.usefixtures("needs_cpp")

# (N, K, D, R): panels of 32 tokens, eight to a block, |v|^2 of 12 components at a time and flushed every 64 features,
# passes of 12 rows, ranges of components where tokens are few: three of each and a ragged tail.
SHAPES = [
    (256, 1, 1, 1),
    (260, 37, 33, 1),
    (300, 131, 50, 10),
    (333, 66, 391, 5),
    (400, 50, 300, 12),
    (256, 40, 64, 13),
    (270, 25, 61, 40),
    (2100, 67, 20, 4),
]
CASES = [
    "plain", "near_duplicates", "huge_norms", "rank_deficient", "small_noise", "uneven_noise", "far_regions",
    "outlier_dimensions",
]  # fmt: skip


def prepared(m: Mixture, slots: int = 16) -> Callable[[Tensor], tuple[ActivePairs, int]]:
    """A scan that returns active pairs, and how many tokens took the scan in float32."""
    woodbury = m.woodbury(m.means.mean(0))
    rows, constants = int8_rows(woodbury), woodbury.constants(m.log_weights)
    threshold = activity_threshold(len(m.means), m.means.dtype)
    return lambda x: int8.scan(x, woodbury, constants, rows, threshold, slots)[::2]


def in_float(m: Mixture, x: Tensor, slots: int = 16) -> ActivePairs:
    woodbury = m.woodbury(m.means.mean(0))
    threshold = activity_threshold(len(m.means), x.dtype)
    terms = x, woodbury.rows, woodbury.constants(m.log_weights), woodbury.scale
    return ActivePairs(*cpp.library().scan(*terms, woodbury.per_component, threshold, slots, False)[:4])


def check_bounds(m: Mixture, x: Tensor, spoil: Callable[[Tensor, int], None] | None = None) -> None:
    """Raises AssertionError where a logit, of the float32 parameters in float64, is not between its bounds."""
    woodbury = m.woodbury(m.means.mean(0))
    rows = int8_rows(woodbury)
    if spoil is not None:
        spoil(rows.terms, m.loadings.shape[2])
    low, high = int8.bounds(x, woodbury, woodbury.constants(m.log_weights), rows)
    logits = m.logits_fp64(x)
    # Stage 0 rounds what float64 does not: rows, constants. That is no part of the bounds, and as large as eps.
    room = 8 * torch.finfo(torch.float32).eps * Terms(m, x).logits()
    assert (low.double() <= logits + room).all()
    assert (high.double() >= logits - room).all()


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [5, 13])
def test_no_bound_is_violated(case, rank, per_component):
    m, x = adversarial(case, rank=rank)
    if per_component:
        factors = 0.25 + torch.rand(m.means.shape, generator=torch.Generator().manual_seed(8))
        m = m._replace(noise_variance=m.noise_variance * factors)
    check_bounds(m, x)


def test_bounds_are_violated_without_their_norms():
    """What |B| and |E| are for."""
    m, x = drawn(300, 60, 144, 6, spread=3.0)

    def spoil(terms: Tensor, rank: int) -> None:
        terms[:, 2 * rank : 2 * rank + 2] = 0

    check_bounds(m, x)
    with pytest.raises(AssertionError):
        check_bounds(m, x, spoil)


def test_norms_are_at_least_the_largest_singular_values_and_near_them():
    m = mixture(40, 200, 10, spread=3.0)
    m.loadings[3, :, 1] = m.loadings[3, :, 0]
    m.loadings[4] = 0
    m.loadings[5] *= 1e6
    woodbury = m.woodbury(m.means.mean(0))
    rows = int8_rows(woodbury)
    exact = ops.woodbury.types.unpack_rows(woodbury.rows, 200)[:, 1:].double()
    quantised = rows.rows.transpose(1, 2).flatten(2)[..., :200].double() * rows.terms[:, :10, None].double()
    assert rows.rows.abs().amax() <= 127
    for bound, of in ((rows.terms[:, 20], exact), (rows.terms[:, 21], exact - quantised)):
        norm = torch.linalg.matrix_norm(of, 2)
        assert (bound.double() >= norm).all()
        assert (bound.double() <= 1.3 * norm + 2e-5).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("spread", [3.0, 0.3], ids=["one_hot", "diffuse"])
@pytest.mark.usefixtures("poisoned")
def test_results_are_those_of_the_scan_in_float(shape, per_component, spread):
    m, x = drawn(*shape, per_component=per_component, spread=spread)
    found, _ = prepared(m, 8)(x)
    wanted = in_float(m, x, 8)
    budgets.check(found.log_prob, m.log_prob_fp64(x), Terms(m, x).log_prob(m.logits_fp64(x)))
    same = found.counts == wanted.counts  # rounding moves a logit across the threshold now and then
    assert same.double().mean() > 0.99
    assert torch.equal(found.components[same][:, 0], wanted.components[same][:, 0])
    torch.testing.assert_close(found.logits[same], wanted.logits[same], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_adversarial_results_are_those_of_the_scan_in_float(case):
    m, x = adversarial(case, count=600)
    truth, terms = m.logits_fp64(x), Terms(m, x)
    budgets.check(prepared(m)(x)[0].log_prob, truth.logsumexp(-1), terms.log_prob(truth))


def test_one_hot_tokens_are_settled_by_bounds():
    m, x = drawn(1000, 300, 96, 4, spread=3.0)
    found, whole = prepared(m)(x)
    assert whole == 0
    assert (found.counts == 1).all()


def test_a_diffuse_mixture_takes_the_scan_in_float_to_the_bit():
    m, x = drawn(600, 300, 96, 4, spread=0.05)
    found, whole = prepared(m)(x)
    assert whole == 600
    assert all(torch.equal(a, b) for a, b in zip(found, in_float(m, x)))


def crowded(groups: int, together: int, features: int = 96) -> Mixture:
    """Groups of components that are next to each other, one after the other."""
    m = mixture(groups, features, 4, spread=3.0)
    m = Mixture(*(t.repeat_interleave(together, 0) for t in m[:2]), m.noise_variance, m[3].repeat_interleave(together))
    jitter = torch.randn(m.means.shape, generator=torch.Generator().manual_seed(2))
    return m._replace(means=m.means + 0.02 * jitter, log_weights=m.log_weights.log_softmax(0))


def test_diffuse_tokens_among_others_take_it_alone():
    """A token of the crowd has 150 components to itself, of which 37 may be its candidates."""
    one_hot, crowd = mixture(150, 96, 4, spread=3.0), crowded(1, 150)
    crowd.means.neg_()  # away from the others, one of which it was made of
    m = Mixture(
        *(torch.cat(pair) for pair in zip(one_hot[:2], crowd[:2])), one_hot.noise_variance,
        torch.cat([one_hot.log_weights, crowd.log_weights]).log_softmax(0),
    )  # fmt: skip
    x = tokens(one_hot, 1000)
    x[1::5] = tokens(crowd._replace(noise_variance=one_hot.noise_variance), 200)
    found, whole = prepared(m)(x)
    assert whole == 200
    torch.testing.assert_close(found.log_prob.double(), m.log_prob_fp64(x), rtol=1e-5, atol=0)
    assert (found.counts[1::5] == 17).all()


def test_few_tokens_take_the_scan_in_float():
    m, x = drawn(255, 30, 40, 3)
    found, whole = prepared(m)(x)
    assert whole == 255
    assert all(torch.equal(a, b) for a, b in zip(found, in_float(m, x)))


def test_overflowing_tokens_sum_all_that_is_active():
    m = crowded(80, 5)
    x = tokens(m, 400)
    found, whole = prepared(m, 2)(x)
    assert whole == 0
    assert (found.counts == 3).all()
    torch.testing.assert_close(found.log_prob.double(), m.log_prob_fp64(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(700, 200, 64, 5), (300, 400, 40, 10)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape):
    m, x = drawn(*shape, spread=1.0)
    scan = prepared(m)

    def run() -> list[Tensor]:
        found, whole = scan(x)
        return [*found, torch.tensor(whole), *int8_rows(m.woodbury(m.means.mean(0)))]

    same_bits(run, (1, 2, 3))


def test_tokens_that_are_not_finite_are_nan_alone():
    m = mixture(130, 64, 3, spread=3.0)
    x, scan = tokens(m, 300), prepared(m)
    clean, _ = scan(x)
    x[3, 5], x[40, 0], x[299, 7] = torch.nan, torch.inf, -torch.inf
    bad = ~x.isfinite().all(-1)
    found, whole = scan(x)
    assert whole == 3
    assert found.log_prob[bad].isnan().all()
    assert torch.equal(found.log_prob[~bad], clean.log_prob[~bad])
    assert torch.equal(found.components[~bad], clean.components[~bad])


def test_components_of_no_weight_and_a_component_that_is_not_finite():
    m = mixture(130, 64, 3, spread=3.0)
    m.log_weights[::2] = -torch.inf
    x = tokens(m, 300)
    found, _ = prepared(m)(x)
    torch.testing.assert_close(found.log_prob.double(), m.log_prob_fp64(x), rtol=1e-6, atol=0)
    for field, value in (("means", torch.nan), ("loadings", torch.inf), ("noise_variance", torch.nan)):
        own = m._replace(**{field: getattr(m, field).clone()})
        getattr(own, field)[1] = value
        assert prepared(own)(x)[0].log_prob.isnan().all(), field


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e17])
def test_parameters_of_any_size(scale):
    """Squares of rows and of tokens underflow, or overflow."""
    m, x = drawn(300, 40, 48, 3, spread=3.0)
    scaled = Mixture(m.means * scale, m.loadings * scale, m.noise_variance, m.log_weights)
    x = x * scale
    found, _ = prepared(scaled)(x)
    wanted = in_float(scaled, x)
    assert torch.equal(found.log_prob.isfinite(), wanted.log_prob.isfinite())
    finite = wanted.log_prob.isfinite()
    torch.testing.assert_close(found.log_prob[finite], wanted.log_prob[finite], rtol=1e-5, atol=1e-4)


def test_log_prob_uses_it_where_it_pays(monkeypatch):
    m, x = drawn(300, 40, 48, 3, spread=3.0)
    seen = []
    real = int8.scan
    monkeypatch.setattr(int8, "scan", lambda *given: seen.append(given) or real(*given))
    found = m.active(x, center=m.means.mean(0))
    assert len(seen) == int(cpp.library().multiplies_int8)
    torch.testing.assert_close(found.log_prob.double(), m.log_prob_fp64(x), rtol=1e-5, atol=0)


def test_where_it_does_not_pay():
    assert not pays(mixture(3, 8, 0).woodbury())
    assert not pays(mixture(3, 8, 2).to(torch.float64).woodbury())
    assert pays(mixture(3, 8, 2).woodbury()) == cpp.library().multiplies_int8
    assert mixture(3, 8, 0).woodbury().int8[0].numel() == 0


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_allocated_terms_have_the_sizes_of_computed_ones(per_component):
    woodbury = mixture(5, 37, 3, per_component=per_component).woodbury()
    for room, rows in zip(allocate(woodbury), int8_rows(woodbury), strict=True):
        assert (room.shape, room.dtype) == (rows.shape, rows.dtype)


def test_gradients_are_those_of_the_scan_in_float():
    m, x = drawn(300, 40, 48, 3, spread=1.0)
    gradients = []
    for rows in (int8_rows(m.woodbury(m.means.mean(0))), ()):
        leaves = [t.clone().requires_grad_() for t in (x, *m)]
        woodbury = m.woodbury(m.means.mean(0))
        object.__setattr__(woodbury, "int8", tuple(rows))
        ops.log_prob(*leaves, woodbury).log_prob.sin().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().amax().item())


def test_errors_name_the_argument():
    m, x = drawn(300, 20, 48, 3)
    woodbury = m.woodbury()
    rows = int8_rows(woodbury)
    given = [x, *m, *woodbury.tensors(), 16, True, *[None] * 7]
    with pytest.raises(TypeError, match="rows8 must be int8 of shape"):
        torch.ops.mfa_kernels.log_prob(*given, rows.rows.int(), *rows[1:])
    with pytest.raises(ValueError, match=r"terms8 must be float32 of shape \(20, 11\)"):
        torch.ops.mfa_kernels.log_prob(*given, *rows[:3], rows.terms[:, :-1], rows.scale)
    wide = mixture(1, 40016, 1).woodbury()
    with pytest.raises(ValueError, match="int8_rows: D must be at most 40000, got 40016"):
        int8_rows(wide)
    assert math.isfinite(m.active(x).log_prob.sum().item())

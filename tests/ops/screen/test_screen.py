"""Screening: bounds never violated, results those of the dense scan, fallbacks seen by the caller."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.screen import differentiable, op, reference
from mfa_kernels.ops.screen.cost import PAIR_COST, STAGE_COST, bytes_read, modelled_cost
from mfa_kernels.ops.screen.rounding import stage_0_rounding
from mfa_kernels.ops.screen.types import AnyScreen, Screen, ScreenedPairs
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury, unpack_rows
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, adversarial, drawn, mixture, tokens
from tests.helpers.threads import same_bits
from tests.ops.scan.test_scan import check_slots

pytestmark = pytest.mark.usefixtures("needs_cpp")

# (N, K, D, p, R): a path of its own for up to 4 tokens, panels of up to 32, stretches of 256, flushes every 64 features
# (of D and of p), passes of 12 rows, pairs in groups of eight and tasks of 8 to 64: three of each and a
# ragged tail.
SHAPES = [
    (1, 70, 40, 16, 3),
    (2, 131, 71, 16, 3),
    (3, 70, 40, 32, 10),
    (4, 200, 90, 48, 13),
    (8, 70, 40, 32, 10),
    (101, 37, 71, 16, 1),
    (101, 66, 71, 48, 2),
    (40, 131, 50, 16, 0),
    (70, 35, 391, 208, 5),
    (40, 67, 64, 32, 13),
    (900, 97, 45, 16, 4),
]


def prepared(
    m: Mixture, features: int | None = 16, slots: int = 16, threshold: float | None = None, basis: Tensor | None = None
) -> Callable[[Tensor], ScreenedPairs]:
    """A scan with one screen: the coordinates come from a BLAS, whose bits may depend on the number of threads."""
    woodbury = m.woodbury(m.means.mean(0))
    wanted = activity_threshold(len(m.means), m.means.dtype) if threshold is None else threshold
    screen, constants = op.screen(m, woodbury, features, basis), woodbury.constants(m.log_weights)
    return lambda x: op.scan(x, woodbury, constants, screen, wanted, slots)


def screened(m: Mixture, x: Tensor, features: int | None = 16, slots: int = 16, **options) -> ScreenedPairs:
    return prepared(m, features, slots, **options)(x)


def flat(found: ScreenedPairs) -> list[Tensor]:
    """Its tensors: the active pairs, what was dropped, how many were evaluated."""
    return [*found.active, *found[1:]]


def gradients(m: Mixture, x: Tensor, woodbury: Woodbury, screen: AnyScreen | None) -> list[Tensor]:
    """Of a function of log p(x), by a screen or by the dense scan."""
    leaves = [t.clone().requires_grad_() for t in (x, *m)]
    if screen is None:
        log_prob = Mixture(*leaves[1:]).active(leaves[0], center=woodbury.center).log_prob
    else:
        log_prob = differentiable.log_prob(leaves[0], leaves[1:], woodbury, screen, 16).active.log_prob
    return list(torch.autograd.grad(log_prob.sin().sum(), leaves))


def bounds(m: Mixture, x: Tensor, features: int | None = 16, slack: bool = True) -> Tensor:
    woodbury = m.woodbury(m.means.mean(0))
    screen = op.screen(m, woodbury, features)
    if not slack:
        screen = screen._replace(slack=torch.zeros_like(screen.slack))
    return op.bounds(x, woodbury, woodbury.constants(m.log_weights), screen)


def orthonormal(features: int, kept: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(features, kept, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("spread", [3.0, 0.05], ids=["one_hot", "diffuse"])
def test_the_marginal_bounds_the_whole(rank, spread):
    m, x = drawn(100, 40, 30, rank, spread=spread, dtype=torch.float64)
    logits = m.logits_fp64(x)
    previous = torch.full_like(logits, torch.inf)
    for kept in (1, 9, 20, 30):
        upper = reference.bounds(x, *m, orthonormal(30, 30)[:, :kept])
        assert (upper >= logits - 1e-9).all()
        assert (upper <= previous + 1e-9).all()  # more coordinates, tighter bounds
        previous = upper
    torch.testing.assert_close(previous, logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [3.0, 0.05], ids=["one_hot", "diffuse"])
@pytest.mark.usefixtures("poisoned")
def test_log_prob_and_pairs_in_fp64(shape, spread):
    n, k, d, p, r = shape
    m, x = drawn(n, k, d, r, spread=spread, dtype=torch.float64)
    found = screened(m, x, p, slots=8)
    check_in_fp64(found, m.logits_fp64(x), 8)
    assert (found.dropped <= torch.finfo(x.dtype).eps).all()


def check_in_fp64(found: ScreenedPairs, logits: Tensor, slots: int) -> None:
    """Pairs in float64 are those of the formula; and the counts make sense."""
    torch.testing.assert_close(found.active.log_prob, torch.logsumexp(logits, -1), rtol=1e-12, atol=1e-10)
    check_slots(found.active, logits, slots, 1e-9)
    check_counts(found, logits.shape[1])


def check_counts(found: ScreenedPairs, components: int) -> None:
    assert ((found.evaluated >= 1) | (found.evaluated == -1)).all()
    assert (found.evaluated <= components).all()
    assert (found.dropped >= 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_computed_bounds_are_the_formula_and_its_slack(shape):
    n, k, d, p, r = shape
    m, x = drawn(n, k, d, r, dtype=torch.float64)
    woodbury = m.woodbury(m.means.mean(0))
    screen = op.screen(m, woodbury, p)
    upper = op.bounds(x, woodbury, woodbury.constants(m.log_weights), screen)
    wanted = reference.bounds(x, *m, screen.basis)
    assert (upper >= wanted).all()
    torch.testing.assert_close(upper, wanted, rtol=0, atol=1e-6)


CASES = [
    "plain", "near_duplicates", "huge_norms", "rank_deficient", "small_noise", "uneven_noise", "far_regions",
    "outlier_dimensions",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("features", [16, 80, 144])
def test_no_bound_is_violated(case, features):
    m, x = adversarial(case)
    assert (bounds(m, x, features).double() >= m.logits_fp64(x)).all()


def test_rounding_does_break_bounds_that_have_no_slack():
    """What the slack is for: with p = D the bound is the logit, and float32 is on either side of it."""
    m, x = adversarial("plain")
    assert (bounds(m, x, 144, slack=False).double() < m.logits_fp64(x) - 1e-6).any()


@pytest.mark.parametrize("case", CASES)
def test_adversarial_results_are_those_of_the_dense_scan(case):
    m, x = adversarial(case)
    woodbury = m.woodbury(m.means.mean(0))
    threshold = activity_threshold(len(m.means), x.dtype)
    dense = cpp.library().scan(
        x, woodbury.rows, woodbury.constants(m.log_weights), woodbury.scale, False, threshold, 16, False
    )
    found = screened(m, x, 48).active
    truth, terms = m.logits_fp64(x), Terms(m, x)
    for log_prob in (found.log_prob, dense[0]):  # both round the same formula, in another order
        budgets.check(log_prob, truth.logsumexp(-1), terms.log_prob(truth))


@pytest.mark.parametrize("shape", [(70, 150, 384, 48, 10), (70, 67, 768, 96, 10)], ids=str)
def test_fp32_error_is_a_few_roundings_of_the_terms(shape):
    n, k, d, p, r = shape
    m, x = drawn(n, k, d, r, spread=2.0)
    truth = m.logits_fp64(x)
    found = screened(m, x, p)
    assert (found.evaluated > 0).any()
    budgets.check(found.active.log_prob, truth.logsumexp(-1), Terms(m, x).log_prob(truth))


@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_what_is_dropped_weighs_no_more_than_certified(threshold):
    """A low threshold makes the dropped mass visible: those with the smallest bounds were dropped."""
    m, x = drawn(600, 90, 48, 3, spread=0.5)
    found = screened(m, x, 32, threshold=threshold)
    upper = bounds(m, x, 32)
    screened_tokens = found.evaluated >= 0
    rank = upper.argsort(-1, descending=True).argsort(-1)
    never = rank >= found.evaluated.unsqueeze(-1)
    mass = (m.logits_fp64(x).softmax(-1) * never).sum(-1)
    assert (mass[screened_tokens] > 1e-3).any()
    assert (mass <= found.dropped)[screened_tokens].all()
    assert (found.dropped <= 90 * math.exp(-threshold) * (1 + 1e-4)).all()


def test_one_hot_tokens_are_screened_and_few_components_computed():
    m = mixture(300, 96, 4, spread=3.0)
    found = screened(m, tokens(m, 500), 32)
    assert (found.evaluated > 0).all()
    assert found.evaluated.double().mean() < 3


def test_diffuse_tokens_take_the_dense_scan_alone():
    """Tokens half-way between all components, among others."""
    m, x = drawn(600, 300, 96, 4, spread=3.0)
    x[1::5] = 0.02 * x[1::5] + m.means.mean(0)
    found = screened(m, x, 16)
    diffuse = found.evaluated < 0
    assert diffuse[1::5].all()
    assert not diffuse.all()
    truth = m.logits_fp64(x).logsumexp(-1)
    torch.testing.assert_close(found.active.log_prob.double(), truth, rtol=1e-5, atol=0)
    assert (found.dropped[diffuse] == 0).all()


def test_gives_up_where_most_tokens_are_diffuse():
    """Tokens after a diffuse pilot take the dense scan, although their bounds would have decided."""
    m, x = drawn(1000, 300, 96, 4, spread=3.0)
    x[:600] = 0.02 * x[:600] + m.means.mean(0)
    assert (screened(m, x[600:], 32).evaluated > 0).all()
    found = screened(m, x, 32)
    assert (found.evaluated == -1).all()
    assert (found.dropped == 0).all()
    torch.testing.assert_close(found.active.log_prob.double(), m.log_prob_fp64(x), rtol=1e-5, atol=0)


def check_that_tokens_are_nan_alone(scan: Callable[[Tensor], ScreenedPairs], x: Tensor) -> None:
    """Where two of the tokens are not finite, the others are what they were."""
    bad = torch.zeros(len(x), dtype=torch.bool)
    bad[[3, 40]] = True
    clean = scan(x).active
    x[3, 5], x[40, 0] = torch.nan, torch.inf
    found = scan(x).active
    assert found.log_prob[bad].isnan().all()
    assert torch.equal(found.log_prob[~bad], clean.log_prob[~bad])
    assert torch.equal(found.components[~bad], clean.components[~bad])


def test_tokens_that_are_not_finite_are_nan_alone():
    m = mixture(130, 64, 3)
    check_that_tokens_are_nan_alone(lambda x: screened(m, x), tokens(m, 70))


def test_components_of_no_weight_and_a_component_that_is_not_finite():
    m = mixture(130, 64, 3)
    m.log_weights[::2] = -torch.inf
    x = tokens(m, 70)
    found = screened(m, x).active
    torch.testing.assert_close(found.log_prob.double(), m.log_prob_fp64(x), rtol=1e-6, atol=0)
    m.means[1, 3] = torch.nan
    assert screened(m, x).active.log_prob.isnan().all()


def test_a_degenerate_component_is_always_computed_and_the_others_screened():
    found = check_a_degenerate_component_is_always_computed(lambda m, x: screened(m, x, 32))
    assert found.evaluated.double().mean() < 5


def degenerate(length: float) -> Mixture:
    """Component 7 has two loadings that are the same, and long."""
    m = mixture(130, 64, 3, spread=3.0)
    m.loadings[7, :, 1] = m.loadings[7, :, 0]
    m.loadings[7] *= length
    return m


def check_a_degenerate_component_is_always_computed(scan: Callable[[Mixture, Tensor], ScreenedPairs]) -> ScreenedPairs:
    m = degenerate(1e7)
    x = tokens(m, 200)
    x = x[x.abs().amax(-1) < 100]
    found = scan(m, x)
    assert (found.evaluated >= 2).all()
    torch.testing.assert_close(found.active.log_prob.double(), m.log_prob_fp64(x), rtol=1e-5, atol=0)
    return found


def test_two_runs_are_bitwise_equal():
    m, x = drawn(700, 200, 64, 5, spread=1.0)
    assert all(torch.equal(a, b) for a, b in zip(flat(screened(m, x)), flat(screened(m, x))))


def test_the_number_of_threads_changes_no_bit():
    m, x = drawn(700, 200, 64, 5, spread=1.0)
    scan = prepared(m, 32)
    *_, evaluated = same_bits(lambda: flat(scan(x)), (1, 2, 3))
    assert (evaluated > 0).any()


def test_any_basis_gives_the_same_results():
    m, x = drawn(300, 200, 64, 5, spread=2.0)
    chosen = screened(m, x, 32).active
    kept = screened(m, x, basis=orthonormal(64, 32).float()).active
    assert torch.equal(chosen.components, kept.components)
    torch.testing.assert_close(chosen.log_prob, kept.log_prob, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens_one_component_and_duplicates(dtype):
    check_one_component_and_duplicates(screened, dtype)


def check_one_component_and_duplicates(
    scan: Callable[[Mixture, Tensor], ScreenedPairs], dtype: torch.dtype
) -> ScreenedPairs:
    """Also of no tokens; returns what is found where there are two of the component."""
    m, x = drawn(5, 1, 32, 2, dtype=dtype)
    torch.testing.assert_close(scan(m, x[:0]).active.log_prob, x.new_empty(0))
    torch.testing.assert_close(scan(m, x).active.log_prob.double(), m.log_prob_fp64(x), rtol=1e-5, atol=0)
    twice = Mixture(*(torch.cat([t, t]) for t in m[:2]), m.noise_variance, torch.cat([m[3], m[3]]) - math.log(2))
    found = scan(twice, x)
    torch.testing.assert_close(found.active.log_prob, scan(m, x).active.log_prob)
    return found


def test_errors_name_the_argument():
    m = mixture(20, 64, 2)
    woodbury = m.woodbury()
    with pytest.raises(ValueError, match=r"features must be a multiple of 16 between 16 and D = 64, got 24"):
        op.screen(m, woodbury, 24)
    with pytest.raises(ValueError, match=r"between 16 and D = 64, got 80"):
        op.screen(m, woodbury, 80)
    with pytest.raises(ValueError, match=r"noise_variance must have shape \(D,\)"):
        op.screen(m._replace(noise_variance=m.noise_variance.expand(20, 64)), woodbury)
    with pytest.raises(ValueError, match=r"basis must have shape \(D, p\) = \(64, p\), got \(63, 32\)"):
        op.screen(m, woodbury, basis=orthonormal(63, 32))


def test_default_features():
    assert op.default_features(768) == 96
    assert op.default_features(64) == 48
    assert op.default_features(40) == 32


def chosen(m: Mixture, x: Tensor) -> Screen | None:
    return op.choose(x, m, m.woodbury(m.means.mean(0)))


def test_few_coordinates_are_chosen_where_they_decide_and_none_where_nothing_does():
    m = mixture(400, 128, 4, spread=15.0)
    screen = chosen(m, tokens(m, 200))
    assert screen is not None
    assert screen.basis.shape == (128, 16)
    closer = mixture(400, 128, 4, spread=1.3)
    screen = chosen(closer, tokens(closer, 200))
    assert screen is not None
    assert screen.basis.shape[1] > 16
    diffuse = mixture(400, 128, 4, spread=0.01)
    assert chosen(diffuse, tokens(diffuse, 200)) is None
    assert chosen(mixture(400, 24, 4), torch.zeros(10, 24)) is None
    per_component = mixture(400, 128, 4, per_component=True)
    assert chosen(per_component, tokens(per_component, 200)) is None


def test_lists_ask_for_more_coordinates_where_there_are_so_many():
    m = mixture(400, 160, 4, spread=15.0)
    x, woodbury = tokens(m, 200), m.woodbury(m.means.mean(0))
    assert op.choose(x, m, woodbury).basis.shape[1] == 16
    assert op.choose(x, m, woodbury, least=64).basis.shape[1] == 64
    assert op.choose(x, m, woodbury, least=96).basis.shape[1] == 16, "none that is at most half of the features"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    m = mixture(21, 40, 2, dtype=dtype)
    f = m.woodbury()
    s = op.screen(m, f, 32)
    torch.library.opcheck(
        torch.ops.mfa_kernels.select_screened.default,
        (tokens(m, 7), f.rows, f.constants(m.log_weights), f.scale, f.center, s.basis, s.rows, s.log_det, s.radii,
         s.slack, s.lines, s.line_terms, True, [], 0.0, s.exact_slack, 12.0, 4),
    )  # fmt: skip


def test_compiles_whole_and_takes_half_precision_tokens():
    m = mixture(90, 48, 3)
    x = tokens(m, 40).bfloat16()
    woodbury = m.woodbury()
    screen, constants = op.screen(m, woodbury, 32), woodbury.constants(m.log_weights)
    check_compiles_whole(lambda x: op.scan(x, woodbury, constants, screen, 20.0, 4), x)


def check_compiles_whole(scan: Callable[[Tensor], ScreenedPairs], x: Tensor) -> None:
    """To the same results, and to those of x in float32."""

    def found(x: Tensor) -> Tensor:
        selected = scan(x)
        return torch.cat([selected.active.log_prob, selected.dropped, selected.evaluated.float()])

    torch.compiler.reset()
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, found(x))
    assert torch.equal(compiled, found(x.float()))


# (K, D, p, R): tiles of up to 12 rows (several components, one, or parts of one) by up to 16 columns, 4 tiles at a
# time, features 128 at a time.
STAGE_0 = [(1, 16, 16, 0), (83, 40, 32, 1), (37, 391, 64, 3), (23, 300, 48, 10), (13, 144, 80, 11), (9, 150, 16, 40)]


def marginals(m: Mixture, features: int, basis: Tensor | None = None) -> tuple[Screen, tuple[Tensor, Tensor, Tensor]]:
    """The screen, and what it holds of the marginals by the plain formula in float64."""
    woodbury = m.woodbury(m.means.nanmean(0))
    screen = op.screen(m, woodbury, features, basis)
    rounding = stage_0_rounding(m.means.shape[1], m.loadings.shape[2], features)
    return screen, reference.marginals(*m[:3], woodbury, screen.basis, rounding)


@pytest.mark.parametrize("shape", STAGE_0, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poisoned")
def test_stage_0_is_the_plain_formula(shape, dtype):
    k, d, p, r = shape
    screen, (rows, radii, slack) = marginals(mixture(k, d, r, dtype=dtype), p)
    unit = torch.finfo(dtype).eps
    found = unpack_rows(screen.rows, p).double()
    torch.testing.assert_close(found, rows, rtol=unit, atol=1e-12)
    assert (screen.radii.double() >= radii).all()
    torch.testing.assert_close(screen.radii.double(), radii, rtol=8 * unit, atol=0)
    own = screen.slack.double() - screen.slack.double().min()
    torch.testing.assert_close(own, slack - slack.min(), rtol=1e-3, atol=4 * unit * screen.slack.max().item())


@pytest.mark.parametrize("case", ["rank_deficient", "far_regions", "small_noise", "huge_norms"])
def test_stage_0_of_adversarial_mixtures(case):
    m, _ = adversarial(case)
    screen, (rows, _, slack) = marginals(m, 80)
    assert torch.equal(screen.slack.isfinite(), slack.isfinite())
    assert slack.isfinite().any()
    known = slack.isfinite()
    found = unpack_rows(screen.rows, 80).double()[known]
    # Both round in float64, times tau; and the result is rounded once more.
    budget = slack[known][:, None, None].sqrt() + 1e-6 * (1 + rows[known].abs())
    assert ((found - rows[known]).abs() <= budget).all()
    if case == "rank_deficient":
        assert not known.all()


def test_stage_0_of_a_component_that_is_not_finite():
    m = mixture(30, 64, 3)
    m.loadings[4, 7, 1] = torch.nan
    m.loadings[9, 3, 0] = torch.inf
    m.means[11, 2] = torch.nan
    screen, _ = marginals(m, 32, orthonormal(64, 32))
    unknown = torch.zeros(30, dtype=torch.bool)
    unknown[[4, 9]] = True
    assert torch.equal(screen.slack.isinf(), unknown)
    assert unpack_rows(screen.rows, 32)[11, 0].isnan().all()
    assert unpack_rows(screen.rows, 32)[~unknown][:, 1:].isfinite().all()


def tensors(screen: Screen) -> list[Tensor]:
    return [t for t in screen if isinstance(t, Tensor)]


def test_stage_0_adds_columns_to_those_it_knows():
    m = mixture(53, 200, 5)
    woodbury = m.woodbury(m.means.mean(0))
    q = orthonormal(200, 64).float()
    whole, every = op._screen(Parameters(*m), woodbury, q, keep=True)
    _, first = op._screen(Parameters(*m), woodbury, q[:, :16].contiguous(), keep=True)
    second, both = op._screen(Parameters(*m), woodbury, q[:, :48].contiguous(), first, keep=True)
    third, nothing = op._screen(Parameters(*m), woodbury, q, both)
    assert nothing is None
    assert torch.equal(both, every[..., :48])
    assert all(torch.equal(a, b) for a, b in zip(tensors(third), tensors(whole)))
    alone, _ = op._screen(Parameters(*m), woodbury, q[:, :48].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(tensors(second), tensors(alone)))


def test_the_choice_does_not_depend_on_what_is_kept(monkeypatch):
    m, x = drawn(200, 400, 128, 4, spread=1.3)
    kept = chosen(m, x)
    monkeypatch.setattr(op, "_KNOWN", 400 * 5 * 16)
    again = chosen(m, x)
    assert kept is not None
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(tensors(kept), tensors(again)))


def test_the_tail_of_a_batch_does_not_depend_on_the_threads():
    """129 tokens after the pilot: 4 stretches of 32 and one token, or fewer stretches and no token alone."""
    m, x = drawn(128 + 129, 200, 64, 5, spread=0.7)
    scan = prepared(m, 48)
    *_, evaluated = same_bits(lambda: flat(scan(x)), (1, 4, 5))
    assert (evaluated[128:] > 0).any()


def test_a_screen_of_parameters_that_moved_keeps_its_coordinates_and_its_bounds():
    m = mixture(120, 96, 4, spread=2.0)
    before = op.screen(m, m.woodbury(), 32)
    generator = torch.Generator().manual_seed(7)
    moved = Mixture(*(t + 0.05 * torch.randn(t.shape, generator=generator).abs() for t in m))
    x, woodbury = tokens(moved, 150), moved.woodbury()
    screen = op.refresh(before, moved, woodbury)
    assert torch.equal(screen.basis, before.basis)
    assert not torch.equal(screen.rows, before.rows)
    truth = moved.logits_fp64(x)
    assert (op.bounds(x, woodbury, woodbury.constants(moved.log_weights), screen).double() >= truth).all()
    found = op.scan(x, woodbury, woodbury.constants(moved.log_weights), screen, 30.0, 16)
    assert (found.evaluated > 0).any()
    torch.testing.assert_close(found.active.log_prob.double(), truth.logsumexp(-1), rtol=1e-6, atol=0)


def test_the_modelled_cost_counts_stage_0_where_a_step_pays_for_it():
    one_hot, diffuse = torch.ones(8, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
    sizes = {"components": 4096, "features": 768, "rank": 10, "kept": 64}
    lasting = modelled_cost(one_hot, **sizes)
    assert lasting == pytest.approx(64 / 768 + 64 / (4096 * 13) + PAIR_COST / 4096)
    once, each = STAGE_COST
    assert modelled_cost(one_hot, **sizes, tokens=1024) == pytest.approx(lasting + once / 1024 + each / 16)
    assert modelled_cost(one_hot, **sizes, tokens=32) > 1
    assert modelled_cost(diffuse, **sizes) > 1
    half = torch.cat([one_hot, diffuse])
    assert modelled_cost(half, **sizes) == pytest.approx((lasting + modelled_cost(diffuse, **sizes)) / 2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_read_by_one_token(dtype):
    k, d, p, r = 90, 64, 16, 3
    m = mixture(k, d, r, dtype=dtype)
    woodbury = m.woodbury()
    read = bytes_read(torch.tensor([1, 5, -1], dtype=torch.int32), woodbury, op.screen(m, woodbury, p))
    bounds = d * p + k * p * (r + 1) + 4 * k + 2 * d
    assert read.tolist() == [dtype.itemsize * (bounds + pairs * d * (r + 1)) for pairs in (1, 5, k)]


def test_a_few_tokens_that_are_not_finite_are_nan_alone():
    m, x = drawn(3, 130, 64, 3)
    clean = screened(m, x).active.log_prob
    x[1, 5] = torch.nan
    found = screened(m, x).active.log_prob
    assert found[1].isnan()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [1, 3])
def test_no_bound_of_a_few_tokens_is_violated(case, count):
    m, x = adversarial(case)
    woodbury = m.woodbury(m.means.mean(0))
    screen, constants = op.screen(m, woodbury, 80), woodbury.constants(m.log_weights)
    for first in (0, 120, 210, 240, 260, 290):
        few = x[first : first + count]
        upper = op.bounds(few.contiguous(), woodbury, constants, screen).double()
        assert (upper >= m.logits_fp64(few)).all()

"""Screening: bounds never violated, results those of the dense scan, fallbacks seen by the caller."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.screen import differentiable, op, reference, stage_0
from mfa_kernels.ops.screen.cost import GPU_PAIR_COST, PAIR_COST, STAGE_COST, bytes_read, modelled_cost
from mfa_kernels.ops.screen.types import AnyScreen, Screen, ScreenedPairs
from mfa_kernels.ops.woodbury.types import Woodbury
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, adversarial, drawn, mixture, tokens
from tests.helpers.threads import same_bits
from tests.ops.scan.test_scan import check_slots

pytestmark = pytest.mark.usefixtures("needs_cpp")

# (N, K, D, p, R): a path of its own for up to 4 tokens, panels of up to 32, 128 tokens that decide and stretches of up
# to 512, chunks of 480 components and tiles of 6, blocks of 64 features (of D and of p), passes of 12 rows (16 of a
# few tokens, and flushes every 1024 features), pairs in groups of eight and tasks of 8 to 64: three of each and a tail
# that is ragged.
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
    (1500, 1001, 70, 32, 2),
    (40, 67, 64, 32, 29),
    (3, 50, 70, 32, 37),
    (2, 24, 3300, 48, 2),
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


def bounds(m: Mixture, x: Tensor, features: int | None = 16) -> Tensor:
    woodbury = m.woodbury(m.means.mean(0))
    screen = op.screen(m, woodbury, features)
    return op.bounds(x, woodbury, woodbury.constants(m.log_weights), screen)


def term(screen: Screen, name: str) -> Tensor:
    """One of the terms after the scales and offsets of the rows, (K,), in the order of csrc/cpu/screen/screen.h."""
    names = [
        "quantum",
        "size",
        "rest",
        "mean",
        "lost",
        "rows",
        "lost_rows",
        "offset",
        "radius",
        "slack",
        "raise",
        "half",
        "share",
    ]
    rank = screen.starts.shape[1] - 1
    return screen.terms[:, 2 * rank + names.index(name)].double()


def dequantised(screen: Screen, features: int) -> tuple[Tensor, Tensor]:
    """w^ (K, D) and T^ (K, R, p), as the integers and their scales say; float64."""
    count, rank = screen.starts.shape[0], screen.starts.shape[1] - 1
    kept, first = screen.basis.shape[1], -(-features // 64)
    w = screen.rows[:, :first].flatten(1)[:, :features].double() * term(screen, "quantum").unsqueeze(-1)
    t = screen.rows[:, first:].reshape(count, -(-kept // 64), rank, 64).transpose(1, 2).flatten(2)[..., :kept]
    return w, t.double() * screen.terms[:, :rank, None].double()


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


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("spread", [3.0, 0.05], ids=["one_hot", "diffuse"])
def test_the_length_of_the_rest_bounds_the_whole(rank, spread):
    """For any nu above the rest's; with all coordinates it is the logit."""
    m, x = drawn(100, 40, 30, rank, spread=spread, dtype=torch.float64)
    logits = m.logits_fp64(x)
    for kept, nu in ((1, 1.01), (9, 1.5), (20, 1.0001), (30, 1e-3)):
        upper = reference.rest_bounds(x, *m, orthonormal(30, 30)[:, :kept], torch.full((40,), nu, dtype=torch.float64))
        assert (upper >= logits - 1e-8).all()
    torch.testing.assert_close(upper, logits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poisoned")
def test_computed_bounds_are_the_formula_and_what_rounding_does(shape, dtype):
    """Not below the formula in float64, and above it by no more than the lengths of what int8 loses."""
    n, k, d, p, r = shape
    m, x = drawn(min(n, 200), k, d, r, dtype=dtype)
    woodbury = m.woodbury(m.means.mean(0))
    screen = op.screen(m, woodbury, p)
    upper = op.bounds(x, woodbury, woodbury.constants(m.log_weights), screen).double()
    wide, wide_x = Mixture(*(t.double() for t in m)), x.double()
    q = torch.linalg.qr(screen.basis.double())[0]
    wanted = reference.rest_bounds(wide_x, *wide, q, 1 - term(screen, "rest") + 1e-5)
    assert (upper >= wanted - 1e-2).all()
    y = (wide_x - screen.center.double()) * wide.noise_variance.rsqrt()
    z = y @ screen.basis.double()
    step = 1 / (63 if cpp.library().int8_offset == 64 else 127)
    lost, lost_inside = (t.abs().amax(-1, keepdim=True) * step * t.shape[1] ** 0.5 for t in (y, z))
    t_off = term(screen, "rows") * lost_inside + term(screen, "lost_rows") * z.norm(dim=-1, keepdim=True) * 1.1
    length = (z.norm(dim=-1, keepdim=True) + term(screen, "radius")) * term(screen, "rows")
    width = term(screen, "mean") * lost + 1.1 * term(screen, "lost") * y.norm(dim=-1, keepdim=True)
    width = width + t_off * (length + t_off)
    assert (upper <= wanted + width + 1e-3 * (1 + wanted.abs())).all()


CASES = [
    "plain", "near_duplicates", "huge_norms", "rank_deficient", "small_noise", "uneven_noise", "far_regions",
    "outlier_dimensions",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("features", [16, 80, 144])
def test_no_bound_is_violated(case, features):
    m, x = adversarial(case)
    assert (bounds(m, x, features).double() >= m.logits_fp64(x)).all()


@pytest.mark.parametrize("name", ["lost", "lost_rows"])
def test_bounds_without_what_rows_lose_are_broken(name):
    """What is lost is no more than what has to be: rows that lose what points along a token, and tokens that lose
    nothing, being integers."""
    features, kept = 64, 64
    m = mixture(40, features, 1, dtype=torch.float64)._replace(noise_variance=torch.ones(features, dtype=torch.float64))
    generator = torch.Generator().manual_seed(3)
    if name == "lost":
        m.loadings.zero_()
        m.means.copy_(torch.randn(40, features, generator=generator).double())
        m.means[:20] *= 3
    else:
        m.means.zero_()
        m.loadings.copy_(torch.randn(40, features, 1, generator=generator).double() * 100)
    woodbury = m.woodbury(torch.zeros(features, dtype=torch.float64))
    screen = op.screen(m, woodbury, basis=torch.eye(features, kept))
    w, t = dequantised(screen, features)
    if name == "lost":
        lost = (m.means - screen.center) - w
        x = screen.center + lost.sign()
    else:
        b = m.loadings[..., 0] / (1 + m.loadings[..., 0].square().sum(-1, keepdim=True)).sqrt()
        lost = b - t[:, 0] * (b.unsqueeze(1) @ t.mT).sign()[:, :, 0]
        x = 127 * lost.sign()
    upper = op.bounds(x, woodbury, woodbury.constants(m.log_weights), screen)
    logits = m.logits_fp64(x)
    assert (upper >= logits).all()
    names = {"lost": 4, "lost_rows": 6}
    screen.terms[:, 2 + names[name]] = 0
    assert (op.bounds(x, woodbury, woodbury.constants(m.log_weights), screen) < logits).any()


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
    assert screened_tokens.any()
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


@pytest.mark.usefixtures("needs_screens")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    m = mixture(21, 40, 2, dtype=dtype)
    f = m.woodbury()
    s = op.screen(m, f, 32)
    torch.library.opcheck(
        torch.ops.mfa_kernels.select_screened.default,
        (tokens(m, 7), f.rows, f.constants(m.log_weights), f.scale, *s, 12.0, 4),
    )


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


# (K, D, p, R): one block of features or several, no rows, one, and more than there are coordinates.
STAGE_0 = [(1, 16, 16, 0), (83, 40, 32, 1), (37, 391, 64, 3), (23, 300, 48, 10), (13, 144, 80, 11), (9, 150, 16, 40)]


@pytest.mark.parametrize("shape", STAGE_0, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stage_0_is_the_plain_formula(shape, dtype, monkeypatch):
    """The rows, to half of a quantum, and the lengths of what they are and of what they lose."""
    k, d, p, r = shape
    monkeypatch.setattr(stage_0, "_CHUNK", 5 * d * (r + 1))  # several chunks
    m = mixture(k, d, r, dtype=dtype)
    screen = op.screen(m, m.woodbury(), p)
    q, scale = screen.basis.double(), m.noise_variance.double().rsqrt()
    means = (m.means.double() - screen.center.double()) * scale
    loadings = (m.loadings.double() * scale.unsqueeze(-1)).mT
    nu, inside = 1 - term(screen, "rest"), means @ q
    w, t = dequantised(screen, d)
    wanted = means - nu.unsqueeze(-1) * (means - inside @ q.mT)
    assert ((w - wanted).abs() <= (0.5 + 1e-4) * term(screen, "quantum").unsqueeze(-1)).all()
    torch.testing.assert_close(term(screen, "lost"), (w - wanted).norm(dim=-1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(term(screen, "mean"), wanted.norm(dim=-1), rtol=1e-5, atol=0)
    identity = torch.eye(r, dtype=torch.float64)
    a = torch.linalg.solve_triangular(torch.linalg.cholesky(loadings @ loadings.mT + identity), loadings, upper=False)
    b = a @ q
    rest = a @ a.mT - b @ b.mT
    if r:
        assert (nu > torch.linalg.eigvalsh(rest)[:, -1]).all()
        factor = torch.linalg.cholesky(identity - rest / nu[:, None, None])
        rows = torch.linalg.solve_triangular(factor, b, upper=False)
        size = rows.norm(dim=(1, 2))
        assert ((t - rows).norm(dim=(1, 2)) <= 0.03 * size + 1e-3).all()
        assert (term(screen, "rows") >= 0.999 * torch.linalg.matrix_norm(rows, 2)).all()
        assert (term(screen, "rows") <= 1.01 * torch.linalg.matrix_norm(rows, 2) + 1e-3).all()
    assert (term(screen, "radius") >= means.norm(dim=-1)).all()
    sums = torch.cat([screen.rows[:, : -(-d // 64)].sum((1, 2)).unsqueeze(-1)], -1)
    assert torch.equal(screen.starts[:, :1], (-cpp.library().int8_offset * sums).int())


@pytest.mark.parametrize("case", ["rank_deficient", "far_regions", "small_noise", "huge_norms"])
def test_stage_0_of_adversarial_mixtures(case):
    m, _ = adversarial(case)
    screen = op.screen(m, m.woodbury(m.means.mean(0)), 80)
    slack = term(screen, "slack")
    assert slack.isfinite().any()
    assert screen.terms[slack.isfinite()].isfinite().all()
    if case == "rank_deficient":
        assert not slack.isfinite().all()


def test_stage_0_of_a_component_that_is_not_finite():
    m = mixture(30, 64, 3)
    m.loadings[4, 7, 1] = torch.nan
    m.loadings[9, 3, 0] = torch.inf
    m.means[11, 2] = torch.nan
    screen = op.screen(m, m.woodbury(m.means.nanmean(0)), basis=orthonormal(64, 32))
    unknown = torch.zeros(30, dtype=torch.bool)
    unknown[[4, 9, 11]] = True
    assert torch.equal(term(screen, "slack").isinf(), unknown)
    assert screen.terms[~unknown].isfinite().all()
    assert screen.center.isfinite().all()


def test_bounds_are_tight_wherever_the_mixture_lies():
    """Tokens are measured from the middle of the components, not from the center that a mixture happens to have."""
    m, x = drawn(200, 120, 96, 4, spread=2.0)
    far = m._replace(means=m.means + 100)
    near, off = (screened(t, y, 32).evaluated for t, y in ((m, x), (far, x + 100)))
    woodbury = far.woodbury(torch.zeros(96))
    screen = op.screen(far, woodbury, 32)
    found = op.scan(x + 100, woodbury, woodbury.constants(far.log_weights), screen, 20.0, 16).evaluated
    assert (near > 0).all()
    assert off.double().mean() < 1.5 * near.double().mean()
    assert found.double().mean() < 1.5 * near.double().mean()


@pytest.mark.usefixtures("needs_screens")
def test_the_choice_is_made_on_some_of_many_components(monkeypatch):
    m, x = drawn(200, 400, 128, 4, spread=1.3)
    whole = chosen(m, x)
    monkeypatch.setattr(op, "_COUNTED", 100)
    some = chosen(m, x)
    assert whole is not None
    assert some is not None
    assert len(some.rows) == 400
    assert abs(op.WIDTHS.index(whole.basis.shape[1]) - op.WIDTHS.index(some.basis.shape[1])) <= 1


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
    bound = (768 + 10 * 64) / (768 * 13 * cpp.library().int8_rate)
    assert lasting == pytest.approx(bound + 64 / (4096 * 13) + PAIR_COST / 4096)
    once, each = STAGE_COST
    assert modelled_cost(one_hot, **sizes, tokens=1024) == pytest.approx(lasting + once / 1024 + each / 16)
    assert modelled_cost(diffuse, **sizes) > 1
    half = torch.cat([one_hot, diffuse])
    assert modelled_cost(half, **sizes) == pytest.approx((lasting + modelled_cost(diffuse, **sizes)) / 2, rel=1e-12)
    on_gpu = modelled_cost(one_hot, **sizes, on_cpu=False)
    assert on_gpu == pytest.approx(64 / 768 + 64 / (4096 * 13) + GPU_PAIR_COST / 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_read_by_one_token(dtype):
    k, d, p, r = 90, 64, 16, 3
    m = mixture(k, d, r, dtype=dtype)
    woodbury = m.woodbury()
    read = bytes_read(torch.tensor([1, 5, -1], dtype=torch.int32), woodbury, op.screen(m, woodbury, p))
    bounds = 4 * d * p + k * (64 + r * 64) + 4 * k * (r + 1 + 2 * r + 13) + dtype.itemsize * (k + 2 * d)
    assert read.tolist() == [bounds + dtype.itemsize * pairs * d * (r + 1) for pairs in (1, 5, k)]


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

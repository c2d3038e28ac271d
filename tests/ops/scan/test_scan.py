from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mfa_kernels import ops
from mfa_kernels.ops.scan import reference
from mfa_kernels.ops.scan.types import activity_threshold
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, drawn, mixture, tokens

# (N, K, D, R). Up to 4 tokens take a path of their own. Panels hold up to 32 tokens (fp32) and 16 (fp64), features go
# in blocks of up to 16 and are flushed every 64, ranks above 12 take several passes: every one of these axes crosses
# three tiles with a ragged tail.
SHAPES = [
    (1, 1, 1, 1),
    (1, 70, 33, 10),
    (3, 5, 16, 0),
    (3, 35, 33, 7),
    (4, 70, 50, 10),
    (33, 1, 40, 3),
    (101, 37, 71, 1),
    (101, 66, 71, 2),
    (70, 35, 391, 5),
    (109, 131, 50, 10),
    (101, 9, 300, 12),
    (40, 7, 64, 13),
    (35, 5, 61, 40),
    (2100, 67, 20, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("spread", [3.0, 0.05], ids=["one_hot", "diffuse"])
@pytest.mark.usefixtures("poisoned")
def test_log_prob_and_pairs_in_fp64(backend, shape, per_component, spread):
    m, x = drawn(*shape, per_component=per_component, spread=spread, dtype=torch.float64)
    active = m.active(x, slots=8, center=m.means.mean(0))
    logits = m.logits_fp64(x)
    torch.testing.assert_close(active.log_prob, torch.logsumexp(logits, -1), rtol=1e-12, atol=1e-10)
    check_slots(active, logits, 8, 1e-9)


def check_slots(active: ops.ActivePairs, logits: torch.Tensor, slots: int, tolerance: float) -> None:
    """Slots hold the largest logits, in order; all that is left out is below the threshold or counted as overflow."""
    threshold = activity_threshold(logits.shape[1], active.logits.dtype)
    best = logits.amax(-1, keepdim=True)
    surely, possibly = (logits > best - threshold + tolerance).sum(-1), (logits > best - threshold - tolerance).sum(-1)
    counts = active.counts.long()
    assert (counts >= surely.clamp_max(slots + 1)).all()
    assert (counts <= possibly.clamp_max(slots + 1)).all()
    held = active.components >= 0
    assert torch.equal(held.sum(-1), counts.clamp_max(slots))
    assert (active.logits.masked_select(~held) == -math.inf).all()
    wanted = logits.gather(1, active.components.long().clamp_min(0)).to(active.logits.dtype)
    torch.testing.assert_close(active.logits[held], wanted[held], rtol=tolerance, atol=tolerance)
    top = logits.topk(min(slots, logits.shape[1]), -1).values.to(active.logits.dtype)
    short = active.logits[:, : top.shape[1]]
    held = held[:, : top.shape[1]]
    torch.testing.assert_close(short[held], top[held], rtol=tolerance, atol=tolerance)
    # No component twice.
    ordered = active.components.sort(-1).values
    assert not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


def test_agrees_with_torch_distributions(backend):
    for per_component in (False, True):
        m, x = drawn(50, 40, 30, 4, per_component=per_component, dtype=torch.float64)
        torch.testing.assert_close(m.active(x).log_prob, m.distribution().log_prob(x), rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("shape", [(70, 150, 384, 10), (70, 67, 768, 10), (40, 66, 2304, 4)], ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_fp32_error_is_a_few_roundings_of_the_terms(backend, shape, per_component):
    m, x = drawn(*shape, per_component=per_component, spread=2.0)
    truth, terms = m.logits_fp64(x), Terms(m, x)
    active = m.active(x, center=m.means.mean(0))
    budgets.check(active.log_prob, truth.logsumexp(-1), terms.log_prob(truth), "log p(x)")
    budgets.check(component_log_prob(m, x) + m.log_weights, truth, terms.logits(), "a logit")


def component_log_prob(m: Mixture, x: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
    return ops.component_log_prob(x, *m[:3], m.woodbury(center))


def outlier_dimensions(rank: int) -> Mixture:
    m = mixture(64, 512, rank, spread=0.1, dtype=torch.float64)
    m = Mixture(m.means * 0.15, m.loadings * 0.15, m.noise_variance * 0.02, torch.zeros_like(m.log_weights) - 4)
    m.means[:, 7] += 3000
    m.means[:, 300] -= 1500
    return m.to(torch.float32)


def test_outlier_dimensions_and_close_components(backend):
    """Two dimensions near 3000 and -1500, close components: the expanded fp32 formula gets most argmax wrong."""
    m = outlier_dimensions(8)
    x = tokens(m, 2000)
    truth = m.logits_fp64(x)
    active = m.active(x, center=m.means.mean(0))
    agreement = (active.components[:, 0] == truth.argmax(-1)).double().mean().item()
    assert agreement > 0.999
    torch.testing.assert_close(active.log_prob.double(), torch.logsumexp(truth, -1), rtol=0, atol=2e-3)

    expanded = x @ (m.means / m.noise_variance).T  # what makes the case hard
    distance = (x.square() / m.noise_variance).sum(-1, keepdim=True) - 2 * expanded
    distance = distance + (m.means.square() / m.noise_variance).sum(-1)
    a, _, log_det = ops.woodbury.reference.woodbury(m.loadings, m.noise_variance)
    a = a * m.noise_variance.rsqrt()
    t = torch.einsum("nd,krd->nkr", x, a) - torch.einsum("kd,krd->kr", m.means, a)
    naive = m.log_weights - 0.5 * (log_det + distance - t.square().sum(-1))
    assert (naive.argmax(-1) == truth.argmax(-1)).double().mean() < 0.5


@pytest.mark.parametrize("spread", [10.0, 300.0, 3000.0])
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_regions_far_from_the_center_are_as_exact(backend, spread, per_component):
    m, x = drawn(64, 16, 512, 4, per_component=per_component, spread=spread)
    truth = m.logits_fp64(x)
    found = m.active(x, center=m.means.mean(0)).log_prob
    budgets.check(found, truth.logsumexp(-1), Terms(m, x).log_prob(truth))


def test_a_token_whose_logits_are_coarser_than_the_threshold(backend):
    """Near -5e8 nats, float32 cannot tell the best logit from best - threshold; the best is active all the same."""
    m = mixture(30, 100, 3)
    x = tokens(m, 8) * 1000
    x[0] *= 10
    active = m.active(x)
    truth = m.log_prob_fp64(x)
    torch.testing.assert_close(active.log_prob.double(), truth, rtol=1e-5, atol=0)
    assert (active.counts >= 1).all()
    assert (active.components[:, 0] >= 0).all()


@pytest.mark.usefixtures("needs_cpp")
def test_what_does_not_fit_is_refused():
    m = mixture(9, 21, 2)
    x, tensors = tokens(m, 7), m.woodbury().tensors()
    call = torch.ops.mfa_kernels.log_prob
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        call(x, *m, *tensors, 0)
    with pytest.raises(ValueError, match=r"log_prob: x must be .* of shape \(7, 21\).*got float32 of shape \(7, 12\)"):
        call(x[:, :12], *m, *tensors, 4)
    n, k = torch.tensor([0, 7]), torch.tensor([0, 1]).int()
    with pytest.raises(IndexError, match="tokens must be in"):
        torch.ops.mfa_kernels.latents(x, n, k, *m[:3], *tensors)
    with pytest.raises(IndexError, match="components must be in"):
        torch.ops.mfa_kernels.latents(x, n.clamp_max(6), k + 8, *m[:3], *tensors)


@pytest.mark.parametrize("scale", [1e-2, 1e4])
def test_magnitudes(backend, scale):
    m = mixture(30, 100, 3)
    m = Mixture(m.means * scale, m.loadings * scale, m.noise_variance * scale**2, m.log_weights)
    x = tokens(m, 64)  # at 1e4, |x|^2 passes the largest fp16 and would pass fp32 once cubed
    torch.testing.assert_close(m.active(x).log_prob.double(), m.log_prob_fp64(x), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_input_dtypes(backend, dtype):
    m = mixture(20, 70, 3)
    x = tokens(m, 40).to(dtype)
    torch.testing.assert_close(m.active(x).log_prob, m.active(x.float()).log_prob, rtol=0, atol=0)


def test_strides_and_views(backend):
    m, x = drawn(40, 20, 37, 3)
    expected = m.active(x).log_prob
    assert torch.equal(m.active(x.t().contiguous().t()).log_prob, expected)
    padded = torch.zeros(40, 50)
    padded[:, 5:42] = x
    assert torch.equal(m.active(padded[:, 5:42]).log_prob, expected)
    assert torch.equal(m.active(x[:1].expand(40, 37)).log_prob, expected[:1].expand(40))
    storage = torch.zeros(40 * 37 + 1)  # not aligned to a vector
    storage[1:] = x.flatten()
    assert torch.equal(m.active(storage[1:].view(40, 37)).log_prob, expected)


def test_no_tokens(backend):
    m = mixture(20, 37, 3)
    active = m.active(torch.empty(0, 37))
    assert active.log_prob.shape == (0,)
    assert active.components.shape == (0, 16)
    assert component_log_prob(m, torch.empty(0, 37)).shape == (0, 20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_token_is_bad_alone(backend, bad):
    m, x = drawn(70, 50, 37, 3)
    check_a_bad_token_is_bad_alone(m.active, x, 33, bad)


def check_a_bad_token_is_bad_alone(
    scan: Callable[[torch.Tensor], ops.ActivePairs], x: torch.Tensor, row: int, bad: float
) -> None:
    """Spoils a row of x, and looks at all of them."""
    expected = scan(x)
    x[row, 5] = bad
    active = scan(x)
    assert active.log_prob[row].isnan()
    assert (active.components[row] == -1).all()
    others = torch.arange(len(x), device=x.device) != row
    assert torch.equal(active.log_prob[others], expected.log_prob[others])


def test_a_bad_component_is_seen(backend):
    m = mixture(50, 37, 3)
    m.means[20, 3] = math.nan
    assert m.active(tokens(m, 40)).log_prob.isnan().all()


@pytest.mark.parametrize("count", [1, 4, 30])
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_a_component_whose_distance_overflows_is_far_away(backend, count, per_component):
    """|v|^2 and |t|^2 are infinite, t is not: no processor, with fused multiply-adds or without, makes that NaN."""
    m, x = drawn(count, 30, 40, 3, per_component=per_component, spread=3.0)
    m.log_weights[5] = -math.inf
    wanted = m.log_prob_fp64(x)
    m.log_weights[5] = m.log_weights[4]
    m.means[5] = 1e21 * m.means[5].sign()
    torch.testing.assert_close(m.active(x).log_prob.double(), wanted, rtol=1e-6, atol=1e-4)
    assert (component_log_prob(m, x)[:, 5] == -math.inf).all()


def test_all_logits_very_negative(backend):
    m = mixture(67, 40, 3, dtype=torch.float64)  # K is no multiple of any tile; a padding lane of 0 would win
    x = tokens(m, 30) + 1e4
    torch.testing.assert_close(m.active(x).log_prob, m.log_prob_fp64(x), rtol=1e-10, atol=0)
    assert (m.log_prob_fp64(x) < -1e8).all()


def test_zero_weight_component(backend):
    m, x = drawn(40, 20, 37, 3)
    log_weights = m.log_weights.clone()
    log_weights[3] = -math.inf
    m = m._replace(log_weights=log_weights)
    active = m.active(x)
    assert not (active.components == 3).any()
    torch.testing.assert_close(active.log_prob.double(), m.log_prob_fp64(x), rtol=1e-5, atol=1e-4)


def test_two_runs_are_bitwise_equal(backend):
    m, x = drawn(500, 300, 70, 5, spread=0.1)
    assert all(torch.equal(a, b) for a, b in zip(m.active(x), m.active(x), strict=True))


def test_a_split_batch_equals_the_whole(backend):
    m, x = drawn(300, 90, 70, 5)
    whole, parts = m.active(x), [m.active(part) for part in (x[:1], x[1:5], x[5:130], x[130:])]
    torch.testing.assert_close(torch.cat([p.log_prob for p in parts]), whole.log_prob, rtol=1e-6, atol=1e-5)


def test_shift_and_center_change_nothing(backend):
    m, x = drawn(50, 30, 40, 3, dtype=torch.float64)
    expected = m.active(x).log_prob
    shift = torch.linspace(-5, 5, 40, dtype=torch.float64)
    moved = m._replace(means=m.means + shift)
    torch.testing.assert_close(moved.active(x + shift).log_prob, expected, rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(m.active(x, center=shift).log_prob, expected, rtol=1e-11, atol=1e-10)


def test_rotation_of_the_loadings_changes_nothing(backend):
    m, x = drawn(50, 30, 40, 4, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(30, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    turned = m._replace(loadings=m.loadings @ q)
    torch.testing.assert_close(turned.active(x).log_prob, m.active(x).log_prob, rtol=1e-11, atol=1e-10)


def test_order_and_duplicates_of_components_change_nothing(backend):
    m, x = drawn(50, 30, 40, 4, spread=0.3, dtype=torch.float64)
    expected = m.active(x).log_prob
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    permuted = Mixture(m.means[order], m.loadings[order], m.noise_variance, m.log_weights[order])
    torch.testing.assert_close(permuted.active(x).log_prob, expected, rtol=1e-12, atol=1e-11)
    twice = torch.cat([torch.arange(30), torch.tensor([7])])
    weights = m.log_weights[twice].clone()
    weights[7] = weights[30] = weights[7] - math.log(2)
    doubled = Mixture(m.means[twice], m.loadings[twice], m.noise_variance, weights)
    torch.testing.assert_close(doubled.active(x).log_prob, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_overflowing_tokens_stay_exact(backend, slots):
    m, x = drawn(90, 200, 30, 3, spread=0.2, dtype=torch.float64)
    active = m.active(x, slots=slots)
    assert (active.counts == slots + 1).any()
    logits = m.logits_fp64(x)
    torch.testing.assert_close(active.log_prob, torch.logsumexp(logits, -1), rtol=1e-12, atol=1e-10)
    check_slots(active, logits, slots, 1e-9)


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("spread", [2.0, 0.1], ids=["one_hot", "diffuse"])
def test_gradcheck(backend, per_component, spread):
    m = mixture(5, 4, 2, per_component=per_component, spread=spread, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (tokens(m, 6), *m)]

    def log_prob(*args):
        return Mixture(*args[1:]).active(args[0], slots=3).log_prob

    assert torch.autograd.gradcheck(log_prob, leaves)

    def dense(*args):
        return component_log_prob(Mixture(*args[1:]), args[0])

    assert torch.autograd.gradcheck(dense, [*leaves[:4], m.log_weights])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("spread", [3.0, 0.2], ids=["one_hot", "diffuse"])
@pytest.mark.usefixtures("poisoned")
def test_gradients_against_fp64_autograd(backend, shape, per_component, spread):
    m, x = drawn(*shape, per_component=per_component, spread=spread)
    center = m.means.mean(0)
    check_gradients(m, x, lambda x, *p: Mixture(*p).active(x, center=center).log_prob, seed=5)


def check_gradients(m: Mixture, x: torch.Tensor, log_prob: Callable[..., torch.Tensor], seed: int) -> None:
    """Of log p(x), a function of x and the parameters, within the budgets."""
    upstream = torch.randn(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    leaves = [t.clone().requires_grad_() for t in (x, *m)]
    found = torch.autograd.grad(log_prob(*leaves), leaves, upstream)
    wide = [t.double().requires_grad_() for t in (x, *m)]
    truth = torch.autograd.grad(reference.log_prob(*wide), wide, upstream.double())
    terms = Terms(m, x)
    sizes = terms.gradients(upstream.unsqueeze(-1) * terms.responsibilities(m.logits_fp64(x)))
    for name, *tensors in zip(("x", *Mixture._fields), found, truth, sizes, strict=True):
        budgets.check(*tensors, name)


def test_gradient_through_the_logits_of_the_pairs(backend):
    """Responsibilities made of the op's own outputs train like the dense softmax."""
    check_gradient_through_the_logits(*drawn(20, 6, 5, 2, spread=1.0, dtype=torch.float64), rtol=1e-8, atol=1e-9)


def check_gradient_through_the_logits(m: Mixture, x: torch.Tensor, rtol: float, atol: float) -> None:
    size = len(x), len(m.means)
    pick = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x.device)
    leaves, wide = ([t.clone().requires_grad_() for t in (x, *m)] for _ in range(2))
    active = Mixture(*leaves[1:]).active(leaves[0], slots=len(m.means))
    r = (active.logits - active.log_prob.unsqueeze(-1)).exp()
    (r * pick.gather(1, active.components.long().clamp_min(0))).sum().backward()
    logits = wide[4] + reference.component_log_prob(*wide[:4])
    (logits.softmax(-1) * pick).sum().backward()
    for found, wanted in zip(leaves, wide, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_asked_for(backend, wanted):
    check_only_the_gradients_asked_for(*drawn(40, 20, 30, 3), wanted)


def check_only_the_gradients_asked_for(m: Mixture, x: torch.Tensor, wanted: int) -> None:
    every = [t.clone().requires_grad_() for t in (x, *m)]
    Mixture(*every[1:]).active(every[0]).log_prob.sum().backward()
    one = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, *m))]
    Mixture(*one[1:]).active(one[0]).log_prob.sum().backward()
    assert [t.grad is not None for t in one] == [i == wanted for i in range(5)]
    assert torch.equal(one[wanted].grad, every[wanted].grad)


def test_gradients_are_bitwise_repeatable(backend):
    m, x = drawn(400, 100, 70, 5, spread=0.5)
    check_two_runs_are_bitwise_equal(m, x)


def check_two_runs_are_bitwise_equal(m: Mixture, x: torch.Tensor) -> None:
    """With their gradients."""
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, *m)]
        active = Mixture(*leaves[1:]).active(leaves[0])
        active.log_prob.sum().backward()
        runs.append([*active, *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_opcheck(backend, per_component):
    m = mixture(9, 21, 2, per_component=per_component, dtype=torch.float64)
    tensors = m.woodbury().tensors()
    leaves = [t.clone().requires_grad_() for t in (tokens(m, 7), *m)]
    torch.library.opcheck(torch.ops.mfa_kernels.log_prob.default, (*leaves, *tensors, 4))
    torch.library.opcheck(torch.ops.mfa_kernels.component_log_prob.default, (*leaves[:4], *tensors))
    plain = [t.detach() for t in leaves]
    active = m.active(plain[0], slots=4)
    upstream = torch.ones(7, dtype=torch.float64), torch.zeros(7, 4, dtype=torch.float64)
    for needs in ([True] * 5, [False, True, False, False, True]):
        torch.library.opcheck(
            torch.ops.mfa_kernels.log_prob_backward.default, (*upstream, *plain, *tensors, *active, needs)
        )
    torch.library.opcheck(
        torch.ops.mfa_kernels.component_log_prob_backward.default,
        (torch.ones(7, 9, dtype=torch.float64), *plain[:4], *tensors, [True, False, True, True]),
    )

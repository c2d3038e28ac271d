"""Lists of neighbors: nobody is active nearer than its onset, and scans that use them give the dense scan's results."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops import Woodbury
from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.screen import op
from mfa_kernels.ops.screen.types import Neighbors, Screen, ScreenedPairs
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, drawn, mixture, tokens
from tests.helpers.threads import same_bits
from tests.ops.screen import test_screen
from tests.ops.screen.test_screen import CASES, adversarial, check_that_tokens_are_nan_alone, flat, gradients

pytestmark = pytest.mark.usefixtures("needs_cpp")

# (N, K, D, p, R): components in blocks of 8 against tiles of 16 (8 in double), loadings in columns of 12 and squares
# of 5, ranks beyond 12 by loops the compiler does not know; tokens up to 4 by a path of their own, marginal bounds of
# pairs by 4, lists by 16, tokens in stretches of 1,024 on two threads: three of each and a ragged tail.
SHAPES = [(1, 201, 40, 16, 3), (3, 70, 71, 32, 10), (4, 131, 391, 208, 5), (301, 211, 40, 16, 3), (70, 67, 391, 208, 2),
          (1500, 197, 45, 32, 4), (6800, 41, 32, 16, 2), (40, 131, 50, 16, 0), (50, 53, 64, 32, 27),
          (20, 2, 40, 16, 1)]  # fmt: skip

LISTS = [(201, 40, 16, 3), (70, 71, 32, 10), (37, 391, 208, 5), (53, 50, 16, 0), (53, 64, 32, 27), (2, 40, 16, 1)]


class Prepared(NamedTuple):
    woodbury: Woodbury
    constants: Tensor
    screen: Screen
    threshold: float

    def scan(self, x: Tensor, slots: int = 16, **changes) -> ScreenedPairs:
        screen = self.screen
        if changes:
            screen = screen._replace(neighbors=screen.neighbors._replace(**changes))
        return op.scan(x, self.woodbury, self.constants, screen, self.threshold, slots)


def prepared(m: Mixture, features: int = 16, threshold: float | None = None) -> Prepared:
    woodbury = m.woodbury(m.means.nanmean(0))
    screen = op.with_neighbors(op.screen(m, woodbury, features), m, woodbury, threshold)
    return Prepared(
        woodbury, woodbury.constants(m.log_weights), screen, activity_threshold(len(m.means), m.means.dtype)
    )


def discriminants(m: Mixture, basis: Tensor, of: Tensor) -> Tensor:
    """lam Q (S_j + S_k)^-1 (m_k - m_j) of some j, in float64: (J, K, D)."""
    wide = m.to(torch.float64)
    projection = wide.noise_variance.rsqrt().unsqueeze(-1) * basis.double()
    means, loadings = wide.means @ projection, wide.loadings.mT @ projection
    covariance = loadings.mT @ loadings + torch.eye(basis.shape[1], dtype=torch.float64)
    difference = means.unsqueeze(0) - means[of].unsqueeze(1)
    lower = torch.linalg.cholesky(covariance[of].unsqueeze(1) + covariance)
    return torch.cholesky_solve(difference.unsqueeze(-1), lower).squeeze(-1) @ projection.T


def onsets_fp64(m: Mixture, basis: Tensor, threshold: float, of: Tensor) -> Tensor:
    """The roots, by bisection: (J, K), of k for tokens of some j; infinite for j itself."""
    wide = m.to(torch.float64)
    u = discriminants(m, basis, of)
    spread = (u.square() * wide.noise_variance).sum(-1)
    sigma_j = (spread + torch.einsum("jkd,jdr->jkr", u, wide.loadings[of]).square().sum(-1)).sqrt()
    sigma_k = (spread + torch.einsum("jkd,kdr->jkr", u, wide.loadings).square().sum(-1)).sqrt()
    alpha = (u * (wide.means.unsqueeze(0) - wide.means[of].unsqueeze(1))).sum(-1).abs() / sigma_k
    beta = sigma_j / sigma_k
    constants = m.woodbury().constants(m.log_weights).double()
    g = 2 * (constants - constants[of].unsqueeze(-1) + threshold)
    low, high = torch.zeros_like(g), torch.full_like(g, 1e9)
    for _ in range(120):
        s = (low + high) / 2
        ruled_out = (s.square() + g < 0) | ((alpha > beta * s) & ((alpha - beta * s).square() > s.square() + g))
        low, high = torch.where(ruled_out, s, low), torch.where(ruled_out, high, s)
    return low.scatter(1, of.unsqueeze(-1), math.inf)


def all_onsets(neighbors: Neighbors) -> Tensor:
    """(K, K): those of the lists, and the horizon where a component is not in the list."""
    onsets = neighbors.horizons.unsqueeze(-1).repeat(1, len(neighbors.horizons))
    return onsets.scatter(1, neighbors.neighbors.long(), neighbors.onsets)


def check_lists(m: Mixture, features: int, of: Tensor) -> None:
    """Lists of the components `of` hold the smallest onsets, which are those of the formula or a little less."""
    found = prepared(m, features)
    lists = found.screen.neighbors
    wanted = onsets_fp64(m, found.screen.basis, found.threshold, of)
    unit = torch.finfo(m.means.dtype).eps
    near = {
        "rtol": 2e-6 + 1e3 * unit,
        "atol": 4e4 * unit,
    }  # rounding of V^T u, of which |V| / |u| may be in the thousands
    listed, onsets = wanted.gather(1, lists.neighbors[of].long()), lists.onsets[of].double()
    assert (onsets <= listed).all()
    torch.testing.assert_close(onsets, listed, **near)
    length = onsets.shape[1]
    assert length == op.lists.length_of_lists(len(m.means))
    assert (onsets.diff(dim=1) >= 0).all()
    smallest = wanted.sort(1).values
    torch.testing.assert_close(onsets, smallest[:, :length], **near)
    torch.testing.assert_close(lists.horizons[of].double(), smallest[:, length], **near)


@pytest.mark.parametrize("shape", LISTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poisoned")
def test_onsets_are_the_formula_and_lists_hold_the_smallest(shape, dtype):
    k, d, p, r = shape
    check_lists(mixture(k, d, r, dtype=dtype), p, torch.arange(k))


@pytest.mark.usefixtures("poisoned")
def test_lists_of_more_components_than_all_onsets_are_held_for():
    """8,203: every pair is met twice, from each side, and no K x K onsets exist."""
    check_lists(mixture(8203, 16, 1), 16, torch.tensor([0, 7, 8, 4096, 8191, 8192, 8202]))


def test_groups_hold_every_component_once():
    m = mixture(211, 40, 3)
    neighbors = prepared(m).screen.neighbors
    assert torch.equal(neighbors.members.sort().values, torch.arange(211, dtype=torch.int32))
    assert neighbors.starts[0] == 0
    assert neighbors.starts[-1] == 211
    assert (neighbors.starts.diff() >= 0).all()
    means = prepared(m).screen.rows.permute(0, 2, 1, 3).flatten(2)[:, 0]
    torch.testing.assert_close(neighbors.means, means[neighbors.members.long()])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("features", [16, 80])
def test_nobody_is_active_nearer_than_its_onset(case, features):
    """Every token from every component, and the tokens that come as near to k as a distance from j allows."""
    m, x = adversarial(case)
    found = prepared(m, features)
    onsets = all_onsets(found.screen.neighbors).double().fill_diagonal_(0)
    wide = m.to(torch.float64)
    constants = found.constants.double()

    def check(x: Tensor, of: Tensor) -> None:
        """Tokens (N, D), each from component `of` (N,)."""
        logits = wide.log_weights + op_logits(wide, x)
        own = logits.gather(1, of.unsqueeze(-1))
        s = (2 * (constants[of].unsqueeze(-1) - own)).clamp_min(0).sqrt()
        nearer = s < onsets[of]
        assert (logits < own - found.threshold)[nearer].all()

    for j in range(0, len(m.means), 7):
        check(x.double(), torch.full((len(x),), j))
    of = torch.arange(0, len(m.means), 7)
    u = discriminants(m, found.screen.basis, of)
    covered = u * wide.noise_variance + torch.einsum("jdr,jkr->jkd", wide.loadings[of],
                                                     torch.einsum("jkd,jdr->jkr", u, wide.loadings[of]))  # fmt: skip
    length = (u * covered).sum(-1, keepdim=True).sqrt()
    s = (onsets[of] * (1 - 1e-9)).unsqueeze(-1)
    worst = wide.means[of].unsqueeze(1) + torch.where(length > 0, s * covered / length, 0)
    keep = worst.isfinite().all(-1)
    check(worst[keep], of.unsqueeze(-1).expand(keep.shape)[keep])


def op_logits(wide: Mixture, x: Tensor) -> Tensor:
    from mfa_kernels.ops.scan import reference

    return torch.cat([reference.component_log_prob(part, *wide[:3]) for part in x.split(64)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [3.0, 0.3], ids=["one_hot", "overlapping"])
@pytest.mark.usefixtures("poisoned")
def test_log_prob_and_pairs_in_fp64(shape, spread):
    n, k, d, p, r = shape
    m, x = drawn(n, k, d, r, spread=spread, dtype=torch.float64)
    found = prepared(m, p).scan(x, slots=8)
    test_screen.check_in_fp64(found, m.logits_fp64(x), 8)
    assert (found.dropped <= torch.finfo(x.dtype).eps * (1 + 1e-5)).all()


@pytest.mark.parametrize("case", CASES)
def test_adversarial_results_are_those_of_the_formula(case):
    m, x = adversarial(case)
    found = prepared(m, 48).scan(x).active
    truth = m.logits_fp64(x)
    budgets.check(found.log_prob, truth.logsumexp(-1), Terms(m, x).log_prob(truth))


def test_lists_decide_and_what_they_do_not_reach_is_scanned():
    m, x = drawn(500, 300, 96, 4, spread=3.0)
    made = prepared(m, 32)
    neighbors = made.screen.neighbors
    found = made.scan(x)
    assert (found.evaluated > 0).all()
    assert found.evaluated.double().mean() < 3
    # Without a neighbor in the world, a pivot is all that a token has computed.
    alone = made.scan(x, onsets=torch.full_like(neighbors.onsets, math.inf),
                        horizons=torch.full_like(neighbors.horizons, math.inf))  # fmt: skip
    assert (alone.evaluated == 1).all()
    # Lists that end at once leave all tokens to the bounds of all components.
    elsewhere = made.scan(x, horizons=torch.zeros_like(neighbors.horizons))
    bounded = op.scan(x, made.woodbury, made.constants, made.screen._replace(neighbors=None), made.threshold, 16)
    assert torch.equal(elsewhere.active.log_prob, bounded.active.log_prob)
    assert torch.equal(elsewhere.evaluated, bounded.evaluated)
    torch.testing.assert_close(found.active.log_prob, bounded.active.log_prob, rtol=1e-6, atol=0)


def test_a_poor_pivot_gives_way():
    """Groups that send every token to the wrong members: neighbors of neighbors lead back, or the bounds of all do."""
    m, x = drawn(300, 300, 96, 4, spread=1.0)
    made = prepared(m, 32)
    neighbors = made.screen.neighbors
    wrong = made.scan(x, members=neighbors.members.roll(7))
    torch.testing.assert_close(wrong.active.log_prob.double(), m.log_prob_fp64(x), rtol=1e-6, atol=0)
    assert torch.equal(wrong.active.counts, made.scan(x).active.counts)


@pytest.mark.parametrize("threshold", [2.0, 60.0])
def test_lists_made_for_another_threshold(threshold):
    m, x = drawn(300, 150, 48, 3, spread=1.0)
    made = prepared(m, 32, threshold)
    found = made.scan(x).active
    wanted = made.screen.neighbors._replace(horizons=torch.zeros(150))
    wanted = op.scan(x, made.woodbury, made.constants, made.screen._replace(neighbors=wanted), made.threshold, 16)
    assert torch.equal(found.counts, wanted.active.counts)
    assert torch.equal(found.components, wanted.active.components)


@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_what_is_dropped_weighs_no_more_than_certified(threshold):
    m, x = drawn(600, 90, 48, 3, spread=0.5)
    made = prepared(m, 32, threshold)
    found = made._replace(threshold=threshold).scan(x, slots=90)
    mass = m.logits_fp64(x).softmax(-1)
    computed = torch.zeros_like(mass, dtype=torch.bool)
    for n, (components, count) in enumerate(zip(found.active.components, found.active.counts)):
        computed[n, components[:count].long()] = True
    left_out = mass.masked_fill(computed, 0)  # more than was dropped: what was computed and is not active is in it
    settled = found.evaluated > 0
    assert (left_out.sum(-1) > 1e-3)[settled].any()
    exact = found.evaluated == found.active.counts  # where nothing else was computed
    assert (left_out.sum(-1) <= found.dropped)[settled & exact].all()
    assert (settled & exact).any()


def test_tokens_that_are_not_finite_are_nan_alone():
    m = mixture(130, 64, 3)
    check_that_tokens_are_nan_alone(prepared(m, 32).scan, tokens(m, 70))


def test_components_of_no_weight_and_a_component_that_is_not_finite():
    m = mixture(130, 64, 3, spread=3.0)
    m.log_weights[::2] = -torch.inf
    x = tokens(m, 70)
    made = prepared(m, 32)
    listed = made.screen.neighbors.onsets.isfinite()
    assert (made.screen.neighbors.neighbors[1::2][listed[1::2]] % 2 == 1).all(), "nobody's neighbors"
    found = made.scan(x)
    assert (found.evaluated > 0).any()
    torch.testing.assert_close(found.active.log_prob.double(), m.log_prob_fp64(x), rtol=1e-6, atol=0)
    m.means[1, 3] = torch.nan
    assert prepared(m, 32).scan(x).active.log_prob.isnan().all()


@pytest.mark.parametrize("length", [1e7, 1.12e8])
def test_a_degenerate_component_is_everybodys_neighbor_and_no_pivot(length):
    """Also where its factorisation goes through, and its determinant is off by nats."""
    made = prepared(test_screen.degenerate(length), 32)
    assert made.screen.slack[7].isinf()
    assert (made.screen.neighbors.neighbors == 7).any(1).sum() == 129
    assert made.screen.neighbors.horizons[7] == 0


def test_a_degenerate_component_is_always_computed():
    test_screen.check_a_degenerate_component_is_always_computed(lambda m, x: prepared(m, 32).scan(x))


def test_a_mean_whose_square_overflows():
    m, x = drawn(50, 130, 64, 3, spread=3.0)
    wanted = m.log_prob_fp64(x)
    m.means[5] *= 1e19
    assert prepared(m, 32).scan(x).active.log_prob.shape == (50,)
    keep = x.abs().amax(-1) < 1e9
    found = prepared(m, 32).scan(x[keep]).active.log_prob.double()
    torch.testing.assert_close(found[wanted[keep] < 0], wanted[keep][wanted[keep] < 0], rtol=1e-2, atol=2)


@pytest.mark.parametrize("count", [700, 128 + 129])
def test_the_number_of_threads_changes_no_bit(count):
    m, x = drawn(count, 200, 64, 5, spread=0.7)
    made = prepared(m, 32)  # once: a BLAS has its hand in it, whose bits may depend on the number of threads
    *_, evaluated = same_bits(lambda: flat(made.scan(x)), (1, 2, 5))
    assert (evaluated > 0).any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens_one_component_and_duplicates(dtype):
    found = test_screen.check_one_component_and_duplicates(lambda m, x: prepared(m).scan(x), dtype)
    assert (found.active.counts == 2).all()


def test_gradients_are_those_of_the_dense_scan():
    m = mixture(150, 48, 3, spread=2.0, dtype=torch.float64)
    made = prepared(m, 32)
    x = tokens(m, 40)
    for ours, dense in zip(gradients(m, x, made.woodbury, made.screen), gradients(m, x, made.woodbury, None)):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    m = mixture(21, 40, 2, dtype=dtype)
    made = prepared(m, 32)
    f, s = made.woodbury, made.screen
    torch.library.opcheck(
        torch.ops.mfa_kernels.select_screened.default,
        (tokens(m, 7), f.rows, made.constants, f.scale, f.center, s.basis, s.rows, s.log_det, s.radii, s.slack, s.lines,
         s.line_terms, True, *op.lists.flat(s.neighbors), s.exact_slack, 12.0, 4),
    )  # fmt: skip


def test_compiles_whole():
    m, x = drawn(40, 90, 48, 3)
    made = prepared(m, 32)
    test_screen.check_compiles_whole(lambda x: made.scan(x, slots=4), x)

"""Screening in Triton: under the interpreter on a machine without a GPU, on the GPU where there is one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.common import triton_tokens
from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.screen import reference, triton_project, triton_screen
from mfa_kernels.ops.screen.basis import basis
from mfa_kernels.ops.screen.types import ScreenedPairs
from mfa_kernels.ops.woodbury import triton_rows
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, adversarial, drawn, mixture, tokens
from tests.ops.scan.test_scan import check_slots
from tests.ops.scan.test_triton_pipeline import DEVICE, TILES, triton_backend  # noqa: F401  (a fixture for each test)
from tests.ops.screen.test_screen import check_counts, flat, gradients

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted

# (N, K, D, p, R): tokens (tiles of 16), components, features and coordinates (64) cross three tiles with a ragged tail.
SHAPES = [(1, 1, 20, 16, 1), (35, 70, 40, 16, 0), (5, 130, 150, 135, 2), (3, 7, 130, 48, 13)]

SMALL = {"components": 67, "features": 70, "rank": 3, "spread": 2.0, "count": 11, "near": 2}
SMALL["scales"] = torch.tensor([0.0, 0.5, 2.0, 10.0, 50.0])


class Case:
    """A mixture, its factors and its screen."""

    def __init__(self, m: Mixture, kept: int, q: Tensor | None = None):
        self.m = m.to(DEVICE)
        self.woodbury = self.m.woodbury(self.m.means.mean(0))
        self.constants = self.woodbury.constants(self.m.log_weights)
        self.basis = basis(self.woodbury, self.m.log_weights.exp(), kept) if q is None else q
        self.screen = triton_screen.screen(*self.m[:3], self.woodbury, self.basis)

    def scan(self, x: Tensor, threshold: float | None = None, slots: int = 16) -> ScreenedPairs:
        threshold = activity_threshold(len(self.m.means), torch.float32) if threshold is None else threshold
        return triton_screen.scan(x.to(DEVICE), self.woodbury, self.constants, self.screen, threshold, slots)

    def seen(self, x: Tensor) -> triton_tokens.Tokens:
        f = self.woodbury
        return triton_tokens.scan_tokens(x.to(DEVICE), f.scale, f.center, f.scan[0].shape[-1], False)

    def check_bounds(self, x: Tensor) -> float:
        """Every reported bound above its logit, the last of a tile above the rest; the largest distance."""
        partials, lift = triton_screen.bounds(self.seen(x), self.woodbury, self.constants, self.screen, TILES)
        truth = self.m.logits_fp64(x.to(DEVICE))
        upper = partials.upper.double() - lift[:, None, None]
        held = partials.upper > -math.inf
        exact = truth.gather(1, partials.components.flatten(1).long().clamp_max(truth.shape[1] - 1)).view(held.shape)
        room = 1e-9 * exact.abs()  # float64's own
        assert ((upper >= exact - room) | ~held).all()
        for tile in range(upper.shape[1]):
            kept = partials.components[:, tile].long().clamp_max(truth.shape[1] - 1)
            others = truth.scatter(1, kept, -math.inf)[:, tile * triton_rows.TILE : (tile + 1) * triton_rows.TILE]
            others = others.amax(-1)
            assert ((others <= upper[:, tile, -1] + 1e-9 * others.abs()) | ~held[:, tile, -1]).all()
        return (upper - exact)[held & (upper < math.inf)].max().item()

    def check(self, x: Tensor, found: ScreenedPairs) -> None:
        """log p(x) within its budget, and counts and certificates that make sense."""
        truth = self.m.logits_fp64(x.to(DEVICE))
        budgets.check(found.active.log_prob, truth.logsumexp(-1), Terms(self.m, x.to(DEVICE)).log_prob(truth))
        assert found.active.components.dtype == found.active.counts.dtype == found.evaluated.dtype == torch.int32
        check_counts(found, truth.shape[1])
        assert (found.dropped <= torch.finfo(torch.float32).eps * (1 + 1e-4)).all()
        assert (found.dropped[found.evaluated == -1] == 0).all()


def made(*shape: int, kept: int, **options: Any) -> tuple[Case, Tensor]:
    """A case of (N, K, D, R), and its tokens."""
    m, x = drawn(*shape, device=DEVICE, **options)
    return Case(m, kept), x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_log_prob_pairs_and_bounds(shape):
    count, components, features, coordinates, rank = shape
    case, x = made(count, components, features, rank, spread=2.0, kept=coordinates)
    case.check_bounds(x)
    found = case.scan(x, slots=8)
    case.check(x, found)
    check_slots(found.active, case.m.logits_fp64(x), 8, 1e-3)


@pytest.mark.usefixtures("poisoned")
def test_coordinates_are_the_projection_and_its_error():
    """Tokens, features and coordinates over three tiles each, and no more off than is claimed."""
    case, x = made(35, 7, 150, 2, kept=135)
    seen = case.seen(x)
    y = triton_project.project(seen, case.screen.projection, case.screen.sigma).double()
    q = case.screen.projection.double().mT[:150] * case.screen.sigma.double()
    truth = ((x.double() - case.woodbury.center.double()) * case.m.noise_variance.double().rsqrt()) @ q
    off = seen.norms[1].double() + triton_project.sum_error(192) * case.screen.spread * seen.norms.sum(0).double()
    error = (y - truth).norm(dim=1)
    assert (error <= off).all()
    assert (error > 0.01 * off).all()
    assert torch.linalg.matrix_norm(q, 2) <= 1


def test_the_bounds_are_those_of_the_marginals():
    """Within the rounding of fp16, at the size of the distances."""
    case, x = made(5, 70, 150, 5, spread=2.0, kept=48)
    partials, lift = triton_screen.bounds(case.seen(x), case.woodbury, case.constants, case.screen, TILES)
    wide = case.m.to(torch.float64)
    wanted = reference.bounds(x.double(), *wide, torch.linalg.qr(case.basis)[0])
    wanted = wanted.gather(1, partials.components[:, 0].long())
    torch.testing.assert_close(partials.upper[:, 0].double() - lift[:, None], wanted, rtol=1e-2, atol=1.0)


@pytest.mark.parametrize(
    "kind", ["near_duplicates", "huge_norms", "rank_deficient", "small_noise", "uneven_noise", "far_regions"]
)
def test_no_bound_is_violated_and_results_hold(kind):
    m, x = adversarial(kind, **SMALL)
    case = Case(m, 40)
    assert case.check_bounds(x) > 0
    case.check(x, case.scan(x))


def test_rounding_does_break_bounds_that_have_no_slack():
    """What the scan's delta is for: regions far from the centre, whose squares hide the distance to their tokens."""
    m, x = adversarial("far_regions", **SMALL)
    case = Case(m, 40)
    rows = case.screen.rows
    bare = rows._replace(bounds=torch.zeros_like(rows.bounds), worst=torch.zeros_like(rows.worst))
    case.screen = case.screen._replace(rows=bare)
    with pytest.raises(AssertionError):
        case.check_bounds(x)


def test_with_every_coordinate_the_bounds_are_close_and_still_hold():
    """p = D: what is left between bound and logit is rounding's alone, and has to be enough."""
    case, x = made(10, 70, 100, 4, spread=2.0, kept=100)
    x = torch.cat([x, 10 * tokens(case.m, 3)])
    case.check_bounds(x)
    partials, lift = triton_screen.bounds(case.seen(x), case.woodbury, case.constants, case.screen, TILES)
    best = (partials.upper.amax((1, 2)).double() - lift - case.m.logits_fp64(x).amax(1))[:10]
    assert (best >= 0).all()
    assert (best < 3).all()


def test_one_hot_tokens_are_screened_and_those_that_overflow_take_the_dense_scan():
    """Tokens half-way between all components among others, more than two tiles of them."""
    case, x = made(50, 130, 96, 1, spread=3.0, kept=16)
    x[:40] = 0.02 * x[:40] + case.m.means.mean(0)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    found = case.scan(x[order])
    between = order < 40
    assert (found.evaluated[between] == -1).all()
    assert (found.evaluated[~between] > 0).all()
    assert found.evaluated[~between].double().mean() < 3
    case.check(x[order], found)
    x = x[order]
    check_slots(found.active, case.m.logits_fp64(x), 16, 1e-3)


@pytest.mark.usefixtures("poisoned")
def test_a_diffuse_mixture_is_decided_by_the_dense_scan():
    case, x = made(5, 67, 40, 2, spread=0.05, kept=16)
    found = case.scan(x)
    assert (found.evaluated == -1).all()
    assert (found.active.counts == 17).any()
    case.check(x, found)
    check_slots(found.active, case.m.logits_fp64(x), 16, 1e-3)


def test_what_is_dropped_weighs_no_more_than_certified():
    """A low threshold makes the dropped mass visible: those with the smallest bounds were dropped."""
    threshold = 2.0
    case, x = made(12, 67, 48, 1, spread=0.7, kept=48)
    found = case.scan(x, threshold)
    partials, _ = triton_screen.bounds(case.seen(x), case.woodbury, case.constants, case.screen, TILES)
    order = partials.upper.flatten(1).argsort(-1, descending=True)
    ranked = partials.components.flatten(1).gather(1, order).long()
    weight = case.m.logits_fp64(x).softmax(-1)
    dropped = 0.0
    for i in (found.evaluated > 0).nonzero().flatten().tolist():
        mass = 1 - weight[i, ranked[i, : found.evaluated[i]]].sum()
        assert mass <= found.dropped[i]
        dropped = max(dropped, mass.item())
    assert dropped > 1e-3
    assert (found.dropped <= 67 * math.exp(-threshold) * (1 + 1e-4)).all()


@pytest.mark.usefixtures("poisoned")
def test_tokens_and_components_that_are_not_finite():
    case, x = made(6, 20, 37, 3, spread=2.0, kept=16)
    clean = case.scan(x)
    x[4, 5], x[2, 0] = math.nan, math.inf
    bad = torch.zeros(6, dtype=torch.bool, device=DEVICE)
    bad[[2, 4]] = True
    found = case.scan(x)
    assert found.active.log_prob[bad].isnan().all()
    assert (found.active.components[bad] == -1).all()
    assert (found.evaluated[bad] == -1).all()
    for a, b in zip(flat(found), flat(clean)):
        assert torch.equal(a[~bad], b[~bad])
    broken = case.m._replace(means=case.m.means.clone())
    broken.means[12, 3] = math.nan
    assert Case(broken, 16, case.basis).scan(tokens(case.m, 2)).active.log_prob.isnan().all()


def test_no_weight_no_tokens_and_nothing_known_of_a_component():
    m = mixture(70, 64, 3, spread=3.0)
    m.log_weights[::2] = -math.inf
    m.loadings[7, :, 1] = m.loadings[7, :, 0]
    m.loadings[7] *= 1e7
    case = Case(m, 32)
    x = tokens(mixture(70, 64, 3, spread=3.0), 12)
    found = case.scan(x)
    assert case.scan(x[:0]).active.components.shape == (0, 16)
    assert case.screen.slack[7] == math.inf
    assert (found.evaluated.abs() >= 1).all()
    assert (found.evaluated >= 2).any()  # the degenerate one is always computed
    assert not (found.active.components % 2 == 0).any()
    torch.testing.assert_close(found.active.log_prob.double(), m.log_prob_fp64(x).to(DEVICE), rtol=1e-5, atol=0)


def test_gradients_are_those_of_the_dense_scan():
    case, x = made(9, 70, 40, 3, spread=2.0, kept=16)
    found, wanted = (gradients(case.m, x, case.woodbury, screen) for screen in (case.screen, None))
    for ours, dense in zip(found, wanted):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4 * dense.abs().max().item())


def test_half_precision_tokens():
    case, x = made(3, 20, 70, 3, spread=2.0, kept=16)
    x = x.bfloat16()
    assert torch.equal(case.scan(x).active.log_prob, case.scan(x.float()).active.log_prob)


def test_two_runs_are_bitwise_equal_and_a_split_batch_equals_the_whole():
    case, x = made(7, 67, 50, 2, spread=2.0, kept=32)
    whole, again, *parts = (flat(case.scan(part)) for part in (x, x, x[:3], x[3:]))
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    for i, column in enumerate(whole[:4]):  # the certificates come from tiles of other sizes
        assert torch.equal(column, torch.cat([part[i] for part in parts]))

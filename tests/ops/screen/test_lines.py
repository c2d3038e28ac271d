"""The first level of screening: bounds by one direction a component are never violated, and change no result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.screen import op, reference
from mfa_kernels.ops.screen.cost import bytes_read, candidates
from mfa_kernels.ops.screen.types import Screen
from mfa_kernels.ops.woodbury.types import unpack_rows
from tests.helpers.mixtures import Mixture, drawn, mixture, tokens
from tests.helpers.threads import same_bits
from tests.ops.screen.test_screen import CASES, STAGE_0, adversarial, flat, orthonormal

pytestmark = pytest.mark.usefixtures("needs_cpp")

# (N, K, D, p, R): lines in fours or eights and sixty-fours, up to four tokens by a path of their own, panels of up to
# 32, stretches of 256, flushes every 64 coordinates, marginal bounds of pairs by four: three of each and a ragged
# tail.
SHAPES = [(1, 201, 40, 16, 3), (3, 70, 71, 32, 10), (4, 131, 391, 208, 5), (101, 211, 40, 16, 3), (70, 67, 391, 208, 2),
          (900, 197, 45, 32, 4), (40, 131, 50, 16, 0)]  # fmt: skip


def prepared(m: Mixture, features: int, basis: Tensor | None = None):
    woodbury = m.woodbury(m.means.nanmean(0))
    return woodbury, woodbury.constants(m.log_weights), op.screen(m, woodbury, features, basis)


def lines_fp64(m: Mixture, x: Tensor, screen: Screen) -> Tensor:
    """The bounds by the plain formula in float64, from the directions of a screen: (N, K)."""
    wide = m.to(torch.float64)
    scale = wide.noise_variance.rsqrt()
    projection = scale.unsqueeze(-1) * screen.basis.double()
    u, q = screen.lines.double(), screen.basis.double()
    along = (x.double() @ projection @ u.mT) - (wide.means @ projection * u).sum(-1)
    loaded = torch.einsum("kdr,dp,kp->kr", wide.loadings, projection, u)
    variance = (u @ q.mT).square().sum(-1) + loaded.square().sum(-1)
    constants = m.woodbury().constants(m.log_weights).double()
    return constants - 0.5 * along.square() / variance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_computed_bounds_are_the_formula_and_its_slack(shape):
    n, k, d, p, r = shape
    m, x = drawn(n, k, d, r, dtype=torch.float64)
    woodbury, constants, screen = prepared(m, p)
    upper, wanted = op.bounds(x, woodbury, constants, screen, by_lines=True), lines_fp64(m, x, screen)
    assert (upper >= wanted).all()
    reach = ((x - woodbury.center) * woodbury.scale).norm(dim=-1, keepdim=True) + screen.radii
    assert (upper <= wanted + 2 * screen.slack * reach.square()).all()
    assert screen.slack.max() < 1e-9
    assert (upper >= op.bounds(x, woodbury, constants, screen) - 1e-6).all()  # a line sees less than the marginal


@pytest.mark.parametrize("shape", STAGE_0, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poisoned")
def test_stage_0_takes_the_discriminants_from_the_middle(shape, dtype):
    k, d, p, r = shape
    m = mixture(k, d, r, dtype=dtype)
    woodbury, _, screen = prepared(m, p)
    rows = reference.marginals(*m[:3], woodbury, screen.basis, 0.0)[0]
    weights = m.log_weights.double().softmax(0)
    wanted = rows[:, 0] - weights @ rows[:, 0]
    wanted = wanted - torch.einsum("krp,krq,kq->kp", rows[:, 1:], rows[:, 1:], wanted)
    if k > 1:  # the middle of one is where it lies
        cosine = torch.cosine_similarity(screen.lines.double(), wanted, dim=-1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)
    offsets, shares = screen.line_terms.double()
    lines = screen.lines.double()
    torch.testing.assert_close(offsets, (lines * rows[:, 0]).sum(-1), rtol=1e-6, atol=1e-6)
    v = unpack_rows(screen.rows, p).double()  # S^-1 = I - B^T B
    precision = torch.eye(p, dtype=torch.float64) - v[:, 1:].mT @ v[:, 1:]
    variance = torch.einsum("kp,kpq,kq->k", lines, torch.linalg.inv(precision), lines)
    if k > 1:
        assert (shares * variance <= 1 + 1e-5).all()
        torch.testing.assert_close(shares * variance, torch.ones_like(shares), rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("features", [16, 80, 144])
def test_no_bound_is_violated(case, features):
    m, x = adversarial(case)
    woodbury, constants, screen = prepared(m, features)
    truth = m.logits_fp64(x)
    assert (op.bounds(x, woodbury, constants, screen, by_lines=True).double() >= truth).all()
    for first in (0, 120, 210, 240, 260, 290):
        few = x[first : first + 3].contiguous()
        upper = op.bounds(few, woodbury, constants, screen, by_lines=True).double()
        assert (upper >= truth[first : first + 3]).all()


def farthest_along_lines(m: Mixture, screen: Screen) -> Tensor:
    """Tokens mu_k + t C_k Q u_k: what the line of a component sees of their distance is all of it."""
    wide = m.to(torch.float64)
    scale = wide.noise_variance.rsqrt()
    w = wide.loadings * scale.unsqueeze(-1)
    v = screen.lines.double() @ screen.basis.double().mT
    v = v + torch.einsum("kdr,ker,ke->kd", w, w, v)
    distance = torch.tensor([1.0, 30.0, -1e3], dtype=torch.float64)[:, None, None]
    return (wide.means + distance * v / scale).flatten(0, 1).to(m.means.dtype)


@pytest.mark.parametrize("case", CASES)
def test_no_bound_is_violated_where_the_line_sees_the_whole_distance(case):
    m, _ = adversarial(case)
    woodbury, constants, screen = prepared(m, 48)
    x = farthest_along_lines(m, screen)
    truth = m.logits_fp64(x)
    assert (op.bounds(x, woodbury, constants, screen, by_lines=True).double() >= truth).all()


def test_rounding_does_break_bounds_that_have_no_slack():
    m, _ = adversarial("huge_norms")
    woodbury, constants, screen = prepared(m, 48)
    x = farthest_along_lines(m, screen)
    bare = screen._replace(slack=torch.zeros_like(screen.slack))
    assert (op.bounds(x, woodbury, constants, bare, by_lines=True).double() < m.logits_fp64(x)).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spread", [3.0, 1.0, 0.05])
@pytest.mark.usefixtures("poisoned")
def test_lines_change_no_result(shape, spread):
    n, k, d, p, r = shape
    m, x = drawn(n, k, d, r, spread=spread, dtype=torch.float64)
    woodbury, constants, screen = prepared(m, p)
    threshold = activity_threshold(k, x.dtype)
    found = op.scan(x, woodbury, constants, screen, threshold, 8)
    wanted = op.scan(x, woodbury, constants, screen.without_lines(), threshold, 8)
    torch.testing.assert_close(found.active.log_prob, wanted.active.log_prob, rtol=1e-13, atol=0)
    assert torch.equal(found.active.counts, wanted.active.counts)
    assert (found.evaluated <= wanted.evaluated)[wanted.evaluated > 0].all()
    assert (found.dropped <= torch.finfo(x.dtype).eps).all()


def test_lines_leave_few_components_to_the_marginals():
    m, x = drawn(500, 300, 96, 4, spread=3.0)
    woodbury, constants, screen = prepared(m, 48)
    bars = (m.logits_fp64(x).amax(-1) - 25).float()
    left = op.lines_left(x, woodbury, constants, screen, bars)
    plain = (lines_fp64(m, x, screen) >= bars.unsqueeze(-1)).double().mean(-1)
    assert (left >= plain).all()
    assert (left - plain).mean() < 0.01
    assert left.mean() < 0.1


@pytest.mark.parametrize("count", [3, 300])
def test_the_number_of_threads_changes_no_bit(count):
    m, x = drawn(count, 391, 64, 5, spread=1.5)
    woodbury, constants, screen = prepared(m, 48)

    def run() -> list[Tensor]:
        found = op.scan(x, woodbury, constants, screen, 20.0, 8)
        return [*flat(found), op.bounds(x, woodbury, constants, screen, by_lines=True)]

    assert (same_bits(run, (1, 2, 5))[5] > 0).any()


def test_a_component_without_a_line_is_never_ruled_out_and_the_others_are():
    m, x = drawn(200, 130, 64, 3, spread=3.0)
    m.means[11, 2] = torch.nan
    m.loadings[4, 7, 1] = torch.inf
    woodbury, constants, screen = prepared(m, 32, orthonormal(64, 32))
    upper = op.bounds(x, woodbury, constants, screen, by_lines=True)
    lost = torch.zeros(130, dtype=torch.bool)
    lost[[4, 11]] = True
    assert not (upper[:, lost] < torch.inf).any()
    assert screen.lines[lost].eq(0).all()
    assert (screen.line_terms[1, ~lost] > 0).all()


def test_the_choice_goes_without_lines_where_they_leave_too_much_and_a_refresh_keeps_it():
    for spread, rank, expected in ((3.0, 8, True), (0.9, 8, False)):
        m = mixture(400, 128, rank, spread=spread)
        screen = op.choose(tokens(m, 200), m, m.woodbury())
        assert screen is not None
        assert screen.batches_by_lines == expected
        again = op.refresh(screen, m, m.woodbury())
        assert again.batches_by_lines == expected
        assert len(again.lines) == 400  # a token alone reads fewer bytes with them


def test_bytes_read_by_one_token():
    k, d, p, r = 90, 64, 16, 3
    m = mixture(k, d, r)
    woodbury, _, screen = prepared(m, p)
    lines = torch.tensor([0.1, 1.0], dtype=torch.float64)
    read = bytes_read(torch.tensor([1, 5], dtype=torch.int32), woodbury, screen, lines)
    first = d * p + k * p + 6 * k + 2 * d
    marginals = [9 + candidates(k), 90 + candidates(k)]
    wanted = [first + m * p * (r + 1) + pairs * d * (r + 1) for m, pairs in zip(marginals, (1, 5))]
    assert read.tolist() == [4 * values for values in wanted]


def test_errors_name_the_argument():
    m, x = drawn(5, 70, 64, 2)
    woodbury, constants, screen = prepared(m, 16)
    with pytest.raises(ValueError, match="by_lines needs a screen that has lines"):
        op.bounds(x, woodbury, constants, screen.without_lines(), by_lines=True)
    with pytest.raises(ValueError, match=r"lines must be float32 of shape \(70, 16\), .*of shape \(69, 16\)"):
        op.scan(x, woodbury, constants, screen._replace(lines=screen.lines[:69]), 20.0, 4)
    with pytest.raises(ValueError, match=r"line_terms must be float32 of shape \(2, 70\), .*of shape \(2, 0\)"):
        op.scan(x, woodbury, constants, screen._replace(line_terms=screen.line_terms[:, :0]), 20.0, 4)

"""Stage 1 in Triton: under the interpreter on a machine without a GPU, on the GPU where there is one."""

from __future__ import annotations

import math

import pytest
import torch

from mfa_kernels import MFA, ops
from mfa_kernels.ops.common import configs, triton_tokens
from mfa_kernels.ops.scan import reference, triton_merge, triton_pipeline, triton_scan
from mfa_kernels.ops.woodbury import triton_rows
from mfa_kernels.ops.woodbury.types import ScanRows
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, drawn, mixture, tokens
from tests.ops.scan.test_scan import check_a_bad_token_is_bad_alone, check_gradients, check_slots, component_log_prob

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted or emulated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Tokens, components and features cross three tiles (of 16, 64 and 64) with a ragged tail; ranks take every combination
# of four rows, two and one.
SHAPES = [(1, 1, 1, 1), (35, 130, 130, 10), (17, 70, 33, 7), (5, 65, 70, 0), (3, 7, 100, 20)]  # (N, K, D, R)
TILES = configs.Scan(tokens=16, width=4, features=64, warps=4, stages=2, swizzle=2)


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    pairs = configs.Pairs(pairs=16, features=64, warps=4, stages=1)
    all_logits = configs.AllLogits(tokens=16, components=4, features=64, warps=4, stages=1)
    with configs.override(TILES, pairs, all_logits):
        yield


def on_device(*shape: int, **options) -> tuple[Mixture, torch.Tensor]:
    """A mixture and tokens, of (N, K, D, R)."""
    return drawn(*shape, device=DEVICE, **options)


def scanned(m: Mixture, x: torch.Tensor, bounds: bool = True, tiles: configs.Scan = TILES):
    """(partials, factors, rows, tokens) of one scan."""
    woodbury = m.woodbury(m.means.mean(0))
    rows = ScanRows(*woodbury.scan)
    scale = triton_rows.reference_scale(woodbury)
    seen = triton_tokens.scan_tokens(x, scale, woodbury.center, rows.rows.shape[-1], woodbury.per_component)
    partials = triton_scan.scan_tiles(seen, rows, woodbury.constants(m.log_weights), tiles, bounds)
    return partials, woodbury, rows, seen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.usefixtures("poisoned")
def test_log_prob_and_pairs(shape, per_component):
    m, x = on_device(*shape, per_component=per_component, spread=1.0)
    active = m.active(x, slots=8, center=m.means.mean(0))
    truth = m.logits_fp64(x)
    budgets.check(active.log_prob, truth.logsumexp(-1), Terms(m, x).log_prob(truth))
    check_slots(active, truth, 8, 1e-3)


@pytest.mark.usefixtures("poisoned")
def test_a_diffuse_mixture_is_decided_by_all_logits(monkeypatch):
    monkeypatch.setattr(triton_pipeline, "MOST_LOGITS", 5 * 80)  # tokens in rounds of five, the last one short
    m, x = on_device(12, 80, 70, 4, spread=0.05)
    x = torch.cat([x, 40 * x[:2]])  # and two whose candidates do not overflow
    active = m.active(x)
    truth = m.logits_fp64(x)
    torch.testing.assert_close(active.log_prob.double(), torch.logsumexp(truth, -1), rtol=1e-6, atol=1e-4)
    assert (active.counts[:12] == 17).sum() >= 6
    check_slots(active, truth, 16, 1e-3)


def widest(m: Mixture, x: torch.Tensor, tiles: configs.Scan = TILES) -> float:
    """Checks that every reported bound holds; returns the largest distance between upper and exact logit."""
    partials, *_ = scanned(m, x, tiles=tiles)
    truth = m.logits_fp64(x)
    if m.noise_variance.dim() == 1:  # the scan leaves |y|^2 / 2 out
        truth += 0.5 * ((x.double() - m.means.mean(0).double()).square() / m.noise_variance.double()).sum(-1)[:, None]
    held = partials.upper > -math.inf
    exact = truth.gather(1, partials.components.flatten(1).long().clamp_max(truth.shape[1] - 1)).view(held.shape)
    room = 1e-9 * exact.abs()  # float64's own
    assert ((partials.upper.double() >= exact - room) | ~held).all()
    for tile in range(partials.lower.shape[1]):
        best = truth[:, tile * triton_rows.TILE : (tile + 1) * triton_rows.TILE].amax(-1)
        assert (partials.lower[:, tile].double() <= best + 1e-9 * best.abs()).all()
        kept = partials.components[:, tile].long().clamp_max(truth.shape[1] - 1)
        others = truth.scatter(1, kept, -math.inf)[:, tile * triton_rows.TILE : (tile + 1) * triton_rows.TILE]
        last = partials.upper[:, tile, -1].double()  # nothing that was not reported can pass the last one that was
        assert ((others.amax(-1) <= last + 1e-9 * last.abs()) | (last == -math.inf)).all()
    return (partials.upper - exact)[held & (partials.upper < math.inf)].max().item()


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("kind", ["typical", "far", "tiny_noise", "collinear", "huge", "uneven"])
def test_the_bounds_hold(kind, per_component):
    m, x = on_device(20, 70, 100, 5, per_component=per_component, dtype=torch.float64, spread=2.0)
    if kind == "far":
        m = m._replace(means=m.means + 1e3 * torch.arange(70, device=DEVICE).unsqueeze(-1))
        x = x + 1e3 * torch.arange(20, device=DEVICE).unsqueeze(-1)
    elif kind == "tiny_noise":
        m = m._replace(noise_variance=m.noise_variance * 1e-6)
    elif kind == "collinear":
        loadings = m.loadings[..., :1] + 1e-4 * m.loadings
        m = m._replace(loadings=loadings)
    elif kind == "huge":
        m = Mixture(m.means * 1e4, m.loadings * 1e4, m.noise_variance, m.log_weights)
        x = x * 1e4
    elif kind == "uneven":
        m = m._replace(noise_variance=m.noise_variance * torch.logspace(-8, 4, 100, device=DEVICE, dtype=torch.float64))
    m = m.to(torch.float32)
    assert widest(m, x.float()) > 0


def test_the_bounds_are_useful():
    """On a mixture like a real one, half the window that they add is small beside the gap to the second component."""
    m, x = on_device(16, 70, 384, 10, spread=2.0)
    assert widest(m, x) < 4
    found, candidate_overflow = candidates(m, x)
    assert not candidate_overflow.any()
    assert ((found >= 0).sum(-1) == 1).all()


def candidates(m: Mixture, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    partials, _, _, seen = scanned(m, x)
    return triton_merge.candidates(partials, seen.norms, m.means.shape[0], 16)


def test_plain_pointers_scan_like_descriptors():
    m, x = on_device(20, 70, 100, 7)
    first = scanned(m, x)[0]
    plain = configs.Scan(tokens=32, width=2, features=64, warps=4, stages=2, descriptors=False)
    second = scanned(m, x, tiles=plain)[0]
    torch.testing.assert_close(first.lower, second.lower, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(first.upper, second.upper, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_fast_is_as_close_as_documented(per_component):
    m, x = on_device(8, 70, 384, 10, spread=2.0, per_component=per_component)
    x = torch.cat([x, 0.05 * tokens(m, 4)])
    fast = ops.log_prob(x, *m, m.woodbury(m.means.mean(0)), exact=False)
    truth = m.logits_fp64(x)
    error = (fast.log_prob.double() - torch.logsumexp(truth, -1)).abs()
    assert 1e-5 < error.max() < 0.5  # fp16 operands, not fp32's
    assert torch.equal(fast.components[:8, 0].long(), truth[:8].argmax(-1))
    held = fast.components >= 0
    kept = truth.gather(1, fast.components.long().clamp_min(0))
    torch.testing.assert_close(fast.logits[held].double(), kept[held], rtol=0, atol=0.5)


def test_regions_far_away_do_not_disturb_the_others():
    """One region a thousand times farther out (a beginning-of-text token's): its own bounds are wide, nobody else's."""
    m = mixture(70, 100, 5, spread=2.0).to(DEVICE)
    m.means[7] *= 1000
    x = tokens(m, 20)
    _, candidate_overflow = candidates(m, x)
    assert not candidate_overflow.any()
    torch.testing.assert_close(m.active(x).log_prob.double(), m.log_prob_fp64(x), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_input_dtypes(dtype):
    m, x = on_device(20, 20, 70, 3)
    x = x.to(dtype)
    torch.testing.assert_close(m.active(x).log_prob, m.active(x.float()).log_prob, rtol=0, atol=0)


def test_strides_and_no_tokens():
    m, x = on_device(10, 20, 37, 3)
    expected = m.active(x).log_prob
    assert torch.equal(m.active(x.t().contiguous().t()).log_prob, expected)
    padded = torch.zeros(10, 50, device=DEVICE)
    padded[:, 5:42] = x
    assert torch.equal(m.active(padded[:, 5:42]).log_prob, expected)
    assert m.active(x[:0]).components.shape == (0, 16)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_token_is_bad_alone(bad, exact):
    m, x = on_device(20, 20, 37, 3)
    woodbury = m.woodbury()
    check_a_bad_token_is_bad_alone(lambda x: ops.log_prob(x, *m, woodbury, exact=exact), x, 13, bad)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_a_bad_component_is_seen(exact):
    m = mixture(20, 37, 3).to(DEVICE)
    m.means[12, 3] = math.nan
    active = ops.log_prob(tokens(m, 8).nan_to_num(), *m, m.woodbury(), exact=exact)
    assert active.log_prob.isnan().all()
    assert (active.components == -1).all()


def test_very_negative_logits_and_a_zero_weight():
    m, x = on_device(10, 67, 40, 3)
    log_weights = m.log_weights.clone()
    log_weights[3] = -math.inf
    m = m._replace(log_weights=log_weights)
    x = x + 1e4
    active = m.active(x)
    torch.testing.assert_close(active.log_prob.double(), m.log_prob_fp64(x), rtol=1e-5, atol=0)
    assert not (active.components == 3).any()


def test_duplicated_components_are_all_found():
    """More equal components in one tile than it reports: candidates overflow, and all logits decide."""
    m = mixture(4, 40, 3, spread=3.0).to(DEVICE)
    m = Mixture(*(t.repeat_interleave(6, 0) if t.shape[0] == 4 else t for t in m))
    m = m._replace(log_weights=m.log_weights - math.log(6))
    active = m.active(tokens(m, 6))
    assert (active.counts == 6).all()
    sets = active.components[:, :6].sort(-1).values
    assert torch.equal(sets, (sets[:, :1] // 6 * 6) + torch.arange(6, device=DEVICE))


def test_two_runs_are_bitwise_equal_and_a_split_batch_equals_the_whole():
    m, x = on_device(20, 70, 50, 3, spread=0.3)
    whole = m.active(x)
    assert all(torch.equal(a, b) for a, b in zip(whole, m.active(x), strict=True))
    parts = [m.active(part) for part in (x[:3], x[3:17], x[17:])]
    for i, column in enumerate(whole):
        assert torch.equal(column, torch.cat([part[i] for part in parts]))


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("spread", [2.0, 0.05], ids=["one_hot", "diffuse"])
@pytest.mark.usefixtures("poisoned")
def test_gradients(spread, per_component):
    m, x = on_device(12, 20, 40, 3, spread=spread, per_component=per_component)
    woodbury = m.woodbury(m.means.mean(0))
    check_gradients(m, x, lambda *leaves: ops.log_prob(*leaves, woodbury).log_prob, seed=0)


def test_component_log_prob_and_its_gradient():
    m, x = on_device(7, 20, 40, 3)
    truth = reference.component_log_prob(x.double(), *m.to(torch.float64)[:3])
    torch.testing.assert_close(component_log_prob(m, x).double(), truth, rtol=1e-5, atol=1e-3)
    leaves = [t.clone().requires_grad_() for t in m[:3]]
    ops.component_log_prob(x, *leaves, m.woodbury()).sum().backward()
    wide = [t.double().requires_grad_() for t in m[:3]]
    reference.component_log_prob(x.double(), *wide).sum().backward()
    for a, b in zip(leaves, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "test", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(test):
    m, x = on_device(6, 5, 21, 2)
    f = m.woodbury()
    leaves = [t.clone().requires_grad_() for t in (x, *m)]
    args = (*leaves, *f.tensors(), 4, True, *f.scan)
    torch.library.opcheck(torch.ops.mfa_kernels.log_prob.default, args, test_utils=test)
    torch.library.opcheck(
        torch.ops.mfa_kernels.scan_rows.default, (f.rows, f.cholesky, f.scale, f.center, False), test_utils=test
    )


def test_the_module_runs_on_it():
    m, x = on_device(9, 20, 40, 3)
    mfa = MFA.from_parameters(*m[:3], m.log_weights.exp()).to(DEVICE)
    loss = mfa(x)
    loss.backward()
    torch.testing.assert_close(-loss.double(), m.log_prob_fp64(x).mean(), rtol=1e-5, atol=1e-4)
    code = mfa.encode(x, top_k=3)
    assert torch.equal(code.components[:, 0], m.logits_fp64(x).argmax(-1))
    assert mfa.reconstruct(x).isfinite().all()
    fast = MFA.from_parameters(*m[:3], m.log_weights.exp(), precision="fast").to(DEVICE)
    assert not torch.equal(fast.log_prob(x), mfa.log_prob(x))


def test_scan_rows_of_another_mixture_are_refused(monkeypatch):
    """They are handed over beside the factors, and tile by tile."""
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    m, other = (mixture(k, 40, 3).to(DEVICE) for k in (70, 65))
    x, woodbury, scan = tokens(m, 3), m.woodbury(), other.woodbury().scan
    assert scan[0].numel(), "or nothing is looked at"
    own = woodbury.scan
    for place, name in enumerate(("rows16", "scales", "offsets", "squares", "bounds", "worst", "reference")):
        bad = [*own[:place], own[place].flatten()[:-1], *own[place + 1 :]]
        with pytest.raises((ValueError, TypeError), match=f"log_prob: {name} must be"):
            torch.ops.mfa_kernels.log_prob(x, *m, *woodbury.tensors(), 4, True, *bad)
    with pytest.raises(ValueError, match="log_prob: squares must be"):
        torch.ops.mfa_kernels.log_prob(x, *m, *woodbury.tensors(), 4, True, *scan)

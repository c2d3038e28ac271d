"""What follows the scan, on partials and logits made by hand: every loop crosses three tiles and a ragged tail."""

from __future__ import annotations

import math

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.ops.common import triton_tokens
from mfa_kernels.ops.scan import triton_merge as merge
from mfa_kernels.ops.scan.triton_scan import TOP, Partials
from mfa_kernels.ops.scan.types import ActivePairs, activity_threshold
from mfa_kernels.ops.woodbury.triton_rows import TILE
from tests.helpers.mixtures import mixture, tokens
from tests.ops.scan.test_scan import check_slots

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]  # and on a CPU: interpreted
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def partials_of(logits: torch.Tensor) -> Partials:
    """What an exact scan would leave of (N, K) logits, K a multiple of the tile."""
    tiled = logits.unflatten(1, (-1, TILE))
    upper, index = tiled.topk(TOP, -1)
    first = TILE * torch.arange(tiled.shape[1], device=DEVICE).view(1, -1, 1)
    lower = tiled.amax(-1)
    sums = (tiled - lower.unsqueeze(-1)).exp().sum(-1)
    return Partials(upper.contiguous(), (index + first).int().contiguous(), lower.contiguous(), sums.contiguous())


TILES = 560  # 2240 entries of four, 1024 at a time


@pytest.fixture
def logits() -> torch.Tensor:
    """(6, K): a few components near the best, the others far below; two overflow, one of them in a tile."""
    out = -1e4 + 10 * normal(6, TILES * TILE)
    for n, near in enumerate(([7], [3, 9000, TILES * TILE - 1], range(0, 16 * 2000, 2000), range(0, 17 * 2000, 2000))):
        out[n, list(near)] = -normal(len(near)).abs()
    out[4, 130:135] = 0.0  # five of one tile, which reports four
    out[5, [128, 20_000]] = 0.0
    return out


def test_candidates(logits):
    components = logits.shape[1]
    norms = torch.ones(3, 6, device=DEVICE)
    norms[0, 5] = math.nan
    found, overflow = merge.candidates(partials_of(logits), norms, components, 16)
    near = logits >= logits.amax(-1, keepdim=True) - activity_threshold(components, torch.float32)
    assert overflow.tolist() == [0, 0, 0, 1, 1, 0]
    for n in range(3):
        held = found[n][found[n] >= 0]
        assert torch.equal(held.sort().values.long(), near[n].nonzero().squeeze(-1))
    assert (found[3:] == -1).all()  # two overflow, one is not finite


def test_finish_fast(logits):
    active = ActivePairs.empty(6, 20, logits)
    merge.finish_fast(partials_of(logits), torch.zeros(6, device=DEVICE), True, logits.shape[1], active)
    torch.testing.assert_close(active.log_prob, torch.logsumexp(logits, -1), rtol=1e-6, atol=1e-5)
    seen = torch.tensor([0, 1, 2, 3, 5], device=DEVICE)
    check_slots(ActivePairs(*(t[seen] for t in active)), logits[seen].double(), 20, 1e-5)
    assert active.counts[4] == 21  # a tile may hide more than it reported


@pytest.mark.parametrize("slots", [5, 16, 64, 65, 200])
def test_finish_all_logits(slots):
    """Slots in the kernel up to 64, by sorting beyond; K crosses three blocks of 2048."""
    components, index = 5003, torch.tensor([4, 1, 7, 0, 2], device=DEVICE).int()
    logits = 8 * normal(5, components)
    logits[1, 17] = math.nan
    logits[2] = -math.inf
    logits[3, :3000] = -1e5
    count = torch.tensor([4], device=DEVICE).int()  # the last row is not to be read
    out = ActivePairs.empty(9, slots, logits)
    for t in out:
        t.fill_(77)
    merge.finish_all_logits(logits, index, count, components, out)
    active = ActivePairs(*(t[index[:4].long()] for t in out))
    assert active.log_prob[1].isnan()
    assert active.log_prob[2].isnan()
    assert (active.components[1:3] == -1).all()
    assert (active.counts[1:3] == 0).all()
    good = torch.tensor([0, 3], device=DEVICE)
    torch.testing.assert_close(active.log_prob[good], torch.logsumexp(logits[good], -1), rtol=1e-6, atol=1e-5)
    check_slots(ActivePairs(*(t[good] for t in active)), logits[good].double(), slots, 1e-6)
    untouched = torch.tensor([2, 3, 5, 6, 8], device=DEVICE)
    assert all((t[untouched] == 77).all() for t in out)


@pytest.mark.parametrize("slots", [16, 100])
@pytest.mark.parametrize("overflow", [[0], [0, 2, 5], [3], [], [0, 1, 2, 3, 4, 5]], ids=str)
def test_what_pads_the_tokens_that_overflow_writes_nothing_of_its_own(overflow, slots):
    """`gather` pads their numbers with 0, and token 0 may be one of them or not."""
    components = 300
    logits = 8 * normal(6, components)
    flags = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    flags[overflow] = 1
    index, count = merge.gather(flags)
    rows = logits[index.long()]
    rows[len(overflow) :] = math.nan
    out = ActivePairs.empty(6, slots, logits)
    for t in out:
        t.fill_(77)
    merge.finish_all_logits(rows, index, count, components, out)
    others = [n for n in range(6) if n not in overflow]
    assert all((t[others] == 77).all() for t in out)
    if overflow:
        active = ActivePairs(*(t[overflow] for t in out))
        torch.testing.assert_close(active.log_prob, torch.logsumexp(logits[overflow], -1), rtol=1e-6, atol=1e-5)
        check_slots(active, logits[overflow].double(), slots, 1e-6)


def test_all_active_pairs_of_a_first_token_that_overflows(monkeypatch):
    """A diffuse mixture of more than 64 components: through `encode` without a cap, and `reconstruct`."""
    m = mixture(90, 24, 2, spread=0.05)
    mfa = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()).to(DEVICE)
    x = tokens(m, 7).to(DEVICE)
    x[3:5] += 100 * m.means[8].to(DEVICE)  # not every token overflows
    reference = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()).double()
    wanted = reference.responsibilities(x.cpu().double())
    wanted_rebuilt = reference.reconstruct(x.cpu().double())
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    with torch.no_grad():
        code = mfa.encode(x, top_k=None)
        rebuilt = mfa.reconstruct(x)
    assert code.components.min() >= -1
    assert code.components.max() < 90
    held = code.components.cpu() >= 0
    dense = torch.zeros(7, 90, dtype=torch.float64)
    dense.scatter_add_(1, code.components.cpu().clamp_min(0), code.responsibilities.cpu().double().where(held, 0))
    torch.testing.assert_close(dense, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rebuilt.cpu().double(), wanted_rebuilt, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 1000, 10_000])
def test_gather(count):
    """Flags in blocks of 4096."""
    flags = (normal(count) > 0.5).int()
    index, total = merge.gather(flags)
    assert total.item() == flags.sum()
    assert torch.equal(index[: total.item()].long(), flags.nonzero().squeeze(-1))


@pytest.mark.parametrize("squares", [False, True])
def test_tokens(squares):
    """Features in blocks of 1024; what pads them is zero, and the distances to the fp16 values are as reported."""
    x = 50 * normal(3, 2500)
    x[1] *= 1e6
    scale, center = normal(2500).abs() + 0.1, normal(2500)
    seen = triton_tokens.scan_tokens(x, scale, center, 2560, squares)
    y = (x.double() - center.double()) * scale.double()
    s = seen.scales.double().unsqueeze(-1)
    assert (seen.tokens[:, 2500:] == 0).all()
    held = seen.tokens[:, :2500].double()
    assert (held.abs().amax(-1) < 128).all()
    assert (seen.norms[0].double() >= y.norm(dim=-1)).all()
    assert (seen.norms[0].double() <= 1.01 * y.norm(dim=-1)).all()
    eta = (y - s * held).norm(dim=-1)
    assert (seen.norms[1].double() >= eta).all()
    assert (seen.norms[1].double() <= 1.1 * eta).all()
    torch.testing.assert_close(seen.length.double(), y.square().sum(-1), rtol=1e-5, atol=0)
    if squares:
        psi = (y.square() - s.square() * seen.squares[:, :2500].double()).abs().sum(-1)
        assert (seen.norms[2].double() >= psi).all()
        assert (seen.norms[2].double() <= 1.1 * psi).all()

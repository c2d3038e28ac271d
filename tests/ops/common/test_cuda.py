"""csrc/cuda: the kernels on the CPU against the float64 oracle, and what nvcc makes of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp, cuda
from mfa_kernels.ops.scan.portable import dense
from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.woodbury import reference
from mfa_kernels.ops.woodbury.portable import portable
from mfa_kernels.ops.woodbury.types import Woodbury
from tests.cuda_emulation import A100, H100, Chip, Emulation
from tests.helpers import budgets
from tests.helpers.mixtures import Mixture, drawn, mixture, tokens
from tests.ops.scan.test_scan import check_slots

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]


@pytest.fixture(params=[pytest.param("emulated", marks=pytest.mark.host), "device"])
def kernels(request: pytest.FixtureRequest) -> Any:
    """The kernels on the CPU, and on a GPU where there is one: the same functions."""
    if request.param == "device":
        if cuda.library() is None:
            pytest.skip("no CUDA device with nvcc: the kernels run emulated")
        return OnDevice()
    if shutil.which("g++") is None:
        warnings.warn("no g++: the CUDA kernels are not emulated", stacklevel=1)
        pytest.skip("no g++")
    return Emulation(SMALL)


class OnDevice:
    """The real library, for CPU tensors."""

    chip: Chip  # which the emulation would have; a device has its own

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
            return tuple(t.cpu() for t in getattr(cuda.library(), name)(*moved))

        return call


SMALL = Chip(3, 24_000, 26_048)
"""So small that every axis takes several tiles: three processors, and few tokens to a block."""

ROOMY = Chip(3, 100_000, 102_048)
"""Where sixteen tokens share a block."""


# Stage 0


def check_woodbury(found: tuple[Tensor, ...], m: Mixture) -> None:
    """Rows, Cholesky factor and log-determinant, made in float64 and rounded: each entry within its budget.

    The kernel whitens in float32, so what is added is |L^-1| |W~^T|, and so on for the others.
    """
    rows, lower, log_det = portable(*m.to(torch.float64)[:3])
    whitened = m.loadings.double().abs() * m.noise_variance.double().rsqrt().expand_as(m.means).unsqueeze(-1)
    inverse = torch.linalg.inv(lower).abs()
    sizes = rows.abs()
    sizes[:, 1 : 1 + m.loadings.shape[2]] += inverse @ lower.abs() @ inverse @ whitened.mT
    gram = whitened.mT @ whitened
    of_lower = lower.abs() + lower.abs() @ inverse @ gram @ inverse.mT
    of_log_det = m.noise_variance.double().log().abs().sum(-1) + log_det.abs()
    of_log_det = of_log_det + (inverse @ gram @ inverse.mT).diagonal(dim1=-2, dim2=-1).sum(-1)
    for name, *tensors in zip(
        ("rows", "cholesky", "log_det"), found, (rows, lower, log_det), (sizes, of_lower, of_log_det)
    ):
        budgets.check(*tensors, name)


WOODBURY = [(1, 1, 1), (5, 130, 0), (3, 643, 1), (3, 333, 10), (2, 170, 17), (2, 71, 40), (1, 30, 64)]


def chip_for_tiles(features: int, rank: int) -> Chip:
    """Whose shared memory holds a bit less than a third of a component's features."""
    tile = max(4, features // 3 // 4 * 4)
    stride = rank + (6 - rank % 4) % 4
    shared = 8 * (rank * stride + rank + 32) + 4 * tile * (1 + (rank | 1))
    return Chip(3, shared, 2 * (shared + 1024))


@pytest.mark.parametrize("shape", WOODBURY, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_woodbury(kernels, shape, per_component):
    kernels.chip = chip_for_tiles(*shape[1:])
    m = mixture(*shape, per_component=per_component)
    found = kernels.woodbury(m.means, m.loadings, m.noise_variance)
    check_woodbury(found, m)
    assert torch.equal(found[0][:, 0], m.means)
    assert torch.equal(found[1], found[1].tril())


@pytest.mark.host
def test_woodbury_take_several_tiles():
    """What the shapes above are chosen for: at least three tiles of features and a ragged one."""
    for _, features, rank in WOODBURY[1:]:
        tile = Emulation(chip_for_tiles(features, rank)).woodbury_tile(features, rank)
        assert 3 * tile < features
        assert features % tile
    # On the real chips two blocks fit a processor, and most of a component stays in shared memory.
    assert Emulation(H100).woodbury_tile(4096, 10) > 4096 / 2
    assert Emulation(A100).woodbury_tile(2304, 10) > 2304 / 2
    assert Emulation(H100).woodbury_tile(64, 10) == 64


@pytest.mark.host
def test_woodbury_are_deterministic():
    m = mixture(3, 333, 10)
    found = [Emulation(chip_for_tiles(333, 10), order).woodbury(*m[:3]) for order in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_woodbury_of_nearly_collinear_loadings(kernels):
    """Products in float32 lose the definiteness of M; what is found must be what float64 finds."""
    m = mixture(3, 264, 4, dtype=torch.float64)
    m = m._replace(loadings=1e3 * (m.loadings[..., :1] + 1e-3 * m.loadings)).to(torch.float32)
    _, cholesky, log_det = kernels.woodbury(m.means, m.loadings, m.noise_variance)
    _, lower, wanted = reference.woodbury(m.loadings.double(), m.noise_variance.double())
    torch.testing.assert_close(log_det.double(), wanted, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(cholesky.double(), lower, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_broken_parameters_spoil_their_own_component(kernels, rank):
    m = mixture(5, 130, rank, per_component=True)
    healthy = kernels.woodbury(m.means, m.loadings, m.noise_variance)
    m.noise_variance[1, 7] = -1.0
    m.noise_variance[1, 7 + 64] = -1.0  # two of them: their logarithms must not meet as a product
    m.noise_variance[2, 129] = torch.nan
    m.noise_variance[3, 0] = 0.0
    if rank:
        m.loadings[4, 40, 1] = torch.inf
    rows, cholesky, log_det = kernels.woodbury(m.means, m.loadings, m.noise_variance)
    assert log_det[1].isnan()
    assert log_det[2].isnan()
    assert not log_det[3].isfinite()
    assert log_det[4].isnan() if rank else log_det[4] == healthy[2][4]
    assert all(torch.equal(found[0], wanted[0]) for found, wanted in zip((rows, cholesky, log_det), healthy))


# Stage 1, a few tokens


def rounded_up(t: Tensor) -> Tensor:
    return (t * (1 + 1e-6)).float()


def scale_to_fp16(largest: Tensor) -> Tensor:
    """The power of two that brings the largest value into [32, 64)."""
    return torch.where(largest > 0, torch.exp2(largest.log2().floor() - 5), 1.0)


def scan_view(woodbury: Woodbury) -> tuple[Tensor, ...]:
    """rows, scales, offsets, squares and bounds of woodbury/triton_rows.py, by their definitions in float64."""
    components, groups, features = woodbury.rows.shape
    rank, padded, tiles = groups - 1, -(-features // 64) * 64, -(-components // 64)
    wide = woodbury.rows.double()
    m = (wide[:, 0] - woodbury.center) * woodbury.scale
    b = wide[:, 1:]
    beta = scale_to_fp16(b.abs().flatten(1).amax(1) if rank else torch.zeros(components).double())
    sigma = scale_to_fp16(m.abs().amax(1))
    held = torch.zeros(tiles * 64, groups, padded, dtype=torch.float16)
    held[:components, :rank, :features] = (b / beta[:, None, None]).half()
    held[:components, rank, :features] = (m / sigma[:, None]).half()
    packed = by_tile(held)
    held = held[:components, :, :features].double()
    g = max(64, 1 << (features - 1).bit_length()) * 2.0**-23
    mu, phi, tiny = m.norm(dim=1), b.flatten(1).norm(dim=1), 2.0**-20
    eps_m = (m - held[:, rank] * sigma[:, None]).norm(dim=1) + tiny * mu
    eps_b = (b - held[:, :rank] * beta[:, None, None]).flatten(1).norm(dim=1) + tiny * phi
    alpha = torch.linalg.matrix_norm(b, 2) if rank else torch.zeros_like(mu)
    e1, m1 = eps_b + g * (phi + eps_b), eps_m + g * (mu + eps_m)
    bounds = torch.stack([m1, (1 + g) * (mu + eps_m), e1, alpha + e1, tiny * phi * mu, 0 * mu, 0 * mu])
    scales = torch.stack([beta, sigma, torch.ones_like(beta)]).float()
    offsets = torch.zeros(tiles * 64, rank)
    offsets[:components] = torch.einsum("krd,kd->kr", b, m) / beta[:, None]
    pad = (0, tiles * 64 - components)
    scales, bounds = (torch.nn.functional.pad(t, pad, value=torch.nan) for t in (scales, rounded_up(bounds)))
    return packed, scales, by_tile(offsets), m.square().sum(1), bounds


def by_tile(t: Tensor) -> Tensor:
    """(64 tiles, G, ...) -> (tiles, G, 64, ...)."""
    return t.unflatten(0, (-1, 64)).transpose(1, 2).contiguous()


def exact_logits(x: Tensor, woodbury: Woodbury, constants: Tensor) -> Tensor:
    """Every logit, in the dtype of the factors, from differences."""
    return dense(x.to(constants.dtype), woodbury, constants)


def widened(woodbury: Woodbury) -> Woodbury:
    return Woodbury(*(t.double() for t in woodbury.tensors()), woodbury.per_component)


def chip_for(count: int) -> Chip:
    return ROOMY if count == 16 else SMALL


def problem(shape: tuple[int, int, int], count: int, dtype: torch.dtype, spread: float = 1.0):
    """x, woodbury, constants, and the scan's view."""
    m = mixture(*shape, spread=spread)
    x = tokens(m, count).to(dtype)
    rows, cholesky, log_det = portable(m.means, m.loadings, m.noise_variance)
    center = m.means.mean(0) + 0.1
    woodbury = Woodbury(rows, cholesky, log_det, m.noise_variance.rsqrt(), center, False)
    return x, woodbury, woodbury.constants(m.log_weights), scan_view(woodbury)


SCANS = [  # (K, D, R), N, dtype
    ((1, 5, 0), 1, torch.float32),
    ((70, 430, 0), 3, torch.bfloat16),
    ((67, 450, 1), 2, torch.float32),
    ((45, 330, 3), 9, torch.float16),
    ((5, 64, 6), 1, torch.float32),
    ((131, 450, 10), 1, torch.bfloat16),
    ((131, 330, 10), 16, torch.float32),
    ((66, 450, 17), 3, torch.float16),
    ((19, 200, 40), 16, torch.bfloat16),
    ((3, 70, 64), 1, torch.float32),
    ((192, 330, 10), 1, torch.float32),
    ((1700, 20, 2), 1, torch.float16),
    ((6, 1605, 1), 1, torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "count", "dtype"), SCANS, ids=str)
def test_scan(kernels, shape, count, dtype):
    """Exact logits lie within the bounds; bounds are what the formula says, and logits what fp16 operands give."""
    kernels.chip = chip_for(count)
    x, woodbury, constants, view = problem(shape, count, dtype)
    packed, scales, offsets, squares, bounds = view
    found, error, _ = kernels.scan(x, woodbury.scale, woodbury.center, *view, constants)
    y = (x.float() - woodbury.center) * woodbury.scale
    wide_y = (x.double() - woodbury.center) * woodbury.scale
    common = 0.5 * wide_y.square().sum(1, keepdim=True)
    exact = exact_logits(x, widened(woodbury), constants.double()) + common
    assert ((found - exact).abs() <= error).all()

    s = scale_to_fp16(y.abs().amax(1, keepdim=True))
    rounded = (y / s).half().double()
    rows = packed.transpose(1, 2).flatten(0, 1)[: shape[0], :, : shape[1]].double()
    products = s.unsqueeze(-1) * torch.einsum("nd,kgd->nkg", rounded, rows)
    beta, sigma = scales[:2, : shape[0]]
    t = beta[:, None] * (products[..., :-1] - offsets.transpose(1, 2).flatten(0, 1)[: shape[0]])
    p = sigma * products[..., -1]
    square = t.square().sum(-1)
    wanted = constants - 0.5 * squares + p + 0.5 * square
    sizes = constants.abs() + squares + p.abs() + square
    assert ((found - wanted).abs() <= 2.0**-20 * sizes).all()

    a = wide_y.norm(dim=1, keepdim=True)
    eta = (wide_y - rounded * s).norm(dim=1, keepdim=True)
    m1, m2, e1, e2, e3 = bounds[:5, : shape[0]].double()
    e = a * e1 + eta * e2 + e3
    formula = a * m1 + eta * m2 + e * (square.sqrt() + 0.5 * e) + 2.0**-20 * sizes
    assert ((error / formula - 1).abs() <= 0.01).all()


@pytest.mark.host
def test_scans_take_several_tiles():
    """What the shapes above are chosen for: every split of a component, several rounds of components for each team,
    several batches of features and a ragged one, tokens in two tiles and in groups."""
    plans = []
    for (components, features, rank), count, _ in SCANS:
        padded = -(-features // 64) * 64
        plans.append(Emulation(chip_for(count)).scan_plan(count, components, padded, rank))
        together = next(p for p in (1, 2, 4, 8, 16) if p >= min(rank + 1, 16))
        rounds = -(-components // (16 // together)) / (plans[-1].blocks * 16 / plans[-1].splits)
        if components > 100:
            assert rounds > 3
        assert plans[-1].shared <= chip_for(count).shared_per_block
    assert {p.splits for p in plans} == {1, 2, 4, 8, 16}
    assert {p.token_groups for p in plans} >= {1, 2}
    assert {p.group > 8 for p in plans} == {False, True}


@pytest.mark.host
@pytest.mark.parametrize("chip", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("components", [512, 1000, 8192, 32768])
@pytest.mark.parametrize("features", [2304, 4096, 8192])
@pytest.mark.parametrize("count", [1, 16])
def test_the_scan_keeps_the_chip_busy(chip, components, features, count):
    """Warps that have nothing to do, because components do not divide evenly: less than one in five."""
    plan = Emulation(chip).scan_plan(count, components, features, 10)
    warps = plan.blocks * 16
    rounds = -(-components * plan.splits // warps)
    assert components * plan.splits / (rounds * warps) > 0.8
    assert plan.blocks * plan.token_groups > 0.9 * chip.processors
    assert plan.shared <= chip.shared_per_block


@pytest.mark.host
@pytest.mark.parametrize("case", [SCANS[5], SCANS[6], SCANS[7]], ids=str)
def test_few_tokens_are_deterministic(case):
    x, woodbury, constants, view = problem(*case, spread=0.3)
    arguments = (x, woodbury.rows, woodbury.scale, woodbury.center, *view, constants, 17.0, 8)
    found = [Emulation(chip_for(case[1]), order).few_tokens(*arguments) for order in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*found))


def check_active(
    found: tuple[Tensor, ...], x: Tensor, woodbury: Woodbury, constants: Tensor, threshold: float, slots: int
):
    """The output against the float64 oracle of the same factors: each logit within its budget."""
    log_prob, components, logits, counts = found
    oracle = exact_logits(x, widened(woodbury), constants.double())
    rows = woodbury.rows.double()
    v = (x.double().unsqueeze(1) - rows[:, 0]) * woodbury.scale.double()
    t, summed = (torch.einsum("nkd,krd->nkr", v, a).abs() for v, a in ((v, rows[:, 1:]), (v.abs(), rows[:, 1:].abs())))
    terms = constants.double().nan_to_num(0, 0, 0).abs() + 0.5 * v.square().sum(-1) + (t * summed).sum(-1)
    carried = (oracle.softmax(-1) * terms).sum(-1) + oracle.logsumexp(-1).abs()
    budgets.check(log_prob, oracle.logsumexp(-1), carried, "log p(x)")
    budget = budgets.ROUNDINGS * budgets.EPS * terms.amax(1)
    best = oracle.amax(1, keepdim=True)
    for n in range(x.shape[0]):
        order = oracle[n].argsort(descending=True)
        active = order[oracle[n, order] >= best[n] - threshold]
        assert counts[n] == (len(active) if len(active) <= slots else slots + 1)
        held = min(len(active), slots)
        assert (components[n, held:] == -1).all()
        assert (logits[n, held:] == -torch.inf).all()
        kept = components[n, :held].long()
        assert sorted(set(kept.tolist())) == sorted(kept.tolist())
        assert (logits[n, :held].diff() <= 0).all()
        # In the oracle's order, but for ties within rounding.
        assert ((logits[n, :held] - oracle[n, active[:held]]).abs() <= budget[n]).all()
        assert ((logits[n, :held] - oracle[n, kept]).abs() <= budget[n]).all()


def checked(kernels: Any, x: Tensor, woodbury: Woodbury, view, constants: Tensor, threshold: float, slots: int):
    """What the kernels find, which is as it should be."""
    found = kernels.few_tokens(x, woodbury.rows, woodbury.scale, woodbury.center, *view, constants, threshold, slots)
    check_active(found, x, woodbury, constants, threshold, slots)
    return found


@pytest.mark.parametrize(("shape", "count", "dtype"), SCANS, ids=str)
@pytest.mark.parametrize("spread", [3.0, 0.2], ids=["one-hot", "near"])
def test_few_tokens(kernels, shape, count, dtype, spread):
    kernels.chip = chip_for(count)
    x, woodbury, constants, view = problem(shape, count, dtype, spread)
    threshold = activity_threshold(shape[0], torch.float32)
    found = kernels.few_tokens(x, woodbury.rows, woodbury.scale, woodbury.center, *view, constants, threshold, 16)
    decided = found[3] >= 0
    assert decided.all() or spread == 0.2
    check_active([t[decided] for t in found], x[decided], woodbury, constants, threshold, 16)
    undecided = [t[~decided] for t in found]
    assert undecided[0].isnan().all()
    assert (undecided[1] == -1).all()
    assert (undecided[2] == -torch.inf).all()


def test_more_active_than_slots(kernels):
    """Eight copies of a component, its weight shared out: ties by component, and four slots overflow."""
    x, woodbury, constants, _ = problem((1, 70, 3), 3, torch.float32)
    eight = (
        woodbury.rows.expand(8, -1, -1).contiguous(),
        *(t.expand(8, *t.shape[1:]).contiguous() for t in (woodbury.cholesky, woodbury.log_det)),
    )
    woodbury = Woodbury(*eight, woodbury.scale, woodbury.center, False)
    constants = (constants - torch.tensor(8.0).log()).expand(8).contiguous()
    for slots, counts in ((4, 5), (8, 8), (11, 8)):
        found = checked(kernels, x, woodbury, scan_view(woodbury), constants, 12.0, slots)
        assert (found[3] == counts).all()
        assert found[1][0, : min(slots, 8)].tolist() == list(range(min(slots, 8)))


def test_more_candidates_than_are_computed(kernels):
    """17 candidates are left to the caller; with a smaller threshold the same token has fewer."""
    x, woodbury, constants, view = problem((17, 70, 3), 3, torch.float32, spread=9.0)
    arguments = woodbury.rows, woodbury.scale, woodbury.center, *view, constants, 1e6, 16
    log_prob, components, logits, counts = kernels.few_tokens(x, *arguments)
    assert (counts == -1).all()
    assert log_prob.isnan().all()
    assert (components == -1).all()
    assert (logits == -torch.inf).all()
    checked(kernels, x, woodbury, view, constants, 12.0, 16)


def test_tokens_that_are_not_finite(kernels):
    x, woodbury, constants, view = problem((37, 130, 5), 4, torch.float32, spread=3.0)
    arguments = woodbury.rows, woodbury.scale, woodbury.center, *view, constants, 20.0, 8
    healthy = kernels.few_tokens(x, *arguments)
    x[1, 3], x[2, 129] = torch.nan, -torch.inf
    log_prob, components, logits, counts = kernels.few_tokens(x, *arguments)
    for n in (1, 2):
        assert log_prob[n].isnan()
        assert (components[n] == -1).all()
        assert (logits[n] == -torch.inf).all()
        assert counts[n] == 0
    for found, wanted in zip((log_prob, components, logits, counts), healthy):
        assert torch.equal(found[[0, 3]], wanted[[0, 3]])


def test_components_without_weight_are_no_candidates(kernels):
    x, woodbury, constants, view = problem((40, 130, 5), 3, torch.float32, spread=3.0)
    constants[3:] = -torch.inf
    found = checked(kernels, x, woodbury, view, constants, 20.0, 8)
    assert (found[1] < 3).all()


def test_outliers_far_out(kernels):
    """Dimensions of 1e4 (residual streams have them), which a squared norm in fp16 would not survive."""
    x, woodbury, constants, _ = problem((37, 130, 5), 3, torch.float32, spread=3.0)
    far = torch.zeros(130)
    far[[5, 77]] = torch.tensor([1e4, -3e4])
    woodbury.rows[:, 0] += far
    woodbury.center.add_(far)
    x = x + far
    checked(kernels, x, woodbury, scan_view(woodbury), constants, 20.0, 8)


def test_on_the_rows_that_the_library_makes(kernels):
    """`scan_rows` and this path agree on the layout, and its bounds hold."""
    triton_rows = pytest.importorskip("mfa_kernels.ops.woodbury.triton_rows")
    x, woodbury, constants, own = problem((70, 130, 3), 3, torch.float32, spread=3.0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    view = triton_rows.scan_rows(Woodbury(*(t.to(device) for t in woodbury.tensors()), False))
    view = [t.cpu() for t in view[: len(own)]]  # the kernel does not read `worst`
    assert [t.shape for t in view] == [t.shape for t in own]
    exact = exact_logits(x, widened(woodbury), constants.double())
    exact = exact + 0.5 * ((x.double() - woodbury.center) * woodbury.scale).square().sum(1, keepdim=True)
    found, error, _ = kernels.scan(x, woodbury.scale, woodbury.center, *view, constants)
    assert ((found - exact).abs() <= error).all()
    checked(kernels, x, woodbury, view, constants, 20.0, 8)


@pytest.mark.host
@pytest.mark.parametrize("spread", [3.0, 0.05], ids=["one_hot", "diffuse"])
def test_the_operators_use_them(monkeypatch, spread):
    """Stage 0 and few tokens through torch.ops.mfa_kernels; a token with too many candidates is decided densely."""
    pytest.importorskip("triton")
    if cuda.library() is not None:
        pytest.skip("tests/gpu does it on the device")
    used = []

    class Recorded(Emulation):
        def woodbury(self, *arguments: Any) -> Any:
            used.append("factors")
            return super().woodbury(*arguments)

        def few_tokens(self, *arguments: Any) -> Any:
            used.append("few_tokens")
            return super().few_tokens(*arguments)

    kernels = Recorded(SMALL)
    monkeypatch.setattr(cuda, "library", lambda: kernels)
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    m, x = drawn(5, 70, 130, 3, spread=spread)
    active = m.active(x, slots=8, center=m.means.mean(0))
    assert used == ["factors", "few_tokens"]
    truth = m.logits_fp64(x)
    torch.testing.assert_close(active.log_prob.double(), torch.logsumexp(truth, -1), rtol=1e-6, atol=1e-3)
    check_slots(active, truth, 8, 1e-3)
    assert (active.counts > 8).any() == (spread < 1)
    sixteen_slots_at_most = m.active(x, slots=17)  # more are the Triton path's
    assert used.count("few_tokens") == 1
    torch.testing.assert_close(sixteen_slots_at_most.log_prob, active.log_prob, rtol=1e-6, atol=1e-3)


# The compiler


def ptxas(architecture: int, folder: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of spills (and other local memory) of every kernel."""
    compiler = cuda.nvcc()
    if compiler is None:
        warnings.warn("no nvcc: what it makes of the CUDA kernels is not tested", stacklevel=1)
        pytest.skip("no nvcc")
    command = [compiler, "-cubin", f"-arch=sm_{architecture}", *cuda.CUDA_FLAGS, "-Xptxas", "-v"]
    command += [str(cpp.source_folder("cuda") / "kernels.cu"), "-o", str(folder / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return {name: (int(registers), sum(map(int, local))) for name, *local, registers in entries}


@pytest.mark.host
@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.more)])
def test_nvcc_compiles_without_spills(architecture, tmp_path):
    kernels = ptxas(architecture, tmp_path)
    assert len(kernels) == 8 + 2 + 1  # woodbury by rank, scan by tokens, finish
    for name, (registers, local) in kernels.items():
        assert local == 0, f"{name} spills {local} bytes"
        # Threads of a block times blocks to a processor, as the kernels' launch bounds have it.
        threads = 512 if "woodbury" not in name else 2 * (256 if re.search(r"Li[123]E", name) else 128)
        assert registers * threads <= 65536

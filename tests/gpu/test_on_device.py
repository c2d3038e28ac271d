"""The whole public face on a GPU, against float64 on the same GPU: `pytest -m gpu`.

MFA_KERNELS_TEST_DEVICE=cpu rehearses every test that is not about CUDA itself on the CPU.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA, ops, steer
from mfa_kernels.mixture import functional
from mfa_kernels.ops.common import backends
from mfa_kernels.ops.kmeans.op import nearest
from mfa_kernels.ops.pairs import reference as pairs_reference
from mfa_kernels.ops.scan import reference
from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.statistics.op import SufficientStatistics
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, drawn, tokens
from tests.ops.scan import test_scan
from tests.ops.scan.test_scan import check_slots

DEVICE = os.environ.get("MFA_KERNELS_TEST_DEVICE", "cuda")
EPS = torch.finfo(torch.float32).eps
on_cuda = DEVICE == "cuda"
cuda_only = pytest.mark.skipif(not on_cuda, reason="about CUDA itself")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(on_cuda and not torch.cuda.is_available(), reason="no CUDA device"),
]

# (N, K, D, R). Tiles hold up to 128 tokens, 128 components, and 64 or 128 features: three of each and a ragged tail.
# Every rank and every size of tile is one more compilation of each kernel, so shapes share them.
SHAPES = [
    (0, 401, 400, 10),
    (1, 401, 400, 10),
    (4, 401, 400, 10),
    (16, 401, 400, 10),
    (1000, 401, 400, 10),
    (1000, 1, 70, 10),
    (130, 401, 70, 0),
    (130, 401, 70, 1),
    (130, 401, 70, 17),
]
NOISE = pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
SPREAD = pytest.mark.parametrize("spread", [3.0, 0.05], ids=["one_hot", "diffuse"])


@pytest.fixture
def kernels() -> None:
    """Skips where CUDA tensors are served by plain PyTorch, which reads sizes back to the host."""
    if backends.serving(torch.empty(1, device=DEVICE), 10) == "portable":
        pytest.skip("CUDA tensors are served by plain PyTorch")


def problem(
    shape: tuple[int, int, int, int], per_component: bool = False, spread: float = 3.0, dtype=torch.float32
) -> tuple[Mixture, Tensor]:
    """A mixture and draws from it, on the device."""
    return drawn(*shape, device=DEVICE, per_component=per_component, spread=spread, dtype=dtype)


def module(m: Mixture, **options: Any) -> MFA:
    return MFA.from_parameters(*m[:3], m.log_weights.exp(), **options)


def dense(m: Mixture, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Every logit (N, K) by the formula, in slices of tokens: it forms N x K x D."""
    m, x = m.to(dtype), x.to(dtype)
    step = max(1, (1 << 24) // m.means.numel())
    parts = [m.log_weights + reference.component_log_prob(part, *m[:3]) for part in x.split(step)]
    return torch.cat(parts)


def within_budget(found: Tensor, m: Mixture, x: Tensor) -> bool:
    """Whether every log p(x) is within its budget."""
    logits = dense(m, x)
    off = budgets.roundings(found, torch.logsumexp(logits, -1), Terms(m, x).log_prob(logits))
    return off <= budgets.ROUNDINGS


def relative(found: Tensor, wanted: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


# log p(x) and the active pairs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@NOISE
@SPREAD
@pytest.mark.usefixtures("poisoned")
def test_log_prob_and_active_pairs(shape, per_component, spread):
    m, x = problem(shape, per_component, spread)
    active = m.active(x, center=m.means.mean(0))
    assert within_budget(active.log_prob, m, x)
    if len(x):
        logits = dense(m, x)
        tolerance = 3 * max(float((dense(m, x, torch.float32).double() - logits).abs().max()), 1e-6)
        check_slots(active, logits, 16, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [3, 300])
@NOISE
def test_dtypes_of_x(dtype, count, per_component):
    m, x = problem((count, 401, 400, 10), per_component)
    x = x.to(dtype)
    assert within_budget(m.active(x).log_prob, m, x.float())


@NOISE
def test_double_parameters(per_component):
    m, x = problem((130, 37, 70, 3), per_component, 0.3, torch.float64)
    torch.testing.assert_close(m.active(x).log_prob, torch.logsumexp(dense(m, x), -1), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(m.active(x).log_prob, m.distribution().log_prob(x), rtol=1e-11, atol=1e-9)


def test_wide_features():
    m, x = problem((70, 300, 4100, 10))
    assert within_budget(m.active(x).log_prob, m, x)
    assert not within_budget(m.active(x.bfloat16()).log_prob, m, x), "the budget has to see the rounding of x"


def test_outlier_dimensions_and_close_components():
    """Two dimensions near 3000 and -1500, as in residual streams; components closer than a rounding of |x|^2."""
    m = test_scan.outlier_dimensions(10)
    x = tokens(m, 1000).to(DEVICE)
    m = m.to(DEVICE)
    truth = dense(m, x)
    for center in (m.means.mean(0), torch.zeros_like(m.means[0])):
        active = m.active(x, center=center)
        assert (active.components[:, 0] == truth.argmax(-1)).double().mean() > 0.999
        assert within_budget(active.log_prob, m, x)


@NOISE
def test_all_logits_very_negative(per_component):
    m, x = problem((130, 131, 70, 10), per_component)
    x = x + 1e4  # K is no multiple of any tile: a padding lane of 0 would win
    truth = torch.logsumexp(dense(m, x), -1)
    assert (truth < -1e8).all()
    torch.testing.assert_close(m.active(x).log_prob.double(), truth, rtol=1e-5, atol=0)


def test_components_without_weight():
    m, x = problem((130, 131, 70, 10))
    log_weights = m.log_weights.clone()
    log_weights[::2] = -math.inf
    m = m._replace(log_weights=log_weights)
    active = m.active(x)
    assert (active.components[active.components >= 0] % 2 == 1).all()
    assert within_budget(active.log_prob, m, x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("count", [3, 300])
def test_a_bad_token_is_bad_alone(bad, count):
    m, x = problem((count, 401, 400, 10))
    expected = m.active(x)
    x = x.clone()
    x[2, 5] = bad
    leaves = [t.clone().requires_grad_() for t in (x, *m)]
    active = Mixture(*leaves[1:]).active(leaves[0])
    others = torch.arange(count, device=x.device) != 2
    assert active.log_prob[2].isnan()
    assert (active.components[2] == -1).all()
    assert torch.equal(active.log_prob[others], expected.log_prob[others])
    active.log_prob[others].sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves[1:])
    good = [t.clone().requires_grad_() for t in m]
    Mixture(*good).active(x[others]).log_prob.sum().backward()
    for leaf, wanted in zip(leaves[1:], good):
        assert relative(leaf.grad, wanted.grad) < 1e-5


def test_views_and_strides():
    m, x = problem((130, 131, 70, 10))
    expected = m.active(x).log_prob
    assert torch.equal(m.active(x.t().contiguous().t()).log_prob, expected)
    storage = torch.zeros(130 * 70 + 1, device=DEVICE)  # not aligned to 16 bytes
    storage[1:] = x.flatten()
    assert torch.equal(m.active(storage[1:].view(130, 70)).log_prob, expected)
    assert torch.equal(m.active(x[:1].expand(130, 70)).log_prob, m.active(x[:1].repeat(130, 1)).log_prob)


@SPREAD
def test_two_runs_are_bitwise_equal(spread):
    m, x = problem((1000, 401, 400, 10), spread=spread)
    test_scan.check_two_runs_are_bitwise_equal(m, x)


@NOISE
def test_fast_is_within_the_rounding_of_half_precision(per_component):
    """|error| <= |y| |m| 2^-10 + |t| |y| |B|_F 2^-10 and a little more: operands rounded to 11 bits, exact sums."""
    m, x = problem((300, 401, 400, 10), per_component)
    mfa = module(m, precision="fast")
    with torch.no_grad():
        mfa.center.copy_(m.means.mean(0))
        found = mfa.log_prob(x).double()
    assert found.shape == (300,)
    wide = m.to(torch.float64)
    center, lam = wide.means.mean(0), wide.noise_variance.rsqrt()
    truth = dense(m, x)
    best = truth.argmax(-1)
    y = ((x.double() - center) * (lam[best] if per_component else lam)).norm(dim=-1)
    mean = ((wide.means - center) * lam)[best].norm(dim=-1)
    rounding = 2.0**-10 * y * (mean + y + y * 10**0.5 + (y if per_component else 0))
    assert ((found - torch.logsumexp(truth, -1)).abs() <= rounding + 1e-3).all()


# Gradients


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@NOISE
@SPREAD
@pytest.mark.usefixtures("poisoned")
def test_gradients(shape, per_component, spread):
    m, x = problem(shape, per_component, spread)
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(5)).to(DEVICE)

    def gradients(log_prob, dtype: torch.dtype, slices: int = 1) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, *m)]
        for part, weight in zip(leaves[0].chunk(slices), upstream.chunk(slices)):
            (log_prob(part, Mixture(*leaves[1:])) * weight).sum().backward()
        return [t.grad for t in leaves]

    def formula(x: Tensor, m: Mixture) -> Tensor:
        return reference.log_prob(x, *m)

    slices = -(-x.shape[0] * m.means.numel() // (1 << 24))  # the formula forms N x K x D, several times
    wanted = gradients(formula, torch.float64, slices)
    found = gradients(lambda x, m: m.active(x, center=m.means.detach().mean(0)).log_prob, torch.float32)
    terms = Terms(m, x)
    sizes = terms.gradients(upstream.unsqueeze(-1) * terms.responsibilities(dense(m, x)))
    for name, *tensors in zip(("x", *Mixture._fields), found, wanted, sizes, strict=True):
        assert tensors[0].dtype == torch.float32
        budgets.check(*tensors, name)


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_asked_for(wanted):
    m, x = problem((130, 131, 70, 10))
    test_scan.check_only_the_gradients_asked_for(m, x, wanted)


def test_gradient_of_bf16_tokens():
    m, x = problem((130, 131, 70, 10))
    x = x.bfloat16().requires_grad_()
    m.active(x).log_prob.sum().backward()
    wide = x.detach().double().requires_grad_()
    reference.log_prob(wide, *m.to(torch.float64)).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert relative(x.grad, wide.grad) < 2**-8


def test_gradient_through_the_logits_of_the_pairs():
    m, x = problem((50, 12, 40, 4), spread=1.0, dtype=torch.float64)
    test_scan.check_gradient_through_the_logits(m, x, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("shape", [(1, 401, 400, 10), (130, 131, 70, 10), (130, 35, 70, 0)], ids=str)
@NOISE
def test_component_log_prob_and_its_gradient(shape, per_component):
    m, x = problem(shape, per_component, 1.0)
    upstream = torch.randn(shape[0], shape[1], generator=torch.Generator().manual_seed(5)).to(DEVICE)
    results = []
    for kind in ("ours", "wide"):
        dtype = torch.float64 if kind == "wide" else torch.float32
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, *m[:3])]
        if kind == "ours":
            woodbury = ops.factorize(*(t.detach() for t in leaves[1:]), m.means.mean(0))
            out = ops.component_log_prob(*leaves, woodbury)
        else:
            out = reference.component_log_prob(*leaves)
        (out * upstream).sum().backward()
        results.append([out.detach(), *(t.grad for t in leaves)])
    terms = Terms(m._replace(log_weights=torch.zeros_like(m.log_weights)), x)
    sizes = [terms.logits(), *terms.gradients(upstream)]
    for name, *tensors in zip(("log p(x | k)", "x", *Mixture._fields), *results, sizes):
        budgets.check(*tensors, name)


# The module


@pytest.mark.parametrize("count", [1, 130])
@NOISE
@SPREAD
def test_encode_decode_reconstruct_assign(count, per_component, spread):
    m, x = problem((count, 131, 70, 10), per_component, spread)
    mfa, wide = module(m), m.to(torch.float64)
    logits = dense(m, x)
    r = logits.softmax(-1)
    with torch.no_grad():
        code, everything = mfa.encode(x, top_k=4), mfa.encode(x, top_k=None)
        decoded, reconstruction = mfa.decode(code), mfa.reconstruct(x)
        assert torch.equal(mfa.assign(x), everything.components[:, 0])
        torch.testing.assert_close(mfa.responsibilities(x).double(), r, rtol=0, atol=2e-3)
    assert (r.gather(1, mfa.assign(x).unsqueeze(-1)).squeeze(-1) >= r.amax(-1) - 1e-3).all()
    held = code.components >= 0
    torch.testing.assert_close(
        code.responsibilities.double(),
        r.gather(1, code.components.clamp_min(0)).where(held, 0.0),
        rtol=0, atol=2e-3,
    )  # fmt: skip
    assert (r.topk(4, -1).values.sum(-1) - code.responsibilities.double().sum(-1) <= 2e-3).all()
    kept = torch.zeros_like(r).scatter_(1, code.components.clamp_min(0), held.double())
    assert ((r * (1 - kept)).sum(-1) <= code.dropped.double() + 2e-3).all()
    n, c = held.nonzero(as_tuple=True)
    z = pairs_reference.latents(x.double(), n, code.components[n, c], *wide[:3])
    assert relative(code.latents[n, c], z) < 1e-5
    assert (code.latents[~held] == 0).all()
    wanted = torch.einsum("nc,ncd->nd", code.responsibilities.double(), wide.means[code.components.clamp_min(0)])
    for slot in range(code.components.shape[1]):
        w = wide.loadings[code.components[:, slot].clamp_min(0)]
        wanted += code.responsibilities[:, slot, None].double() * (w @ code.latents[:, slot, :, None].double()).squeeze(
            -1
        )
    assert relative(decoded, wanted) < 1e-5
    n, k = (t.flatten() for t in torch.meshgrid(torch.arange(count), torch.arange(131), indexing="ij"))
    n, k = n.to(DEVICE), k.to(DEVICE)
    z = pairs_reference.latents(x.double(), n, k, *wide[:3])
    every = wide.means[k] + (wide.loadings[k] @ z.unsqueeze(-1)).squeeze(-1)
    whole = (r.unsqueeze(-1) * every.reshape(count, 131, 70)).sum(1)
    assert relative(reconstruction, whole) < 2e-3 if spread < 1 else 1e-4


def test_gradient_of_encode_and_decode():
    m, x = problem((20, 37, 40, 4), dtype=torch.float64)
    mfa = module(m)
    x = x.requires_grad_()
    mfa.decode(mfa.encode(x, top_k=2)).square().sum().backward()
    found = [x.grad, mfa.means.grad, mfa.loadings.grad]
    wide = [t.detach().clone().requires_grad_() for t in (x, *m)]
    logits = wide[4] + reference.component_log_prob(*wide[:4])
    code = mfa.encode(x.detach(), top_k=2)
    n, c = (code.components >= 0).nonzero(as_tuple=True)
    k = code.components[n, c]
    z = pairs_reference.latents(wide[0], n, k, *wide[1:4])
    parts = wide[1][k] + (wide[2][k] @ z.unsqueeze(-1)).squeeze(-1)
    out = torch.zeros_like(wide[0]).index_add(0, n, logits.softmax(-1)[n, k].unsqueeze(-1) * parts)
    out.square().sum().backward()
    for a, b in zip(found, wide):
        assert relative(a, b.grad) < 1e-7


def test_training_reduces_the_loss():
    m, x = problem((1000, 131, 70, 10))
    mfa = MFA(131, 70, 10, device=DEVICE)
    with torch.no_grad():
        mfa.means.copy_(m.means + 0.3)
    optimizer = torch.optim.Adam(mfa.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = mfa(x)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)


# torch.compile, opcheck


def examples() -> dict[str, list[tuple]]:
    """Arguments for every registered operator, in float64 and in float32 (the dtype of the kernels)."""
    found: dict[str, list[tuple]] = {}
    for dtype, per_component in itertools.product((torch.float32, torch.float64), (False, True)):
        m, x = problem((7, 9, 21, 2), per_component, dtype=dtype)
        f = m.woodbury()
        woodbury = f.tensors()
        leaves = [t.clone().requires_grad_() for t in (x, *m)]
        n, k = torch.tensor([0, 2, 5], device=DEVICE), torch.tensor([4, 8, 0], device=DEVICE).int()
        components = torch.tensor([[0, 2], [1, -1], [3, 3]], device=DEVICE).int()
        code = [torch.rand(3, 2).to(x).requires_grad_(), torch.randn(3, 2, 2).to(x).requires_grad_()]
        upstream = torch.ones(7).to(x), torch.zeros(7, 4).to(x)
        active, ones, wide = m.active(x, slots=4), torch.ones(3, 2).to(x), torch.ones(3, 21).to(x)
        cases = {
            "factors": tuple(leaves[1:4]),
            "log_prob": (*leaves, *woodbury, 4),
            "log_prob_backward": (*upstream, x, *m, *woodbury, *active, [True] * 5),
            "component_log_prob": (*leaves[:4], *woodbury),
            "component_log_prob_backward": (torch.ones(7, 9).to(x), x, *m[:3], *woodbury, [True, False, True, True]),
            "latents": (leaves[0], n, k, *leaves[1:4], *woodbury),
            "latents_backward": (ones, ones, x, n, k, *m[:3], f.cholesky, [True, False, True, True]),
            "decode": (components, *code, *leaves[1:3]),
            "decode_backward": (wide, components, *(t.detach() for t in code), *m[:2], [True, False]),
        }
        sums = SufficientStatistics.zeros(m.means, 2, per_component).tensors()[:6]
        weights = active.logits.softmax(-1)
        cases["statistics"] = (
            x, active.components, weights, f.rows, f.cholesky, f.scale, f.center, per_component, *sums
        )  # fmt: skip
        owner, distance = nearest(x, m.means, f.center)
        cases["nearest"] = (x, m.means, f.center)
        cases["cluster_sums"] = (x, f.center, owner, distance, None, sums[1], sums[0], sums[0].clone())
        if backends.serving(x, 2) == "triton":
            cases["scan_rows"] = (f.rows, f.cholesky, f.scale, f.center, per_component)
        for name, arguments in cases.items():
            found.setdefault(name, []).append(arguments)
    return found


OPERATORS = (
    "factors", "log_prob", "log_prob_backward", "component_log_prob", "component_log_prob_backward", "latents",
    "latents_backward", "decode", "decode_backward", "scan_rows", "statistics",
    "nearest", "cluster_sums",
)  # fmt: skip
# The first two are for a CPU (tests/ops/test_screen*.py); the other has tests/ops/intervene/test_intervene.py.
CHECKED_ELSEWHERE = {"select_screened", "screened_log_prob", "intervene"}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    every = examples().get(name, [])
    if not every:
        pytest.skip(f"{name} is an operator of the Triton kernels")
    for arguments in every:
        torch.library.opcheck(getattr(torch.ops.mfa_kernels, name).default, arguments, test_utils=checks)


def test_every_operator_has_an_example():
    names = (name.split(".")[0] for name in torch._C._dispatch_get_all_op_names())
    registered = {name.removeprefix("mfa_kernels::") for name in names if name.startswith("mfa_kernels::")}
    assert registered - CHECKED_ELSEWHERE == set(OPERATORS)


@NOISE
def test_compiled_without_graph_breaks(per_component):
    m, x = problem((130, 131, 70, 10), per_component)

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return -functional.log_prob(x * 1.5, *parameters).mean()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="inductor" if on_cuda else "aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, *m)]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(t.grad for t in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert relative(compiled, eager) < 1e-5


# CUDA itself


@cuda_only
@NOISE
@pytest.mark.parametrize("count", [1, 64, 1000])
@pytest.mark.usefixtures("kernels")
def test_inference_does_not_wait_for_the_device(count, per_component):
    m, x = problem((count, 401, 400, 10), per_component)
    mfa = module(m)
    x = x.bfloat16()
    with torch.no_grad():
        expected = mfa.log_prob(x)  # compiled, and the factors cached
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = mfa.log_prob(x)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(found, expected)


@cuda_only
@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("spread", [3.0, 0.05], ids=["one_hot", "diffuse"])
@pytest.mark.usefixtures("kernels")
def test_cuda_graph(count, spread):
    m, x = problem((3 * count, 401, 400, 10), spread=spread)
    mfa, batches = module(m), x.bfloat16().split(count)
    static = batches[0].clone()
    with torch.no_grad():
        expected = [mfa.log_prob(batch) for batch in batches]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                mfa.log_prob(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mfa.log_prob(static)
        for batch, wanted in zip(batches, expected):
            static.copy_(batch)
            graph.replay()
            assert torch.equal(out, wanted)


@cuda_only
def test_another_stream():
    m, x = problem((1000, 401, 400, 10))
    mfa = module(m)
    with torch.no_grad():
        expected = mfa.log_prob(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            late = x.clone()  # not there yet when the kernels are launched
            found = mfa.log_prob(late)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(found, expected)


@cuda_only
def test_more_than_2_31_values_of_x():
    count = 2**31 // 4096 + 1000
    m, few = problem((1000, 3, 4096, 2))
    x = torch.empty(count, 4096, dtype=torch.bfloat16, device=DEVICE)
    x[:-1000] = few[0]
    x[-1000:] = few
    with torch.no_grad():
        found = module(m).log_prob(x)
    assert torch.equal(found[-1000:], module(m).log_prob(x[-1000:].clone()))
    assert torch.equal(found[: 10**5], found[:1].expand(10**5))


@cuda_only
def test_more_than_2_31_values_of_rows():
    """The whole mixture against its two halves: logsumexp of two log p(x)."""
    if torch.cuda.get_device_properties(DEVICE).total_memory < 70 << 30:
        pytest.skip("needs 70 GB")
    k, d, r = 16500, 8192, 16
    assert k * d * (r + 1) > 2**31
    torch.manual_seed(0)
    means = torch.randn(k, d, device=DEVICE)
    loadings = torch.randn(k, d, r, device=DEVICE) * d**-0.5
    noise, weights = torch.rand(d, device=DEVICE) + 0.5, torch.full((k,), -math.log(k), device=DEVICE)
    x = means[:: k // 16][:16] + torch.randn(16, d, device=DEVICE)
    with torch.no_grad():
        whole = functional.log_prob(x, means, loadings, noise, weights)
        halves = [
            functional.log_prob(x, means[part], loadings[part], noise, weights[part])
            for part in (slice(0, k // 2), slice(k // 2, None))
        ]
    torch.testing.assert_close(whole, torch.logaddexp(*halves), rtol=1e-6, atol=0)


# Steering


@pytest.mark.parametrize(
    "options",
    [
        {"component": 2, "alpha": 0.4},
        {"component": 5, "alpha": 0.2, "latents": torch.tensor([2.0, -1.0, 0.5, 0.0])},
        {"component": None, "alpha": 0.3},
        {"component": 2, "alpha": 1.0, "gate": (7, 0.05)},
    ],
    ids=["component", "latents", "mixture", "gate"],
)
def test_steered_generation_equals_the_cpu(options):
    from mfa_kernels.data import tiny_lm
    from tests.steering.tiny import layer_output

    texts = {}
    for device in ("cpu", DEVICE):
        model, tokenizer = tiny_lm.load()
        inputs = tokenizer("def __init__(self, name, value):\n    self.", return_tensors="pt")
        hidden = layer_output(model, inputs, 2)[0].float()  # on the CPU for both: the same mixture
        generator = torch.Generator().manual_seed(0)
        k, d = min(8, len(hidden)), hidden.shape[1]
        loadings = 0.3 * hidden.std() * torch.randn(k, d, 4, generator=generator)
        noise = hidden.var(0).clamp_min(1e-3)
        mfa = MFA.from_parameters(hidden[-k:], loadings, noise, torch.full((k,), 1 / k)).requires_grad_(False)
        model, mfa = model.to(device), mfa.to(device)
        inputs = inputs.to(device)
        settings = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in options.items()}
        with steer(model, mfa, 2, **settings):
            texts[device] = model.generate(**inputs, max_new_tokens=16, do_sample=False).cpu()
        texts["none"] = model.generate(**inputs, max_new_tokens=16, do_sample=False).cpu()
    assert torch.equal(texts["cpu"], texts[DEVICE])
    assert not torch.equal(texts["none"], texts[DEVICE]), "the intervention has to show"


def test_the_threshold_the_tests_rely_on():
    """A near one-hot mixture holds one or two pairs a token, a diffuse one more than its 16 slots."""
    for spread, overflows in ((3.0, False), (0.05, True)):
        m, x = problem((130, 401, 70, 10), spread=spread)
        logits = dense(m, x)
        counts = (logits > logits.amax(-1, keepdim=True) - activity_threshold(401, torch.float32)).sum(-1)
        assert bool((counts > 16).any()) == overflows


@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_a_sample_that_stays_on_the_host_changes_nothing(method, monkeypatch):
    from mfa_kernels import fit
    from mfa_kernels.data import source
    from tests.fitting.planted import draw, planted

    x = draw(planted(), 4000)
    options = {"method": method, "epochs": 2, "batch_size": 500, "device": DEVICE, "progress": False}
    held = fit(x, 6, 2, **options)
    monkeypatch.setattr(source, "room", lambda device: 0)
    left = fit(x, 6, 2, **options)
    assert left.means.device.type == torch.device(DEVICE).type
    for name, tensor in held.state_dict().items():
        torch.testing.assert_close(left.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)


def test_harvest_fit_look_and_steer(tmp_path, capsys):
    from mfa_kernels.commands import demo

    options = demo.Options(
        out=tmp_path, small=True, tokens=4000, components=16, rank=3, epochs=1, new_tokens=8, device=DEVICE
    )
    assert tmp_path / "regions.html" in demo.run(options)
    assert "Next token after" in capsys.readouterr().out

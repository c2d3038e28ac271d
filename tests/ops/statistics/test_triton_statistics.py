"""EM's statistics on a GPU: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.statistics import op, reference, triton_statistics
from mfa_kernels.ops.statistics.types import SufficientStatistics, Sums
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, drawn, rounded_factors, tokens

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("mass", "shift", "latent", "second", "cross", "squares")

# (N, K, D, R): with the tiles below, features, latents, components of a program and the pairs of component 0 take three
# tiles and a ragged tail.
SHAPES = [(7, 4, 50, 17), (7, 3, 50, 10), (7, 7, 50, 5), (7, 4, 50, 1), (7, 4, 50, 0), (7, 1, 1, 1)]
NOISE = pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_statistics, "_LATENTS", 4)
    monkeypatch.setattr(triton_statistics, "_SHARED", 2)
    monkeypatch.setattr(triton_statistics, "_MANY", 7)
    with configs.override(
        configs.Pairs(pairs=2, features=16, warps=1, stages=2),
        configs.Statistics(pairs=2, features=16, warps=1, stages=2),
    ):
        yield


def problem(shape: tuple[int, int, int, int], per_component: bool) -> tuple[Mixture, Tensor, Tensor, Tensor]:
    """A mixture, its tokens, and slots as stage 1 leaves them: component 0 in the first slot of every token; of the
    others, 1 in one slot, 2 in none, the rest here and there. Some slots are empty, some have no weight."""
    count, n_components, *_ = shape
    m, x = drawn(*shape, device=DEVICE, per_component=per_component)
    generator = torch.Generator().manual_seed(5)
    components = torch.randint(3, max(n_components, 4) + 2, (count, 3), generator=generator).int()
    components = components.masked_fill(components >= n_components, -1)
    components[:, 0] = 0
    if n_components > 1:
        components[-1, 1] = 1
    weights = torch.rand(count, 3, generator=generator)
    weights.view(-1)[3::7] = 0
    return m, x, components.to(DEVICE), weights.to(DEVICE)


def noisy(m: Mixture) -> SufficientStatistics:
    """Outputs that hold something: the kernels add."""
    out = SufficientStatistics.zeros(m.means, m.loadings.shape[2], m.noise_variance.dim() == 2)
    generator = torch.Generator().manual_seed(9)
    for t in out.tensors():
        t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
    return out


def added(m: Mixture, x: Tensor, components: Tensor, weights: Tensor) -> list[Tensor]:
    out = noisy(m)
    triton_statistics.accumulate(x, components, weights, rounded_factors(m), Sums(*out.tensors()[:6]))
    return out.tensors()[:6]


def responsibilities(m: Mixture, components: Tensor, weights: Tensor) -> Tensor:
    """(N, K) of slots."""
    dense = weights.new_zeros(len(components), len(m.means) + 1)
    dense.scatter_add_(1, components.long() % dense.shape[1], weights.masked_fill(components < 0, 0))
    return dense[:, :-1]


def check(m: Mixture, x: Tensor, components: Tensor, weights: Tensor) -> None:
    """Every sum within its budget, what the outputs held before included."""
    r = responsibilities(m, components, weights).double()
    exact = reference.statistics(x.double(), r, *m.to(torch.float64)[:3])
    before, found = noisy(m).tensors(), added(m, x, components, weights)
    for name, ours, start, expected, size in zip(NAMES, found, before, exact, Terms(m, x).statistics(r)):
        budgets.check(ours - start, expected, size, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@NOISE
@pytest.mark.usefixtures("poisoned")
def test_the_definition(shape, per_component):
    check(*problem(shape, per_component))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_it_reads_halves(dtype):
    m, x, components, weights = problem((7, 3, 50, 5), False)
    check(m, x.to(dtype), components, weights)


@pytest.mark.usefixtures("poisoned")
def test_far_from_the_origin():
    """x - mu first: a common offset of 1000 noise deviations costs no digits beyond those that x itself lacks."""
    m, _, components, weights = problem((7, 3, 50, 5), False)
    m = m._replace(means=m.means + 1e3)
    check(m, tokens(m.to("cpu"), 7).to(DEVICE), components, weights)


@NOISE
def test_components_without_pairs_stay_as_they_are(per_component):
    m, x, components, weights = problem((7, 7, 20, 2), per_component)
    owns = responsibilities(m, components, weights).sum(0) > 0
    assert not owns[2]
    before = noisy(m).tensors()
    for name, found, b in zip(NAMES, added(m, x, components, weights), before, strict=False):
        if found.shape[0] == len(owns):
            assert torch.equal(found[~owns], b[~owns]), name
            assert (found[owns] != b[owns]).flatten(1).any(1).all() if found.dim() > 1 else True, name


@NOISE
def test_no_pairs_at_all(per_component):
    m, x, components, weights = problem((7, 7, 20, 2), per_component)
    before = noisy(m).tensors()
    for found in (
        added(m, x, torch.full_like(components, -1), weights),
        added(m, x, components, torch.zeros_like(weights)),
        added(m, x[:0], components[:0], weights[:0]),
        added(m, x, components[:, :0], weights[:, :0]),
    ):
        assert all(torch.equal(f, b) for f, b in zip(found, before))


def test_a_token_that_is_not_finite_adds_nothing_without_a_pair():
    m, x, components, weights = problem((7, 3, 50, 5), False)
    components[4] = -1
    expected = added(m, x, components, weights)
    x[4, 7] = math.nan
    assert all(torch.equal(f, e) for f, e in zip(added(m, x, components, weights), expected))


def test_one_component_owns_everything():
    m, x, _, weights = problem((15, 3, 20, 3), True)
    check(m, x, torch.full((15, 1), 2, dtype=torch.int32, device=DEVICE), weights[:, :1].contiguous())


def test_same_bits_twice_and_the_second_moments_are_symmetric():
    case = problem((7, 7, 20, 10), False)
    found = added(*case)
    assert all(torch.equal(a, b) for a, b in zip(found, added(*case)))
    change = found[3] - noisy(case[0]).second
    torch.testing.assert_close(change, change.mT, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("per_component", "spread"), [(False, 3.0), (True, 0.05)], ids=["one-hot", "diffuse"])
def test_a_whole_expectation(monkeypatch, per_component, spread):
    """Scan, pairs and statistics on the same kernels; with tokens that are not finite, and weights of tokens."""
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(op, "CHUNK", 80)  # diffuse tokens two at a time
    m, x = drawn(5, 18, 21, 3, device=DEVICE, per_component=per_component, spread=spread)
    x = torch.cat([x, torch.full((1, 21), math.nan, device=DEVICE)])
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0], device=DEVICE)
    out = SufficientStatistics.zeros(m.means, 3, per_component)
    active, _ = op.expectation(x, m, m.woodbury(), out, weights)
    assert bool((active.counts > 16).any()) == (spread < 1)
    assert active.components[5].tolist() == [-1] * 16
    r = m.logits_fp64(x[:5]).softmax(-1) * weights[:5, None]
    exact = reference.statistics(x[:5].double(), r, *m.to(torch.float64)[:3])
    for found, expected in zip(out.tensors(), exact, strict=False):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_opcheck(monkeypatch):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    m, x, components, weights = problem((3, 2, 5, 1), False)
    f = rounded_factors(m)
    torch.library.opcheck(
        torch.ops.mfa_kernels.statistics.default,
        (
            x, components, weights, f.rows, f.cholesky, f.scale, f.center, f.per_component, *noisy(m).tensors()[:6],
        ),
    )  # fmt: skip


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    m, x, components, weights = problem((3, 3, 20, 2), False)
    f, out = rounded_factors(m), Sums(*noisy(m).tensors()[:6])
    terms = {"rows": f.rows, "cholesky": f.cholesky, "scale": f.scale, "center": f.center, "per_component": False}
    given = {"x": x, "components": components, "weights": weights, **terms, **out._asdict()}
    for name, wrong, error in (
        ("x", x[:, :19], ValueError),
        ("components", components.long(), TypeError),
        ("components", components[:2], ValueError),
        ("weights", weights.double(), TypeError),
        ("weights", weights[:, :2], ValueError),
        ("mass", out.mass[:2], ValueError),
        ("shift", out.shift.float(), TypeError),
        ("cross", out.cross.mT.contiguous().mT, ValueError),
        ("squares", out.shift, ValueError),
    ):
        with pytest.raises(error, match=f"^statistics: {name} must"):
            torch.ops.mfa_kernels.statistics(**{**given, name: wrong})


@NOISE
def test_with_the_tiles_of_a_gpu(monkeypatch, per_component):
    monkeypatch.undo()
    architecture = 80 if DEVICE == "cpu" else 10 * torch.cuda.get_device_capability()[0]
    kinds = (configs.Pairs, configs.Statistics)
    with configs.override(*(configs.default(kind, architecture, 16384, 8192) for kind in kinds)):
        check(*problem((21, 3, 600, 17), per_component))

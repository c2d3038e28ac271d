"""The pair kernels of the GPU: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.triton_groups import group
from mfa_kernels.ops.pairs import portable, reference, triton_backward, triton_decode, triton_pairs
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.scan.portable import pair_logits
from mfa_kernels.ops.woodbury.portable import explained, residuals
from mfa_kernels.ops.woodbury.types import Woodbury
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, mixture, portable_factors, rounded_factors, tokens

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted or emulated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "means", "loadings", "noise", "log_weights")

# (N, K, D, R): with the tiles below, features, ranks and the pairs of one component take three tiles and a ragged tail.
SHAPES = [(3, 1, 50, 10), (7, 5, 50, 10), (3, 4, 50, 17), (3, 4, 50, 1), (3, 4, 50, 0), (4, 3, 1, 1)]


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with configs.override(
        configs.Pairs(pairs=2, features=16, warps=1, stages=2),
        configs.Gradient(pairs=2, features=16, warps=1, stages=2),
    ):
        yield


class Case(NamedTuple):
    """Pairs of a mixture in slots, as stage 1 leaves them: S per token, some of them empty."""

    mixture: Mixture
    x: Tensor
    tokens: Tensor
    components: Tensor
    weights: Tensor
    woodbury: Woodbury

    @property
    def pairs(self) -> Pairs:
        return Pairs(self.x, self.tokens, self.components)

    @property
    def held(self) -> Tensor:
        return self.components >= 0

    @property
    def constants(self) -> Tensor:
        return self.woodbury.constants(self.mixture.log_weights)

    def explain(self, **changes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and t of its pairs, with these changes."""
        c = self._replace(**changes)
        return triton_pairs.explain(c.pairs, c.woodbury, c.constants)

    def backward(self, **changes: Tensor) -> list[Tensor]:
        """What the kernel adds to `gradients`, with these changes."""
        c, found = self._replace(**changes), gradients(self)
        triton_backward.backward(c.pairs, c.weights, c.woodbury, list(found))
        return found

    def wide(self) -> tuple[Tensor, Tensor, Woodbury]:
        """x, constants and factors in float64, of the same parameters."""
        wide = self.mixture.to(torch.float64)
        woodbury = portable_factors(wide)
        return self.x.double(), woodbury.constants(wide.log_weights), woodbury


def case(
    shape: tuple[int, int, int, int],
    *,
    per_component: bool = False,
    dtype: torch.dtype = torch.float32,
    slots: int = 3,
    index: torch.dtype = torch.int64,
    offset: float = 0.0,
) -> Case:
    """Component 0 is in the first slot of every token; where there are more, 1 is in one slot and 2 in none."""
    count, n_components, features, rank = shape
    m = mixture(n_components, features, rank, per_component=per_component)
    m = m._replace(means=m.means + offset)
    x = tokens(m, count).to(dtype)
    generator = torch.Generator().manual_seed(5)
    components = torch.randint(3, max(n_components, 4), (count, slots), generator=generator).int()
    components = components.masked_fill(components >= n_components, -1)
    components[:, 0] = 0
    if slots > 1 and n_components > 1:
        components[-1, 1] = 1
    weights = torch.randn(count * slots, generator=generator)
    weights[slots::7] = 0
    m, each = m.to(DEVICE), torch.arange(count).repeat_interleave(slots).to(index)
    pairs = (t.to(DEVICE) for t in (x, each, components.flatten(), weights))
    return Case(m, *pairs, rounded_factors(m))


def test_groups_cover_every_pair_once():
    components = torch.tensor([2, -1, 0, 2, 5, 2, 2, -1, 0, 2], dtype=torch.int32, device=DEVICE)
    groups = group(components, 6, 2)
    assert groups.order.tolist() == [1, 7, 2, 8, 0, 3, 5, 6, 9, 4]
    assert groups.starts.tolist() == [2, 4, 4, 9, 9, 9, 10]
    assert groups.blocks.tolist() == [0, 1, 1, 4, 4, 4, 5]
    assert groups.grid >= 5


@pytest.mark.parametrize(("pairs", "count", "block"), [(0, 3, 4), (1, 1, 4), (64, 64, 16), (7, 3, 16), (100, 7, 3)])
def test_groups_bound_the_blocks(pairs, count, block):
    """Spread evenly, in one component, and in none."""
    spread = torch.arange(pairs, dtype=torch.int32, device=DEVICE) % count
    for components in (spread, torch.zeros_like(spread), torch.full_like(spread, -1)):
        groups = group(components, count, block)
        assert int(groups.blocks[-1]) <= groups.grid


def test_the_bound_on_the_blocks_is_reached():
    """Five components with one pair more than fills a block: no smaller bound would do."""
    components = torch.arange(5, dtype=torch.int32, device=DEVICE).repeat(4)
    groups = group(components, 5, 3)
    assert int(groups.blocks[-1]) == groups.grid == 10


def gradients(c: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Fresh gradients that are not zero, since the kernels add."""
    generator = torch.Generator().manual_seed(9)
    shapes = [c.x.shape, *(t.shape for t in c.mixture)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes]


def exact_gradients(c: Case) -> list[Tensor]:
    """By autograd of the reference formula, float64."""
    leaves = [t.double().requires_grad_() for t in (c.x, *c.mixture)]
    x, *parameters = leaves
    m = Mixture(*parameters)
    logits = m.logits_fp64(x)[c.tokens[c.held].long(), c.components[c.held].long()]
    found = torch.autograd.grad((c.weights[c.held].double() * logits).sum(), leaves, allow_unused=True)
    return [g + (0 if s is None else s) for g, s in zip(gradients(c, torch.float64), found)]


def gradient_terms(c: Case) -> list[Tensor]:
    """With what the gradients held before, which is added to as well."""
    n, k, w = (t[c.held] for t in (c.tokens, c.components, c.weights))
    weight = torch.zeros(len(c.x), len(c.mixture.means), dtype=torch.float64, device=DEVICE)
    weight.index_put_((n.long(), k.long()), w.double().abs(), accumulate=True)
    sizes = Terms(c.mixture, c.x).gradients(weight)
    return [size + before.abs() for size, before in zip(sizes, gradients(c, torch.float64))]


def check_explain(c: Case) -> None:
    logits, t = c.explain()
    assert (logits[~c.held] == -math.inf).all()
    assert (t[~c.held] == 0).all()
    n, k = c.tokens[c.held], c.components[c.held].long()
    x, wide_constants, wide = c.wide()
    truth = c.mixture.logits_fp64(c.x)[n, k]
    torch.testing.assert_close(pair_logits(x, n, k, wide, wide_constants), truth, rtol=1e-10, atol=1e-8)
    terms = Terms(c.mixture, c.x)
    assert logits.dtype == t.dtype == torch.float32
    budgets.check(logits[c.held], truth, terms.logits()[n, k], "a logit")
    budgets.check(t[c.held], explained(residuals(x[n], k, wide), k, wide), terms.t()[n, k], "t")


def check_backward(c: Case) -> None:
    for name, *tensors in zip(NAMES, c.backward(), exact_gradients(c), gradient_terms(c)):
        assert tensors[0].dtype == torch.float32
        budgets.check(*tensors, name)


CHECKS = pytest.mark.parametrize("check", [check_explain, check_backward], ids=["explain", "backward"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@CHECKS
@pytest.mark.usefixtures("poisoned")
def test_the_definition(shape, per_component, check):
    check(case(shape, per_component=per_component))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@CHECKS
@pytest.mark.usefixtures("poisoned")
def test_it_reads_halves(dtype, check):
    check(case((5, 4, 50, 10), dtype=dtype, index=torch.int32))


@pytest.mark.usefixtures("poisoned")
def test_explain_far_from_the_origin():
    """x - mu first: a common offset of 1000 noise deviations costs no digits beyond those that x itself lacks."""
    check_explain(case((5, 4, 50, 10), offset=1e3))


@pytest.mark.usefixtures("poisoned")
def test_few_programs_walk_over_many_blocks(monkeypatch):
    monkeypatch.setattr(triton_pairs, "_PROGRAMS", 2)
    check_explain(case((7, 5, 50, 3)))


@pytest.mark.usefixtures("poisoned")
def test_explain_gives_what_is_asked_for():
    c = case((5, 4, 50, 10))
    logits, t = c.explain()
    only, nothing = triton_pairs.explain(c.pairs, c.woodbury, c.constants, with_t=False)
    assert nothing is None
    assert torch.equal(only, logits)
    nothing, only = triton_pairs.explain(c.pairs, c.woodbury)
    assert nothing is None
    assert torch.equal(only, t)
    logits, t = c.explain(tokens=c.tokens[:0], components=c.components[:0])
    assert (logits.shape, t.shape) == ((0,), (0, 10))
    logits, t = c.explain(components=torch.full_like(c.components, -1))
    assert (logits == -math.inf).all()
    assert (t == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_latents(shape):
    c = case(shape, per_component=True)
    z = triton_pairs.latents(c.pairs, c.woodbury)
    assert (z[~c.held] == 0).all()
    n, k = c.tokens[c.held], c.components[c.held].long()
    wide = c.mixture.to(torch.float64)
    exact = reference.latents(c.x.double(), n, k, *wide[:3])
    budgets.check(z[c.held], exact, Terms(c.mixture, c.x).latents()[n, k])


def test_latents_of_nearly_collinear_loadings():
    """L far from a multiple of the identity: substitution loses no more than its terms say."""
    m = mixture(3, 50, 17)
    m = m._replace(loadings=30 * (m.loadings[..., :1] + 1e-2 * m.loadings))
    x, m = tokens(m, 40).to(DEVICE), m.to(DEVICE)
    n, k = torch.arange(40, device=DEVICE), (torch.arange(40, device=DEVICE) % 3).int()
    exact = reference.latents(x.double(), n, k.long(), *m.to(torch.float64)[:3])
    budgets.check(triton_pairs.latents(Pairs(x, n, k), rounded_factors(m)), exact, Terms(m, x).latents()[n, k.long()])


def test_backward_computes_only_what_is_asked_for():
    c = case((5, 4, 50, 10))
    for i, expected in enumerate(c.backward()):
        part: list[Tensor | None] = [None] * len(NAMES)
        part[i] = gradients(c)[i]
        triton_backward.backward(c.pairs, c.weights, c.woodbury, list(part))
        assert torch.equal(part[i], expected), NAMES[i]


def test_backward_of_no_pairs_changes_nothing():
    c = case((5, 4, 50, 10))
    for changes in (
        {"components": torch.full_like(c.components, -1)},
        {"weights": torch.zeros_like(c.weights)},
        {"tokens": c.tokens[:0], "components": c.components[:0], "weights": c.weights[:0]},
    ):
        assert all(torch.equal(f, g) for f, g in zip(c.backward(**changes), gradients(c)))


def test_a_bad_token_is_alone():
    """NaN in x: NaN in its own logits and latents; nowhere else, and in no gradient, once it holds no pair."""
    c = case((5, 4, 50, 10))
    bad = c.tokens == 4
    x = c.x.clone()
    x[4, 7] = math.nan
    (logits, t), (expected, expected_t) = c.explain(x=x), c.explain()
    assert logits[bad & c.held].isnan().all()
    assert torch.equal(logits[~bad], expected[~bad])
    assert torch.equal(t[~bad], expected_t[~bad])
    components = c.components.masked_fill(bad, -1)
    found, expected = c.backward(x=x, components=components), c.backward(components=components)
    assert all(torch.equal(f, e) for f, e in zip(found, expected))
    assert all(f.isfinite().all() for f in found)


def test_one_component_owns_everything():
    """Its pairs are many tiles long, and all the others have none."""
    c = case((11, 4, 20, 3), slots=1)
    assert (c.components == 0).all()
    check_explain(c)
    check_backward(c)


def test_same_bits_twice():
    c = case((5, 4, 50, 10))

    def run() -> list[Tensor]:
        code = random_code(c, 3)
        return [*c.backward(), *c.explain(), triton_decode.decode(*code), *triton_decode.decode_backward(c.x, *code)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@pytest.mark.skipif(DEVICE == "cpu", reason="not applicable: the interpreter copies its arguments: 17 GB of them")
def test_rows_beyond_2_to_the_31_are_addressed():
    """K D passes 2^31 values: the last component's are found, read and written."""
    features, last = 1 << 20, 1 << 11
    count = last + 1
    rows, grad = (torch.empty(count, 1, features, device=DEVICE) for _ in range(2))
    rows[last], grad[last] = 1, 0
    constants = torch.zeros(count, device=DEVICE)
    empty = constants.new_empty(count, 0, 0)
    woodbury = Woodbury(rows, empty, constants, torch.ones(features, device=DEVICE), constants, False)
    x = torch.full((1, features), 3.0, device=DEVICE)
    with configs.override(configs.Pairs(1, 1024, 4, 1), configs.Gradient(1, 1024, 4, 1)):
        pairs = Pairs(x, torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.full((1,), last, device=DEVICE).int())
        logits, _ = triton_pairs.explain(pairs, woodbury, constants)
        found = [None, grad.view(count, features), None, None, None]
        triton_backward.backward(pairs, torch.ones(1, device=DEVICE), woodbury, found)
    assert logits.item() == -2.0 * features
    assert (grad[last] == 2).all()


def random_code(c: Case, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    n = c.x.shape[0]
    k, _, r = c.mixture.loadings.shape
    components = torch.randint(-1, k, (n, slots), generator=generator).int()
    responsibilities = torch.rand(n, slots, generator=generator)
    z = torch.randn(n, slots, r, generator=generator)
    return *(t.to(DEVICE) for t in (components, responsibilities, z)), c.mixture.means, c.mixture.loadings


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_decode_and_its_gradients(shape):
    c = case(shape)
    components, *floats = random_code(c, 4)
    leaves = [t.double().requires_grad_() for t in floats]
    exact = reference.decode(components.long(), *leaves)
    sizes = reference.decode(components.long(), *(t.double().abs() for t in floats))
    budgets.check(triton_decode.decode(components, *floats), exact.detach(), sizes)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    found = triton_decode.decode_backward(grad, components, *floats)
    terms = portable.decode_backward(grad.abs(), components, *(t.abs() for t in floats))
    for tensors in zip(found, wanted, terms):
        budgets.check(*tensors)


def test_decode_of_a_bad_token_is_nan_alone():
    c = case((3, 4, 50, 2))
    components = torch.tensor([[0, -1], [-1, -1], [2, 1]], dtype=torch.int32, device=DEVICE)
    responsibilities = torch.tensor([[1.0, 0.0], [0.0, math.nan], [0.5, 0.5]], device=DEVICE)
    z = torch.zeros(3, 2, 2, device=DEVICE)
    out = triton_decode.decode(components, responsibilities, z, c.mixture.means, c.mixture.loadings)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    held = torch.tensor([[0, -1], [3, -1], [2, 1]], dtype=torch.int32, device=DEVICE)
    nan = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [0.5, 0.5]], device=DEVICE)
    out = triton_decode.decode(held, nan, z, c.mixture.means, c.mixture.loadings)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("wrong", [5, 10**6, -3])
def test_what_is_no_component_marks_a_slot_without_a_pair(wrong):
    """Nobody asks the device whether indices are in range: the kernels themselves touch no memory but their own."""
    c = case((6, 5, 50, 3))
    m, x, woodbury = c.mixture, c.x, c.woodbury
    n = torch.arange(6, device=DEVICE)
    good = torch.tensor([0, -1, 4, 2, -1, 1], dtype=torch.int32, device=DEVICE)
    bad = torch.where(good == -1, wrong, good)
    slots = (torch.ones(6, 1, device=DEVICE), torch.ones(6, 1, 3, device=DEVICE), *m[:2])

    def results(components: Tensor) -> list[Tensor]:
        sums, pairs = [torch.zeros_like(t) for t in (x, *m)], Pairs(x, n, components)
        triton_backward.backward(pairs, torch.ones_like(x[:, 0]), woodbury, list(sums))
        code = components[:, None], *slots
        return [
            triton_pairs.latents(pairs, woodbury), *sums, triton_decode.decode(*code),
            *triton_decode.decode_backward(x, *code),
        ]  # fmt: skip

    assert all(torch.equal(a, b) for a, b in zip(results(bad), results(good)))

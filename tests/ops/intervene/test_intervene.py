from __future__ import annotations

from typing import Any

import pytest
import torch

from mfa_kernels.ops.intervene.op import Edit, intervene
from mfa_kernels.ops.intervene.portable import NEVER
from tests.helpers.mixtures import Mixture, tokens
from tests.helpers.threads import same_bits
from tests.ops.intervene.cases import WAYS, Case, case, same, within_budget

# (K, D, R): features below, at and beyond three vectors, and a ragged tail; one component; no directions.
SHAPES = [(5, 33, 3), (1, 1, 1), (4, 16, 0), (3, 130, 17), (7, 27, 10)]


def check(c: Case) -> None:
    """Against the oracle, in float64."""
    out, tally = intervene(*c.arguments())
    exact, expected = c.oracle()
    assert out.dtype == c.hidden.dtype
    assert tally.dtype == c.mixture.means.dtype
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(tally.double(), expected, rtol=1e-10, atol=1e-12)
    alone = tally[..., 0] == 0
    assert torch.equal(out[alone].nan_to_num(7), c.hidden[alone].nan_to_num(7))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("poisoned")
def test_matches_the_definitions(backend: str, way: str, shape: tuple[int, int, int]) -> None:
    if WAYS[way][2] and shape[2] == 0:
        pytest.skip("not applicable: no latents to give")
    check(case(way, shape=shape))


@pytest.mark.parametrize("given", [
    {"rows": 1}, {"rows": 3, "steps": True}, {"steps": True, "mask": (6, 3)}, {"mask": (1, 3)}, {"mask": (6, 1)},
    {"passes": True, "mask": (1, 1)}, {"slots": 1}, {"slots": 9}, {"per_component": True},
    {"batch": 1, "count": 19}, {"batch": 13, "count": 1},
], ids=str)  # fmt: skip
@pytest.mark.usefixtures("poisoned")
def test_rows_positions_masks_and_slots(backend: str, given: dict[str, Any]) -> None:
    check(case(**given))


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("way", ["fixed", "latents", "all"])
@pytest.mark.usefixtures("poisoned")
def test_dtypes(backend: str, way: str, hidden_dtype: torch.dtype) -> None:
    """A float32 mixture: a few roundings of float32, and one to the dtype of the model."""
    c = case(way, shape=(5, 130, 10), dtype=torch.float32, hidden_dtype=hidden_dtype)
    out, tally = intervene(*c.arguments())
    exact, expected = c.oracle()
    assert out.dtype == hidden_dtype
    within_budget(out, exact, c.terms())
    torch.testing.assert_close(tally.double(), expected, rtol=0, atol=3e-7)
    if hidden_dtype != torch.float64:
        c = case(way, hidden_dtype=hidden_dtype)
        found, exact = intervene(*c.arguments())[0], c.oracle()[0]
        torch.testing.assert_close(found, exact.to(hidden_dtype), rtol=0, atol=0, equal_nan=True)


def test_every_gate_opens_and_closes() -> None:
    """The cases above would say little if a kind of gate let nothing through, or everything."""
    tally = case("means", batch=6, count=20).oracle()[1][..., 0]
    assert tally[0].all()
    assert all(0 < reached.sum() < 20 for reached in tally[1:5])
    assert not tally[5].any()


def test_without_evidence(backend: str) -> None:
    """A norm to keep, and nothing to ask the mixture."""
    c = case("norm")
    rules = c.edit.rules * torch.tensor([0, 0, 1]).int() - torch.tensor([0, 1, 0]).int()
    edit = c.edit._replace(rules=rules)
    out, tally = intervene(c.hidden, edit)
    exact, expected = c._replace(edit=edit).oracle()
    torch.testing.assert_close(out, exact, rtol=1e-11, atol=1e-11, equal_nan=True)
    assert torch.equal(tally.double(), expected)
    assert torch.equal(tally[..., 0], torch.ones(6, 3))


def test_views_and_no_tokens(backend: str) -> None:
    c = case()
    expected = intervene(*c.arguments())
    wide = torch.zeros(3, 6, 2, 33).double()
    wide[:, :, 1] = c.hidden.transpose(0, 1)
    for view in (c.hidden.transpose(0, 1).contiguous().transpose(0, 1), wide[:, :, 1].transpose(0, 1)):
        found = intervene(view, *c.arguments()[1:])
        assert found[0].is_contiguous()
        assert same(found, expected)
    for batch, count in ((0, 3), (6, 0)):
        c = case(batch=batch, count=count, rows=1)
        out, tally = intervene(*c.arguments())
        assert (out.shape, tally.shape) == ((batch, count, 33), (batch, count, 3))


def test_input_is_left_alone_and_bits_do_not_change(backend: str) -> None:
    c = case(batch=12, shape=(5, 130, 10), dtype=torch.float32)
    before = [t.clone() for t in (c.hidden, c.edit.shift, *c.active)]
    same_bits(lambda: [t.nan_to_num(7) for t in intervene(*c.arguments())], (1, 2, 2))
    assert same(before, (c.hidden, c.edit.shift, *c.active))


def test_a_zero_keeps_no_norm(backend: str) -> None:
    edit = Edit(
        torch.tensor([[[1.0, 0, 0]]]), torch.zeros(1, 1, 5), torch.tensor([[0, -1, 1]]).int(), torch.zeros(1), True
    )
    x = torch.zeros(1, 2, 5)
    x[0, 1] = torch.arange(5)
    assert torch.equal(intervene(x, edit)[0], x)


def test_gradients(backend: str) -> None:
    """Plain PyTorch where they are wanted, with the numbers of the kernels; none arrive through gates."""
    c = case(batch=2, count=2, shape=(3, 4, 2), slots=2, finite=True)
    c = c._replace(edit=c.edit._replace(rules=c.edit.rules * torch.tensor([0, 1, 1]).int()))
    leaves = [c.hidden, c.edit.coefficients, c.edit.shift, c.edit.latents, c.active.logits[[0, 3]], *c.mixture[:3]]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]

    def call(x, coefficients, shift, z, logits, *parameters):
        logits = torch.cat([logits, logits]).view(2, 2, -1).flatten(0, 1)
        edit = c.edit._replace(coefficients=coefficients, shift=shift, latents=z)
        active = c.active._replace(logits=logits, components=c.active.components[[0, 3, 0, 3]])
        active = active._replace(counts=torch.ones(4).int(), log_prob=torch.zeros(4).double())
        woodbury = Mixture(*(t.detach() for t in parameters), c.mixture.log_weights).woodbury()
        return intervene(x, edit, None, None, active, parameters, woodbury)

    assert torch.autograd.gradcheck(lambda *args: call(*args)[0], leaves)
    with torch.no_grad():
        kernels = call(*leaves)
    for found, expected in zip(call(*leaves), kernels):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_opcheck(backend: str) -> None:
    for way in ("fixed", "all"):
        c = case(way, batch=2, count=2, mask=(2, 1), finite=True)
        torch.library.opcheck(torch.ops.mfa_kernels.intervene.default, tuple(c.operands()))


def test_the_bare_operator_refuses_a_gradient(backend: str) -> None:
    c = case("fixed")
    out, _ = torch.ops.mfa_kernels.intervene(c.hidden.requires_grad_(), *c.operands()[1:])
    with pytest.raises(RuntimeError, match="has no gradient"):
        out.sum().backward()


def test_compiles_whole(backend: str) -> None:
    c = case(dtype=torch.float32, hidden_dtype=torch.bfloat16)
    arguments = c.arguments()
    compiled = torch.compile(lambda *a: intervene(*a), fullgraph=True, backend="aot_eager")
    assert same(compiled(*arguments), intervene(*arguments))


@pytest.mark.usefixtures("needs_cpp")
def test_the_kernels_read_no_further_than_they_may() -> None:
    c = case()
    short = c._replace(edit=c.edit._replace(shift=c.edit.shift[:4]))
    with pytest.raises(ValueError, match="shift must have sizes .* with .*, B = 6, F = 4, T = 3, U = "):
        intervene(*short.arguments())
    far = c._replace(active=c.active._replace(components=c.active.components + 5))
    with pytest.raises(IndexError, match=r"components must be in \[-1, 5\)"):
        intervene(*far.arguments())
    with pytest.raises(TypeError, match=r"shift must be float32 of shape .*got float64"):
        intervene(*c._replace(edit=c.edit._replace(coefficients=c.edit.coefficients.float())).arguments())


def test_rows_that_are_left_alone_are_looked_at(backend: str) -> None:
    """`stats` counts the responsibilities of a row that a gate watches, whether or not anything is done to it."""
    c = case("fixed", batch=1, count=4)
    rules = torch.tensor([[NEVER, 2, 0]]).int()
    out, tally = intervene(c.hidden, c.edit._replace(rules=rules), None, None, c.active)
    assert torch.equal(out.nan_to_num(7), c.hidden.nan_to_num(7))
    assert tally[0, :, 0].eq(0).all()
    assert tally[0, :, 2].tolist() == [1, 0, 1, 1]  # the second token is not finite


def test_evidence_of_the_scan(backend: str) -> None:
    """From the scan itself: tokens steered to the mixture's reconstruction of them."""
    c = case("all", rows=1, dtype=torch.float32, shape=(5, 33, 3))
    x = tokens(c.mixture, 18)
    edit = Edit(
        torch.tensor([[[0.0, 1, 1]]]), torch.zeros(1, 1, 33), torch.tensor([[0, -1, 0]]).int(), torch.zeros(1),
        spreads=True,
    )  # fmt: skip
    out, _ = intervene(
        x.view(6, 3, 33), edit, None, None, c.mixture.active(x, 5), c.mixture[:3], c.mixture.woodbury()
    )  # fmt: skip
    wide = c.mixture.to(torch.float64)
    r = wide.logits_fp64(x).softmax(-1)
    inverse = torch.linalg.inv(
        wide.loadings @ wide.loadings.mT + torch.diag_embed(wide.noise_variance.expand_as(wide.means))
    )
    residual = x.double().unsqueeze(1) - wide.means
    points = wide.means + torch.einsum("kdr,kfr,kfg,nkg->nkd", wide.loadings, wide.loadings, inverse, residual)
    torch.testing.assert_close(out.view(18, 33).double(), torch.einsum("nk,nkd->nd", r, points), rtol=1e-4, atol=1e-4)


def test_forward_mode_is_refused_and_not_zero():
    c = case("all", dtype=torch.float32)
    hidden, *rest = c.arguments()
    with pytest.raises(NotImplementedError, match="intervene has no forward-mode derivative"):
        torch.func.jvp(lambda x: intervene(x, *rest)[0], (hidden,), (torch.ones_like(hidden),))

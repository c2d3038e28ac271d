"""`intervene` on tensors of any shape and dtype, with gates, gradients and non-finite tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels.steering import Offset, Toward, intervene
from mfa_kernels.steering.apply import Program
from mfa_kernels.steering.interventions import as_rows
from tests.steering.tiny import WIDTH, fitting_mixture

Z = torch.tensor([1.0, -2.0, 0.5])
BOTH = [Toward(2, 0.4), Offset(2, Z)]
MIXTURE = [Toward(None, 0.4), Offset(None, Z)]


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.5 * torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(3))).to(dtype)


@pytest.mark.parametrize("interventions", [BOTH, MIXTURE], ids=["fixed", "mixture"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_leading_dimensions(shape: tuple[int, ...], interventions: list) -> None:
    mfa, x = fitting_mixture(), tokens(*shape)
    before = x.clone()
    out = intervene(x, mfa, interventions)
    assert out.shape == x.shape
    assert torch.equal(x, before)
    flat = [intervene(row, mfa, interventions) for row in x.reshape(-1, WIDTH)]
    if flat:
        torch.testing.assert_close(out.reshape(-1, WIDTH), torch.stack(flat))
        assert not torch.equal(out, x)


@pytest.mark.parametrize("interventions", [BOTH, MIXTURE], ids=["fixed", "mixture"])
def test_views_and_expanded_input(interventions: list) -> None:
    mfa, x = fitting_mixture(), tokens(4, 6)
    torch.testing.assert_close(
        intervene(x.transpose(0, 1), mfa, interventions), intervene(x, mfa, interventions).transpose(0, 1)
    )
    expanded = x[:1].expand(3, -1, -1)
    torch.testing.assert_close(
        intervene(expanded, mfa, interventions), intervene(expanded.contiguous(), mfa, interventions)
    )


@pytest.mark.parametrize("interventions", [BOTH, MIXTURE], ids=["fixed", "mixture"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_rounded_little(dtype: torch.dtype, interventions: list) -> None:
    mfa, x = fitting_mixture(), tokens(8, dtype=dtype)
    out = intervene(x, mfa, interventions)
    wide = intervene(x.double(), fitting_mixture(torch.float64), interventions)
    assert out.dtype == dtype
    bound = torch.finfo(dtype).eps * (wide.abs() + x.double().abs() + 1)
    assert ((out.double() - wide).abs() <= bound).all()
    # Where every row brings numbers of its own, nothing but the result is rounded.
    rows = intervene(x, mfa, rows=[interventions] * 8)
    assert ((rows.double() - wide).abs() <= torch.finfo(dtype).eps / 2 * wide.abs() + 3e-5).all()


def test_outlier_dimension_survives_half_precision() -> None:
    mfa = fitting_mixture()
    mfa.means[:, 5] += 3000.0
    x = tokens(4)
    x[:, 5] += 2900.0
    out = intervene(x.bfloat16(), mfa, Toward(1, 0.4))
    wide = 0.6 * x.bfloat16().double() + 0.4 * mfa.means[1].double()
    assert ((out.double() - wide).abs() <= 2**-8 * wide.abs() + 2**-7).all()


def test_gate_changes_only_tokens_that_exceed_the_threshold(backend: str) -> None:
    mfa, x = fitting_mixture(), tokens(40)
    r = mfa.responsibilities(x)
    component = int(r.mean(0).argmax())
    threshold = float(r[:, component].sort().values[19:21].mean())
    gated = r[:, component] > threshold
    assert gated.sum() == 20
    for interventions in (BOTH, MIXTURE):
        out = intervene(x, mfa, interventions, gate=(component, threshold))
        torch.testing.assert_close(out[gated], intervene(x[gated], mfa, interventions))
        assert torch.equal(out[~gated], x[~gated])
        rows = intervene(x, mfa, rows=[interventions, None] * 20, gate=(component, threshold))
        acts = gated & (torch.arange(40) % 2 == 0)
        torch.testing.assert_close(rows[acts], out[acts])
        assert torch.equal(rows[~acts], x[~acts])


def test_more_tokens_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    mfa, x = fitting_mixture(), tokens(5, 5)
    whole = intervene(x, mfa, MIXTURE, gate=(0, 0.1))
    monkeypatch.setattr("mfa_kernels.steering.apply._TOKENS_PER_CHUNK", 7)
    torch.testing.assert_close(intervene(x, mfa, MIXTURE, gate=(0, 0.1)), whole)


def test_rows_repeat_over_an_expanded_batch() -> None:
    mfa, x = fitting_mixture(), tokens(6, 2)
    rows = [Toward(0, 0.5), None, MIXTURE]
    expected = intervene(x, mfa, rows=[rows[i // 2] for i in range(6)])
    torch.testing.assert_close(intervene(x, mfa, rows=rows), expected)
    assert torch.equal(expected[2:4], x[2:4])
    with pytest.raises(ValueError, match="for 4 batch rows do not fit a batch of 6"):
        intervene(x, mfa, rows=[None] * 4)


def test_no_responsibility_for_fixed_components(monkeypatch: pytest.MonkeyPatch) -> None:
    mfa = fitting_mixture()
    monkeypatch.setattr(type(mfa), "encode", lambda *args, **kwargs: pytest.fail("encode was called"))
    intervene(tokens(3), mfa, BOTH)


def test_fixed_path_never_waits_for_the_device() -> None:
    """Meta tensors have no values: anything that reads one back to the host raises."""
    mfa, device = fitting_mixture(), torch.device("meta")
    hidden = tokens(4, 3).to(device)
    for rows in (as_rows(BOTH, None, mfa), as_rows(None, [BOTH, None], mfa)):
        program = Program(mfa, rows, None, device)
        for chosen in (True, torch.ones(4, 3, dtype=torch.bool, device=device)):
            out, reached = program(hidden, chosen, (0,))
            assert out.shape == hidden.shape
            assert reached is chosen or reached.shape == (4, 3)


def test_differentiable_in_x_and_latents() -> None:
    mfa, x = fitting_mixture(torch.float64), tokens(3, dtype=torch.float64).requires_grad_()
    z = Z.double().requires_grad_()
    for component in (1, None):
        assert torch.autograd.gradcheck(
            lambda x, z, k=component: intervene(x, mfa, [Toward(k, 0.4), Offset(k, z)]), (x, z), atol=1e-6
        )


@pytest.mark.parametrize("interventions", [BOTH, MIXTURE], ids=["fixed", "mixture"])
def test_a_non_finite_token_stays_alone(interventions: list) -> None:
    mfa, x = fitting_mixture(), tokens(4)
    clean = intervene(x, mfa, interventions)
    x[2, 3] = float("nan")
    out = intervene(x, mfa, interventions)
    keep = torch.tensor([0, 1, 3])
    torch.testing.assert_close(out[keep], clean[keep])
    assert out[2, 3].isnan()
    assert torch.equal(intervene(x, mfa, interventions, gate=(0, 0.0))[2].isnan(), x[2].isnan())


def test_rank_zero_and_a_single_component() -> None:
    x = tokens(3)
    mfa = fitting_mixture(rank=0)
    torch.testing.assert_close(intervene(x, mfa, Toward(1, 1.0)), mfa.means[1].expand(3, -1))
    torch.testing.assert_close(
        intervene(x, mfa, Toward(None, 1.0)), mfa.responsibilities(x) @ mfa.means, rtol=1e-5, atol=1e-5
    )


def test_bad_input_is_named() -> None:
    mfa = fitting_mixture()
    with pytest.raises(ValueError, match=r"x must have shape \(..., 32\) to fit the mixture, got \(2, 31\)"):
        intervene(torch.zeros(2, 31), mfa, BOTH)
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.int64"):
        intervene(torch.zeros(2, 32, dtype=torch.long), mfa, BOTH)
    with pytest.raises(TypeError, match="got list"):
        intervene([0.0] * 32, mfa, BOTH)
    x = tokens(2)
    with pytest.raises(IndexError, match=r"gate component must be in \[0, 6\), got 6"):
        intervene(x, mfa, BOTH, gate=(6, 0.5))
    with pytest.raises(ValueError, match=r"gate threshold must be in \[0, 1\)"):
        intervene(x, mfa, BOTH, gate=(0, 1.0))
    with pytest.raises(TypeError, match=r"gate must be \(component, threshold\), got 3"):
        intervene(x, mfa, BOTH, gate=3)

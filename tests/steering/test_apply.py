"""`intervene` on tensors of any shape and dtype, with gates, gradients and non-finite tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfa_kernels.steering import Add, Offset, Reconstruct, Remove, Toward, intervene
from mfa_kernels.steering.apply import Program
from mfa_kernels.steering.interventions import as_rows
from tests.steering.tiny import WIDTH, fitting_mixture, tokens

Z = torch.tensor([1.0, -2.0, 0.5])
BOTH = [Toward(2, 0.4), Offset(2, Z)]
MIXTURE = [Toward(None, 0.4), Offset(None, Z)]


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


def test_outlier_dimension_survives_half_precision(mfa: Any) -> None:
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


def test_no_responsibility_for_fixed_components(mfa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(mfa), "encode", lambda *args, **kwargs: pytest.fail("encode was called"))
    intervene(tokens(3), mfa, BOTH)


def test_fixed_path_never_waits_for_the_device() -> None:
    """Meta tensors have no values: anything that reads one back to the host raises."""
    mfa, device = fitting_mixture(), torch.device("meta")
    hidden = tokens(4, 3).to(device)
    for rows in (as_rows(BOTH, None, mfa), as_rows(None, [BOTH, None], mfa)):
        program = Program(mfa, rows, device)
        for chosen in (True, torch.ones(4, 3, dtype=torch.bool, device=device)):
            out, reached, _ = program(hidden, chosen, (0,))
            assert out.shape == hidden.shape
            assert reached is True or reached.expand(4, 3).dtype == torch.bool


def test_differentiable_in_x_and_latents() -> None:
    mfa, x = fitting_mixture(torch.float64), tokens(3, dtype=torch.float64).requires_grad_()
    z = Z.double().requires_grad_()
    v = torch.linspace(-1, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    for k in (1, None):
        for entries in (lambda z, v, k=k: [Toward(k, 0.4), Offset(k, z), Add(v, 0.3)],
                        lambda z, v, k=k: [Remove(k, "region", 0.7), Remove(k), Reconstruct(0.2)]):  # fmt: skip
            assert torch.autograd.gradcheck(
                lambda x, z, v, make=entries: intervene(x, mfa, make(z, v), norm="keep"), (x, z, v), atol=1e-6
            )


def test_differentiable_in_the_parameters(backend: str) -> None:
    """The gradient of the mixture's parameters is that of the dense formula."""
    x, gradients = tokens(5, dtype=torch.float64), []
    for dense in (False, True):
        mfa = fitting_mixture(torch.float64).requires_grad_()
        if dense:
            r, k = mfa.responsibilities(x), 2
            w = mfa.loadings[k]
            z = (x - mfa.means[k]) @ torch.linalg.solve(w @ w.mT + mfa.noise_variance.diag(), w)
            mean = mfa.log_weights.exp() @ mfa.means
            out = 0.6 * x + 0.4 * r @ mfa.means - 0.7 * r[:, [k]] * (mfa.means[k] - mean + z @ w.mT) - 0.5 * z @ w.mT
        else:
            out = intervene(x, mfa, [Toward(None, 0.4), Remove(2, "region", 0.7), Remove(2, "latents", 0.5)])
        out.square().sum().backward()
        gradients.append([p.grad for p in mfa.parameters()])
    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_is_kept(dtype: torch.dtype) -> None:
    mfa, x = fitting_mixture(), (300 * tokens(4, 3)).to(dtype)  # squares of float16 would overflow
    for entries in (BOTH, MIXTURE, [Add(100 * torch.ones(WIDTH))]):
        free, kept = intervene(x, mfa, entries), intervene(x, mfa, entries, norm="keep")
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(kept.double().norm(dim=-1), x.double().norm(dim=-1), rtol=2 * eps + 1e-6, atol=0)
        cosine = torch.cosine_similarity(kept.double(), free.double(), dim=-1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=8 * eps**2 + 1e-12)
        rows = intervene(x, mfa, entries, norm=["keep", None])
        torch.testing.assert_close(rows[:2], kept[:2])
        torch.testing.assert_close(rows[2:], free[2:], rtol=eps, atol=300 * eps)
    zero = torch.zeros(1, WIDTH, dtype=dtype)
    assert torch.equal(intervene(zero, mfa, BOTH, norm="keep"), zero)
    assert torch.equal(intervene(x, mfa, Add(0 * Z.sum() * torch.ones(WIDTH)), norm="keep"), x)
    assert intervene(zero + 1, mfa, Toward(1, 1.0), norm="keep").isfinite().all()


def test_to_nothing_and_back_has_no_norm_to_keep() -> None:
    """Where the result is zero it has no direction: it stays zero instead of becoming NaN."""
    mfa, x = fitting_mixture(), tokens(2)
    mfa.means[1] = 0
    assert torch.equal(intervene(x, mfa, Toward(1, 1.0), norm="keep"), torch.zeros_like(x))


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


def test_bad_input_is_named(mfa: Any) -> None:
    with pytest.raises(ValueError, match="alpha must be below 65504, as hidden states are in torch.float16"):
        intervene(torch.zeros(2, 32).half(), mfa, Toward(1, 1e5))
    with pytest.raises(ValueError, match=r"x must have shape \(..., 32\) to fit the mixture, got \(2, 31\)"):
        intervene(torch.zeros(2, 31), mfa, BOTH)
    with pytest.raises(TypeError, match=r"x must have a floating-point dtype, got torch.int64"):
        intervene(torch.zeros(2, 32, dtype=torch.long), mfa, BOTH)
    with pytest.raises(TypeError, match="x must be a tensor or an array, got str"):
        intervene("x", mfa, BOTH)
    x = tokens(2)
    with pytest.raises(IndexError, match=r"gate component must be in \[0, 6\), got 6"):
        intervene(x, mfa, BOTH, gate=(6, 0.5))
    with pytest.raises(ValueError, match=r"gate threshold must be in \[0, 1\)"):
        intervene(x, mfa, BOTH, gate=(0, 1.0))
    with pytest.raises(ValueError, match="norm must be one of 'keep', got 'hold'"):
        intervene(x, mfa, BOTH, norm="hold")
    with pytest.raises(ValueError, match="norms for 3 batch rows do not fit a batch of 2"):
        intervene(x, mfa, BOTH, norm=["keep", None, None])
    with pytest.raises(
        TypeError, match=r"gate must be \(component, threshold\) or a gate such as Responsibility, got 3"
    ):
        intervene(x, mfa, BOTH, gate=3)

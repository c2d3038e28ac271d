from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfa_kernels import ops
from mfa_kernels.ops.pairs import reference
from tests.helpers.mixtures import Mixture, drawn, mixture

SHAPES = [(1, 1, 1, 1), (7, 3, 16, 0), (50, 20, 33, 2), (67, 35, 130, 10), (9, 4, 70, 17)]  # (P, K, D, R)


def pairs(count: int, tokens_: int, components: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randint(tokens_, (count,), generator=generator),
        torch.randint(components, (count,), generator=generator).int(),
    )


def latents(m: Mixture, x, n, k):
    return ops.latents(x, n, k, *m[:3], m.woodbury(m.means.mean(0).detach()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.usefixtures("poisoned")
def test_latents_are_the_posterior_mean(backend, shape, per_component):
    p, k, d, r = shape
    m, x = drawn(11, k, d, r, per_component=per_component, dtype=torch.float64)
    n, c = pairs(p, 11, k)
    found = latents(m, x, n, c)
    w, noise = m.loadings[c.long()], m.noise_variance.expand_as(m.means)[c.long()]
    covariance = w @ w.mT + torch.diag_embed(noise)  # the definition: W^T C^-1 (x - mu)
    residual = (x[n] - m.means[c.long()]).unsqueeze(-1)
    expected = (w.mT @ torch.linalg.solve(covariance, residual)).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_decode_matches_the_formula(backend, shape):
    p, k, d, r = shape
    m = mixture(k, d, r, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    components = torch.randint(-1, k, (p, 3), generator=generator).int()
    responsibilities = torch.rand(p, 3, generator=generator, dtype=torch.float64)
    z = torch.randn(p, 3, r, generator=generator, dtype=torch.float64)
    found = ops.decode(components, responsibilities, z, m.means, m.loadings)
    expected = torch.zeros(p, d, dtype=torch.float64)
    for i in range(p):
        for c in range(3):
            if components[i, c] >= 0:
                index = int(components[i, c])
                expected[i] += responsibilities[i, c] * (m.means[index] + m.loadings[index] @ z[i, c])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_decode_of_a_bad_token_is_nan_alone(backend):
    m = mixture(4, 20, 2)
    components = torch.tensor([[0, -1], [-1, -1], [2, 1]]).int()
    responsibilities = torch.tensor([[1.0, 0.0], [math.nan, math.nan], [0.5, 0.5]])
    out = ops.decode(components, responsibilities, torch.zeros(3, 2, 2), m.means, m.loadings)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_gradcheck(backend, per_component):
    m, x = drawn(6, 4, 5, 2, per_component=per_component, dtype=torch.float64)
    n, c = pairs(7, 6, 4)
    leaves = [t.clone().requires_grad_() for t in (x, *m[:3])]
    assert torch.autograd.gradcheck(lambda x, *p: latents(Mixture(*p, m.log_weights), x, n, c), leaves)
    components = torch.tensor([[0, 2], [1, -1], [3, 3]]).int()
    code = [torch.rand(3, 2).double().requires_grad_(), torch.randn(3, 2, 2).double().requires_grad_()]
    parameters = [t.clone().requires_grad_() for t in m[:2]]
    assert torch.autograd.gradcheck(lambda *args: ops.decode(components, *args), code + parameters)


def test_opcheck(backend):
    m, x = drawn(6, 4, 21, 2, dtype=torch.float64)
    n, c = pairs(7, 6, 4)
    leaves = [t.clone().requires_grad_() for t in (x, *m[:3])]
    torch.library.opcheck(
        torch.ops.mfa_kernels.latents.default, (leaves[0], n, c, *leaves[1:], *m.woodbury().tensors())
    )
    components = torch.tensor([[0, 2], [1, -1], [3, 3]]).int()
    code = [torch.rand(3, 2).double().requires_grad_(), torch.randn(3, 2, 2).double().requires_grad_()]
    torch.library.opcheck(torch.ops.mfa_kernels.decode.default, (components, *code, *leaves[1:3]))


def test_latents_reference_agrees(backend):
    m, x = drawn(6, 4, 21, 2, dtype=torch.float64)
    n, c = pairs(7, 6, 4)
    torch.testing.assert_close(latents(m, x, n, c), reference.latents(x, n, c.long(), *m[:3]), rtol=1e-10, atol=1e-10)


class Results(TorchDispatchMode):
    """Sizes of what the backward operators return, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "_backward" in str(func):
            self.sizes[str(func)] = [t.numel() for t in out]
        return out


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_gradients_that_nobody_needs_are_not_made(backend, wanted, per_component):
    """Those of a frozen mixture, which is far larger than its tokens; the others are what they were."""
    m, x = drawn(12, 7, 21, 3, per_component=per_component)
    n, c = torch.arange(12), (torch.arange(12) % 7).int()
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradients(needs):
        given = [x.clone().requires_grad_(), *(t.clone().requires_grad_(need) for t, need in zip(m[:3], needs))]
        z = latents(Mixture(*given[1:], m.log_weights), given[0], n, c)
        loss = ops.decode(c.view(6, 2), weights, z.view(6, 2, 3), *given[1:3]).square().sum()
        leaves = [weights, *(t for t in given if t.requires_grad)]
        with Results() as results:
            return torch.autograd.grad(loss, leaves), results.sizes

    every, _ = gradients((True, True, True))
    found, sizes = gradients(wanted)
    kept = [every[0], every[1], *(g for g, need in zip(every[2:], wanted) if need)]
    for one, other in zip(found, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    parameters = [t.numel() if need else 0 for t, need in zip(m[:3], wanted)]
    assert sizes["mfa_kernels.decode_backward.default"] == [12, 36, *parameters[:2]]
    assert sizes["mfa_kernels.latents_backward.default"] == [x.numel(), *parameters]

"""Gradients through the screened scan: those of the dense scan, and of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels import ops
from mfa_kernels.ops.screen import differentiable, op
from mfa_kernels.ops.screen.types import ScreenedPairs
from tests.helpers.mixtures import Mixture, mixture, tokens

pytestmark = pytest.mark.usefixtures("needs_cpp")


def screened(x: Tensor, m: Mixture, slots: int = 16) -> ScreenedPairs:
    fixed = Mixture(*(t.detach() for t in m))
    woodbury = fixed.woodbury(fixed.means.mean(0))
    return differentiable.log_prob(x, m, woodbury, op.screen(fixed, woodbury, 16), slots)


@pytest.mark.parametrize("spread", [3.0, 0.02], ids=["one_hot", "diffuse"])
@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_are_those_of_the_dense_scan(spread, rank):
    m = mixture(70, 40, rank, spread=spread, dtype=torch.float64)
    x = tokens(m, 300).requires_grad_()
    leaves = Mixture(*(t.requires_grad_() for t in m))
    found = screened(x, leaves)
    assert ((found.evaluated < 0).double().mean() > 0.5) == (spread < 1)
    woodbury = Mixture(*(t.detach() for t in m)).woodbury(m.means.detach().mean(0))
    dense = ops.log_prob(x, *leaves, woodbury)
    torch.testing.assert_close(found.active.log_prob, dense.log_prob, rtol=1e-12, atol=1e-10)
    weights = torch.linspace(-1, 2, 300, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(found.active.log_prob @ weights, [x, *leaves]),
        torch.autograd.grad(dense.log_prob @ weights, [x, *leaves]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    m = mixture(5, 17, 2, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (tokens(m, 4), *m)]
    assert torch.autograd.gradcheck(lambda x, *p: screened(x, Mixture(*p)).active.log_prob, leaves)


def test_opcheck():
    m = mixture(30, 20, 3)
    woodbury = m.woodbury()
    screen = op.screen(m, woodbury, 16)
    leaves = [t.clone().requires_grad_() for t in (tokens(m, 40), *m)]
    torch.library.opcheck(
        torch.ops.mfa_kernels.screened_log_prob.default,
        (*leaves, *woodbury.tensors(), *screen, 16),
    )

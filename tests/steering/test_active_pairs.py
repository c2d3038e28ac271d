"""Active pairs for steering are the same whether or not most components are screened out."""

from __future__ import annotations

import copy

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.mixture import screening
from mfa_kernels.steering.active_pairs import Reader
from tests.helpers.mixtures import mixture, tokens


@pytest.fixture
def problem(needs_screens) -> tuple[MFA, torch.Tensor]:
    m = mixture(200, 64, 4, spread=3.0)
    return MFA.from_parameters(*m[:3], m.log_weights.exp()).requires_grad_(False), tokens(m, 9)


@pytest.mark.parametrize("count", [1, 9])
def test_a_screened_mixture_is_read_through_its_screen(problem, count):
    mfa, x = problem
    plain = Reader(copy.deepcopy(mfa), False)
    assert plain._screen is None
    assert mfa.screen()
    screened = Reader(mfa, False)
    assert screened._screen is not None
    assert screened._screen[0] is mfa.screened()[1]
    wanted, found = plain.read(x[:count]), screened.read(x[:count])
    torch.testing.assert_close(found.log_prob, wanted.log_prob, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.components[:, 0], wanted.components[:, 0])
    own = found.components[:, :1]
    torch.testing.assert_close(found.responsibility(own), wanted.responsibility(own), rtol=1e-4, atol=1e-6)


def test_a_large_mixture_is_screened_unasked(problem, monkeypatch):
    mfa, _ = problem
    monkeypatch.setattr(screening, "_LONE_TOKEN_VALUES", mfa.woodbury().rows.numel())
    assert Reader(mfa, False)._screen is not None
    monkeypatch.setattr(screening, "_LONE_TOKEN_VALUES", mfa.woodbury().rows.numel() + 1)
    assert Reader(copy.deepcopy(mfa), False)._screen is None
    assert Reader(mfa, True)._screen is None


def test_gradients_do_not_go_through_the_screen(problem):
    mfa, x = problem
    mfa.screen()
    reader = Reader(mfa, False)
    x.requires_grad_()
    (found,) = torch.autograd.grad(reader.read(x).log_prob.sum(), x)
    (wanted,) = torch.autograd.grad(copy.deepcopy(mfa).log_prob(x).sum(), x)
    torch.testing.assert_close(found, wanted)


def test_compiles(problem):
    mfa, x = problem
    mfa.screen()
    reader = Reader(mfa, False)
    with torch.no_grad():
        read = torch.compile(lambda x: reader.read(x).logits[:, 0], fullgraph=True, backend="eager")
        torch.testing.assert_close(read(x), reader.read(x).logits[:, 0])

"""A mixture spread over two and four processes is the mixture of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.fitting.m_step import maximize
from tests.distributed.test_fit import CLOSE, assert_close, load
from tests.distributed.worker import SHARDED, SIZES, prior, problem, use
from tests.fitting.parts import collect

CASES = [(size, name) for size in SIZES for name in SHARDED]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {name: use(*problem(name)) for name in SHARDED}


def processes(found, size, name):
    return [load(found, size, rank)[f"sharded, {name}"] for rank in range(size)]


def joined(parts: list[dict[str, Any]], noise: str) -> dict[str, Any]:
    """Gradients of all processes; those of a shared noise are the same on each."""
    out = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    if noise == "shared":
        for part in parts:
            assert torch.equal(part["log_noise"], parts[0]["log_noise"])
        out["log_noise"] = parts[0]["log_noise"]
    return out


def dense(components: Tensor, responsibilities: Tensor, latents: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """By component, whatever slots they are in (N, 90), and times the latents; a code may list what weighs nothing."""
    tokens, slots = (components >= 0).flatten(0, 1).nonzero(as_tuple=True)
    k, r = components.flatten(0, 1)[tokens, slots], responsibilities.flatten(0, 1)[tokens, slots]
    out = torch.zeros(57, 90, dtype=r.dtype)
    weighted = torch.zeros(57, 90, latents.shape[-1], dtype=r.dtype)
    out[tokens, k] = r
    weighted[tokens, k] = r.unsqueeze(-1) * latents.flatten(0, 1)[tokens, slots]
    return out, weighted


@pytest.mark.parametrize(("size", "name"), CASES)
def test_densities_and_codes(found, expected, size, name):
    for mine in processes(found, size, name):
        for key in ("log_prob", "assign", "reconstruct", "loss"):
            torch.testing.assert_close(mine[key], expected[name][key], equal_nan=True, **CLOSE)
        for top_k in (1, 4, None):
            several, one = (values[f"encode, {top_k}"] for values in (mine, expected[name]))
            for a, b in zip(dense(*several), dense(*one)):
                torch.testing.assert_close(a, b, **CLOSE)
            assert several[0][0, 5].max() == -1, "a token that is not finite has no component"
            if top_k is not None:
                assert several[0].shape == one[0].shape
                torch.testing.assert_close(several[3], one[3], equal_nan=True, **CLOSE)


@pytest.mark.parametrize(("size", "name"), CASES)
def test_gradients(found, expected, size, name):
    noise = problem(name)[0].noise
    parts, one = processes(found, size, name), expected[name]
    for key in ("gradients", "gradients, decode"):
        assert_close(joined([part[key] for part in parts], noise), one[key])
    for mine in parts:
        for key in ("dx", "dx, decode"):
            torch.testing.assert_close(mine[key], one[key], **CLOSE)
        torch.testing.assert_close(mine["after Adam"], one["after Adam"], equal_nan=True, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("size", "name"), CASES)
def test_em_and_a_checkpoint_of_the_whole(found, size, name):
    mfa, x = problem(name)
    nll = []
    for _ in range(3):
        s = collect(mfa, x.flatten(0, 1))
        nll.append(-float(s.log_likelihood) / 56)
        maximize(mfa, s, prior())
    for mine in processes(found, size, name):
        assert_close(mine["em"], nll)
        assert all(mine["again"].values())
        assert "cannot be spread over" in mine["too many"]
        if name == "rank 0":
            assert mine["ml"] < nll[-1]
    saved = MFA.from_pretrained(found / f"{size}, {name}")
    assert saved.extra == {"layer": 3}
    if name != "rank 0":  # which went on for a step
        assert_close(dict(saved.state_dict()), dict(mfa.state_dict()))
    assert saved.noise_floor == mfa.noise_floor
    starts = [mine["first"] for mine in processes(found, size, name)]
    assert starts == [mfa.n_components * rank // size for rank in range(size)]

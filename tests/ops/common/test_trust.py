"""Operators refuse what does not fit, by name, on every path, and no wrong call crashes the process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mfa_kernels.ops.common import trust
from tests.helpers.mixtures import mixture, tokens

LOG_PROB = torch.ops.mfa_kernels.log_prob


def check(name: str, **tensors: str):
    return trust.checker(name, tensors, last=("last",), optional=("maybe",), written=("out",))


def test_letters_and_dtypes_are_those_of_the_first_tensor_that_has_them():
    fits = check("op", a="real(N, D)", b="a(D, N) or a(N)", c="int32(2 * N)", d="any()")
    a = torch.zeros(3, 4)
    fits(a, torch.zeros(4, 3), torch.zeros(6).int(), torch.zeros((), dtype=torch.bfloat16))
    fits(a, torch.zeros(3), torch.zeros(6).int(), torch.zeros(()))
    fits(a.double(), torch.zeros(3).double(), torch.zeros(6).int(), torch.zeros(()))


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ((torch.zeros(3), torch.zeros(3)), ValueError, r"op: a must be float32 or float64 of shape \(N, D\).*\(3,\)"),
        ((torch.zeros(3, 4).half(), torch.zeros(3)), TypeError, "op: a must be .* got float16"),
        ((torch.zeros(3, 4), torch.zeros(4)), ValueError, r"op: b must be float32 of shape \(4, 3\), or .* \(3,\)"),
        ((torch.zeros(3, 4), torch.zeros(3).double()), TypeError, r"op: b must be float32 .* got float64"),
    ],
)  # fmt: skip
def test_refusals_say_what_was_found_and_expected(tensors, error, message):
    with pytest.raises(error, match=message):
        check("op", a="real(N, D)", b="a(D, N) or a(N)")(*tensors)


def test_optional_written_and_last():
    fits = check("op", last="any(N)", a="real(N, D)", maybe="a(N)", out="a(D)", flag="", count="positive")
    a = torch.zeros(3, 4)
    fits(torch.zeros(3), a, None, torch.zeros(4), object(), 1)
    with pytest.raises(ValueError, match=r"op: last must be .* \(3,\)"):
        fits(torch.zeros(4), a, None, torch.zeros(4), object(), 1)
    with pytest.raises(ValueError, match="op: maybe must be"):
        fits(torch.zeros(3), a, torch.zeros(4), torch.zeros(4), object(), 1)
    with pytest.raises(ValueError, match="op: out must be .* not contiguous"):
        fits(torch.zeros(3), a, None, torch.zeros(8)[::2], object(), 1)
    with pytest.raises(ValueError, match="op: count must be at least 1, got 0"):
        fits(torch.zeros(3), a, None, torch.zeros(4), object(), 0)


@pytest.mark.parametrize("per_component", [False, True])
@pytest.mark.parametrize("way", ["fewer components", "fewer features", "another rank", "another noise"])
def test_factors_of_another_mixture_are_refused(backend, way, per_component):
    """As those kept from before regions were dropped: forward, and backward through what was saved."""
    sizes = {"fewer components": (5, 21, 3), "fewer features": (9, 20, 3), "another rank": (9, 21, 2)}
    m = mixture(9, 21, 3, per_component=per_component)
    other = mixture(*sizes.get(way, (9, 21, 3)), per_component=per_component != (way == "another noise"))
    x, woodbury = tokens(m, 7), m.woodbury()
    active = LOG_PROB(x, *m, *woodbury.tensors(), 4)
    with pytest.raises(ValueError, match=r"log_prob: (rows|x|scale) must be"):
        LOG_PROB(x, *other, *woodbury.tensors(), 4)
    op, tensors = torch.ops.mfa_kernels, woodbury.tensors()
    for call in (
        lambda p: op.log_prob_backward(torch.ones(7), torch.zeros(7, 4), x, *p, *tensors, *active, [True] * 5),
        lambda p: op.component_log_prob(x, *p[:3], *tensors),
        lambda p: op.component_log_prob_backward(torch.ones(7, len(p.means)), x, *p[:3], *tensors, [True] * 4),
        lambda p: op.latents(x, torch.arange(7), torch.zeros(7).int(), *p[:3], *tensors),
    ):
        call(m)
        with pytest.raises(ValueError, match=r"\w+: (rows|x|scale) must be"):
            call(other)


def fuzzed(count: int, seed: int, backend: str) -> dict[str, int]:
    """What became of wrong calls, made in a process of their own."""
    command = [sys.executable, "-m", "tests.ops.fuzz", str(count), str(seed), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (
        f"the process ended with {done.returncode}:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("backend", ["cpp", "portable", pytest.param("triton", marks=pytest.mark.more)])
@pytest.mark.parametrize("count", [300, pytest.param(4000, marks=pytest.mark.more)])
def test_wrong_calls_are_refused_by_name_or_harmless(count, backend):
    outcome = fuzzed(count, 0, backend)
    assert outcome["calls"] == count
    assert outcome["refused"] > 0.5 * count
    assert outcome["unnamed"] <= 0.01 * outcome["refused"]

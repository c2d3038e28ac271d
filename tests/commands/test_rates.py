"""The doctor's rates: what is timed is the scan it names, beside the faster of two products."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mfa_kernels import ops
from mfa_kernels.commands import doctor, rates
from mfa_kernels.ops.common import cpp

pytestmark = pytest.mark.usefixtures("needs_cpp")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_SHAPE", (300, 40, 48, 4))
    monkeypatch.setattr(rates, "_SECONDS", 0.0)


def test_rows_are_the_ratios_to_the_faster_product(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = 2 * 300 * 40 * 5 * 48
    seconds = {"torch.mm": flops / 1e11, "oneDNN": flops / 2e11, "float32": flops / 1e11, "int8": flops / 8e11}
    monkeypatch.setattr(rates, "least_times", lambda functions: {name: seconds[name] for name in functions})
    product, in_float, in_int8 = rates.rates()
    assert product[1].startswith("200 GFLOP/s by oneDNN")
    assert product[1].endswith("torch.mm takes 2.00 of its time")
    assert in_float == ("scan in float32", "2.00 of the yardstick's time")
    multiplies = cpp.library().multiplies_int8
    assert in_int8[1] == (
        "0.25 of the yardstick's time" if multiplies else "not here: the processor multiplies no int8"
    )


def test_the_problem_is_settled_by_bounds() -> None:
    """Near one-hot: what is timed is neither a diffuse mixture nor one token."""
    x, parameters = rates._problem()
    woodbury = ops.factorize(*parameters[:3], parameters.means.mean(0))
    active = ops.log_prob(x, *parameters, dataclasses.replace(woodbury, int8=()))
    assert (active.counts == 1).all()


def test_every_function_takes_two_turns_at_least() -> None:
    calls = []
    times = rates.least_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == ["a", "b"] * 2
    assert all(0 <= seconds < 1 for seconds in times.values())


def test_the_report_has_them_and_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MFA_KERNELS_BACKEND", raising=False)
    lines = dict(doctor.report())
    assert lines["processor"] == rates.processor()
    assert f"{torch.get_num_threads()} threads" in lines["processor"]
    assert {"matrix products", "scan in float32", "scan, int8 first"} <= set(lines)
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "portable")
    assert "matrix products" not in dict(doctor.report())

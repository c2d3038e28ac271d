"""Wrong calls of everything public end in an error that names an argument or a file, or in a result."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

import mfa_kernels
from mfa_kernels import data, fitting, interpret, steering
from tests.hostile.api import calls


def hostile(count: int, seed: int) -> dict[str, int]:
    """Returns the outcome of so many calls, in a process of their own."""
    command = [sys.executable, "-m", "tests.hostile.api", str(count), str(seed)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 + count // 10)
    assert out.returncode == 0, f"after {out.stderr[-3000:]}"
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize(("count", "seed"), [
    (300, 0), pytest.param(6000, 1, marks=pytest.mark.more), pytest.param(6000, 2, marks=pytest.mark.more),
])  # fmt: skip
def test_wrong_calls_are_refused_by_name(count, seed):
    done = hostile(count, seed)
    assert done["calls"] == count
    assert done["worked"] > count // 20
    assert done.get("unnamed", 0) <= done["refused"] / 100


def test_everything_public_is_called(tmp_path):
    """But for what is made by the library alone: results, errors, and what others of these make."""
    by_us = {"Source", "Handle", "Gate", "Stats", "Code"} | {"as_source"}  # the last, by whatever takes activations
    public = set()
    for module in (mfa_kernels, data, fitting, interpret, steering):
        for name in module.__all__:
            thing = getattr(module, name)
            is_result = dataclasses.is_dataclass(thing) and thing.__module__.split(".")[1] != "steering"
            is_error = isinstance(thing, type) and issubclass(thing, Exception)
            if callable(thing) and not is_result and not is_error:
                public.add(name)
    called = {word for name in calls(tmp_path) for word in re.findall(r"\w+", name)}
    assert public - called - by_us == set()

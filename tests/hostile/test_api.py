"""Wrong calls of everything public end in an error that names an argument or a file, or in a result."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def hostile(count: int, seed: int) -> dict[str, int]:
    """What became of so many calls, in a process of their own."""
    command = [sys.executable, "-m", "tests.hostile.api", str(count), str(seed)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 + count // 10)
    assert out.returncode == 0, f"after {out.stderr[-3000:]}"
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize(("count", "seed"), [
    (500, 0), pytest.param(6000, 1, marks=pytest.mark.more), pytest.param(6000, 2, marks=pytest.mark.more),
])  # fmt: skip
def test_wrong_calls_are_refused_by_name(count, seed):
    done = hostile(count, seed)
    assert done["calls"] == count
    assert done["worked"] > count // 20
    assert done.get("unnamed", 0) <= done["refused"] / 100

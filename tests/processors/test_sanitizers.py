"""Operators under sanitizers, right calls and wrong ones: no report, no crash."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.helpers import sanitized
from tests.processors.test_processors import OPERATORS, ROOT, skip_without

pytestmark = pytest.mark.more

CALLS = 3000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A Python program in the environment of the sanitizers; returns what it wrote to its standard output."""
    environment = sanitized.environment(skip_without("g++"), tmp_path_factory.mktemp("sanitized"))

    def run(*arguments: str) -> str:
        out = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-6000:]
        assert "Sanitizer" not in out.stdout + out.stderr
        assert "could not be built" not in out.stdout + out.stderr
        return out.stdout

    return run


def test_a_fault_is_reported(run):
    """Or none of the other tests could fail: a tensor whose storage is shorter than it says."""
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run("-m", "tests.helpers.sanitized", "fault")


def test_operators(run):
    plugins = ("-p", "tests.helpers.sanitized", "-p", "no:cacheprovider")
    run("-m", "pytest", "-x", *plugins, "-k", "not portable", *OPERATORS, "tests/ops/common/test_trust.py")


@pytest.mark.parametrize("seed", range(2))
def test_wrong_calls(run, seed):
    done = json.loads(run("-m", "tests.helpers.sanitized", str(CALLS), str(seed)).splitlines()[-1])
    assert done["calls"] == CALLS
    assert done["unnamed"] <= CALLS // 100

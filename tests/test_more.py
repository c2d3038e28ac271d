"""`--more`: its tests run, and what is missing fails instead of being skipped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

def test_as_ever(): pass

@pytest.mark.more
def test_long(): pass

def test_missing(): pytest.importorskip("no_such_package")

@pytest.mark.skipif(True, reason="no such program")
def test_missing_by_mark(): pass

def test_elsewhere(): pytest.skip("not applicable: on this system")

@pytest.mark.gpu
def test_gpu(): pytest.skip("no CUDA device")

@pytest.mark.xfail
def test_known(): assert False
"""
MODULE = 'import pytest\npytest.importorskip("no_such_package")\n'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"passed": 1, "skipped": 5, "deselected": 1, "xfailed": 1}),
        (["--more"], {"passed": 2, "failed": 1, "errors": 2, "skipped": 2, "xfailed": 1}),
    ],
)
def test_what_becomes_of_each_test(options: list[str], expected: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "test_each.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", *options]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert {word: int(count) for count, word in _counts(done.stdout)} == expected, done.stdout + done.stderr


def _counts(output: str) -> list[list[str]]:
    """Number and word, from "1 failed, 2 passed in 0.10s"."""
    last = output.strip().splitlines()[-1].partition(" in ")[0]
    return [part.split() for part in last.split(", ")]


def test_a_lost_device_ends_the_process_and_is_named(tmp_path: Path) -> None:
    """Whatever comes after it in the same process would fail too."""
    (tmp_path / "test_lost.py").write_text(
        "def test_it(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "def test_after(): print('never')\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-s"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "test_lost.py::test_it lost the device: CUDA error: an illegal memory access" in done.stderr
    assert "never" not in done.stdout

"""Writers of stores that are killed or interrupted at random moments lose nothing, and leave nothing for long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers.processes import run_python


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not applicable: kills children that it forks")
@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.more)])
def test_killed_terminated_and_interrupted_at_random_moments(tmp_path: Path, kills: int) -> None:
    done = run_python("-m", "tests.data.killed", str(tmp_path), str(kills), seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{name}: {3 * kills} kills" for name in ("harvest", "write", "replace")]

"""Nothing is lost by SIGKILL, SIGTERM and SIGINT: jobs go on to the same bits, a saved mixture is always whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

JOBS = ("fit, sgd", "fit, em", "fit, online", "fit_sharded", "fit_many", "harvest", "save", "build")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not applicable: kills children that it forks")
@pytest.mark.parametrize("kills", [3, pytest.param(15, marks=pytest.mark.more)])
def test_killed_at_random_moments(tmp_path, kills):
    """Each job; with --more more than a hundred times in all."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.killed", str(tmp_path), json.dumps(dict.fromkeys(JOBS, kills))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reported = [line.split(" in ")[0] for line in done.stdout.splitlines()]
    assert reported == [f"{job}: {kills} kills" for job in JOBS]

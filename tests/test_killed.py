"""Nothing is lost by SIGKILL, SIGTERM and SIGINT: jobs go on to the same bits, a saved mixture is always whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# With those of tests/data/test_killed.py, more than 100.
KILLS = {
    "fit, sgd": 9, "fit, em": 9, "fit, online": 9, "fit_sharded": 9, "fit_many": 9, "harvest": 18, "save": 21,
    "build": 9,
}  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="not applicable: kills children that it forks")
def test_killed_at_random_moments(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(tmp_path), json.dumps(KILLS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reported = [line.split(" in ")[0] for line in done.stdout.splitlines()]
    assert reported == [f"{job}: {kills} kills" for job, kills in KILLS.items()]

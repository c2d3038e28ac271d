"""The examples run, and print what they promise."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
PROGRAMS = {
    "callbacks.py": ("wandb", r"\d+ records, the best [\d.]+ nats per token"),
    "datasets_streaming.py": ("datasets", r"5,000 activations, read once: [\d.]+ nats per token"),
    "trainer_loss.py": ("accelerate", r"activations under the mixture: ([\d.]+) -> ([\d.]+) nats per token"),
    "transformer_lens_hook.py": ("transformer_lens", r"(\+\d+\.\d\d nats  .+\n){5}"),
    "nnsight_trace.py": ("nnsight", r"(\+\d+\.\d\d nats  .+\n){5}"),
}


@pytest.mark.more
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_example_runs(program: str, tmp_path: Path) -> None:
    package, printed = PROGRAMS[program]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    done = subprocess.run(
        [sys.executable, FOLDER / program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(printed, done.stdout), done.stdout


def test_every_example_is_named_and_run() -> None:
    programs = {path.name for path in FOLDER.glob("*.py")} - {"_small.py"}
    assert programs == set(PROGRAMS)
    assert set(re.findall(r"\]\((\w+\.py)\)", (FOLDER / "README.md").read_text())) == programs

"""The code of the README and of the guide to looking at regions runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.more
def test_the_readme_runs(tmp_path: Path) -> None:
    (code,) = blocks("README.md")
    printed = run(code, tmp_path)
    assert printed.splitlines()[-1].strip(), "the steered text"
    assert "def f(" in printed


@pytest.mark.more
def test_looking_at_regions_runs(tmp_path: Path) -> None:
    first = blocks("README.md")[0].partition("with steer")[0]
    looking, labels, cache = blocks("docs/exploring.md")
    (tmp_path / "mfa").mkdir()
    before = "my_model = lambda question: 'a label'\n"
    answers = "import pathlib\npathlib.Path('questions/region-0.answer.txt').write_text('zero')\n"
    labels = labels.replace("write_labels(", f"{answers}write_labels(", 1) if "\nwrite_labels(" in labels else labels
    run("\n".join([first, looking, before, labels, cache]), tmp_path)
    assert (tmp_path / "mfa" / "labels.json").exists()
    assert (tmp_path / "latents").is_dir()

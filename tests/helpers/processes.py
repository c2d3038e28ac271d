"""Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(*arguments: str, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments, on one thread, and gives back what it printed."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, timeout=seconds)

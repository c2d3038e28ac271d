"""The program of test_processors.py, which runs under --more alone, compiles: seconds, and headers do change."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from mfa_kernels.ops.common import cpp
from tests.processors.test_processors import PROGRAM


def test_the_program_compiles_without_a_warning():
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    flags = [flag for flag in cpp.FLAGS if flag not in ("-O3", "-fopenmp")]
    command = [compiler, "-fsyntax-only", *flags, "-Wall", "-Wextra", "-Werror", "-I", str(cpp.source_folder())]
    out = subprocess.run([*command, str(PROGRAM)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-4000:]

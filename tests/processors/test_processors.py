"""The CPU kernels on other instruction sets, by other compilers, under sanitizers, and beside other ways of the BLAS.

Minutes, and packages that are seldom there: clang, libomp-dev, g++-aarch64-linux-gnu and qemu-user on Debian.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mfa_kernels.ops.common import cpp
from tests.conftest import NOT_APPLICABLE

pytestmark = pytest.mark.more

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("kernels.cpp")
NEEDED = {  # of /proc/cpuinfo
    "x86-64": (),
    "haswell": ("avx2", "fma", "bmi2"),
    "haswell -mtune=znver3": ("avx2", "fma", "bmi2"),  # for which GCC splits multiply-adds, unless it is told not to
    "skylake-avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "cascadelake": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "haswell -mavxvnni": ("avx2", "fma", "bmi2", "avx_vnni"),
}
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def skip_without(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


def skip_beyond_this_processor(march: str) -> None:
    if march == "native":
        return
    if platform.machine() != "x86_64":
        pytest.skip(f"{NOT_APPLICABLE}not an x86-64 processor")
    missing = set(NEEDED[march]) - set(cpp._processor_flags().split())
    if missing:
        pytest.skip(f"{NOT_APPLICABLE}this processor lacks {', '.join(sorted(missing))}")


def check(tmp_path: Path, compiler: str, *flags: str, emulator: tuple[str, ...] = ()) -> None:
    """Compiles the program, which includes every header of csrc/cpu, without a warning; all of its checks hold."""
    program = tmp_path / "kernels"
    found = skip_without(compiler)
    own = [flag for flag in [*cpp.FLAGS, *cpp.fusing(found)] if flag not in ("-O3", "-fopenmp")]
    command = [found, "-O2", *own, *flags, "-Wall", "-Wextra", "-Werror"]
    include = ["-I", str(cpp.source_folder()), str(PROGRAM), "-o", str(program)]
    built = subprocess.run([*command, *include], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    out = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-4000:]
    assert out.stdout.rstrip().endswith("all checks hold")


@pytest.mark.parametrize("march", NEEDED)
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_kernels_are_the_formulas(tmp_path, compiler, march):
    skip_beyond_this_processor(march)
    check(tmp_path, compiler, *f"-march={march}".split())


@pytest.mark.parametrize(("compiler", "march"), [("g++", "haswell"), ("g++", "native"), ("clang++", "x86-64")])
def test_kernels_leave_other_memory_alone(tmp_path, compiler, march):
    skip_beyond_this_processor(march)
    check(tmp_path, compiler, f"-march={march}", *SANITIZED)


@pytest.mark.parametrize("march", ["armv8-a", "armv8.2-a+dotprod"])
def test_kernels_on_arm(tmp_path, march):
    """Compiled for NEON and emulated: results, not speed."""
    emulator = (skip_without("qemu-aarch64"), "-cpu", "max")
    check(tmp_path, "aarch64-linux-gnu-g++", "-static", f"-march={march}", emulator=emulator)


OPERATORS = [f"tests/ops/{name}.py" for name in (
    "test_threads", "scan/test_scan", "scan/test_int8", "scan/test_kept", "pairs/test_pairs", "pairs/test_overflow",
    "woodbury/test_woodbury",
    "statistics/test_statistics", "kmeans/test_kmeans", "intervene/test_intervene", "screen/test_screen",
)]  # fmt: skip


def run_tests(tests: list[str], **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    out = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-2000:]
    assert "could not be built" not in out.stdout + out.stderr


@pytest.mark.parametrize(("compiler", "march"), [("g++", "x86-64"), ("g++", "haswell"), ("clang++", "haswell")])
def test_operators(tmp_path, compiler, march):
    """The library itself, in PyTorch."""
    skip_beyond_this_processor(march)
    run_tests(OPERATORS, CXX=skip_without(compiler), MFA_KERNELS_MARCH=march, MFA_KERNELS_CACHE=str(tmp_path))


BUDGETS = [f"tests/{name}.py" for name in (
    "helpers/test_budgets", "ops/pairs/test_overflow", "ops/scan/test_scan", "ops/screen/test_screen",
    "ops/pairs/test_triton_pairs", "ops/scan/test_triton_all_logits",
)]  # fmt: skip


@pytest.mark.parametrize("mode", [
    {"MKL_CBWR": "COMPATIBLE"}, {"ATEN_CPU_CAPABILITY": "default"}, {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"OMP_NUM_THREADS": "7"},
], ids=lambda mode: "=".join(*mode.items()))  # fmt: skip
def test_budgets_beside_another_blas(mode):
    """What PyTorch computes rounds otherwise on other processors: no budget depends on how."""
    run_tests(BUDGETS, **mode)

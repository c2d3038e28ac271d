from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import warnings

import pytest

from mfa_kernels.ops.common import cpp


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


LOG_PROB = "import torch, mfa_kernels; m = mfa_kernels.MFA(5, 4, 2); print(m.log_prob(torch.zeros(3, 4)).shape)"


def test_the_library_of_these_sources_is_built():
    if cpp.compiler() is None:
        warnings.warn("no C++ compiler: the build is not tested", stacklevel=1)
        pytest.skip("no C++ compiler")
    assert cpp.library() is not None
    assert cpp.is_built()


def test_without_a_compiler_one_warning_and_the_same_results(tmp_path):
    out = run(
        LOG_PROB + "; m.log_prob(torch.zeros(3, 4)); m.reconstruct(torch.zeros(3, 4))",
        PATH="/nonexistent", CXX="no-such-compiler", MFA_KERNELS_CACHE=str(tmp_path),
    )  # fmt: skip
    assert out.stdout.strip() == "torch.Size([3])"
    assert out.stderr.count("could not be built (RuntimeError: no C++ compiler found") == 1


def test_turned_off_by_the_environment(tmp_path):
    out = run(LOG_PROB, MFA_KERNELS_NATIVE="0", MFA_KERNELS_CACHE=str(tmp_path))
    assert out.stdout.strip() == "torch.Size([3])"
    assert out.stderr == ""
    assert not any(tmp_path.iterdir())


def test_importing_builds_and_probes_nothing(tmp_path):
    code = (
        "import sys, mfa_kernels; "
        "print([m for m in ('transformers', 'triton', 'matplotlib', 'torch.utils.cpp_extension') if m in sys.modules])"
    )
    out = run(code, MFA_KERNELS_CACHE=str(tmp_path))
    assert out.stdout.strip() == "[]"
    assert not any(tmp_path.iterdir())


def test_the_name_follows_the_sources(monkeypatch, tmp_path):
    before = cpp.library_name()
    shutil.copytree(cpp.source_folder(), tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(cpp, "source_folder", lambda: tmp_path)
    assert cpp.library_name() == before
    for changed in ("vec.h", "screen/bounds.h"):
        whole = (tmp_path / changed).read_text()
        (tmp_path / changed).write_text("// changed")
        assert cpp.library_name() != before
        (tmp_path / changed).write_text(whole)


def test_the_name_follows_the_compiler_and_the_architecture(monkeypatch, tmp_path):
    before = cpp.library_name()
    monkeypatch.setenv("MFA_KERNELS_MARCH", "x86-64-v2")
    assert cpp.library_name() != before
    assert "-march=x86-64-v2" in cpp.flags()
    processor = cpp.library_name()
    monkeypatch.setattr(cpp, "_processor_flags", lambda: "another processor")
    assert cpp.library_name() == processor, "machines of different make share what is built for both"
    monkeypatch.setenv("MFA_KERNELS_MARCH", "")
    assert cpp.library_name() != before, "but not what is built for one"
    monkeypatch.undo()

    other = tmp_path / "other-c++"
    names = set()
    for version in ("1.0", "2.0"):
        other.write_text(f"#!/bin/sh\necho other {version}\n")
        other.chmod(0o755)
        cpp.compiler_version.cache_clear()
        monkeypatch.setenv("CXX", str(other))
        names.add(cpp.library_name())
    assert len({before, *names}) == 3


SUM = """typedef float V __attribute__((vector_size(32)));
V sum(const V* a, const V* b, long n) { V s{}; for (long i = 0; i < n; ++i) s += a[i] * b[i]; return s; }
"""


@pytest.mark.parametrize("tune", ["znver3", "haswell"])
def test_multiply_adds_are_not_split(tune):
    """GCC tuned for Zen 3 did so in some loops: a distance depended on the tokens beside it."""
    program = cpp.compiler()
    if program is None or platform.machine() != "x86_64":
        pytest.skip("no C++ compiler for x86-64")
    command = [program, "-march=haswell", f"-mtune={tune}", "-O3", *cpp.fusing(program), "-S", "-o", "-", "-xc++", "-"]
    out = subprocess.run(command, input=SUM, capture_output=True, text=True, check=True)
    assert "vfmadd" in out.stdout
    assert "vmulps" not in out.stdout


def test_an_architecture_that_is_none_is_refused(tmp_path):
    out = run(LOG_PROB, MFA_KERNELS_MARCH="native -fplugin=x", MFA_KERNELS_CACHE=str(tmp_path))
    assert out.returncode == 1
    assert "MFA_KERNELS_MARCH must be an architecture, as in -march=native, got 'native -fplugin=x'" in out.stderr


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("MFA_KERNELS_MARCH", "foo", "MFA_KERNELS_MARCH must be an architecture that "),
        ("MFA_KERNELS_NATIVE", "no", "MFA_KERNELS_NATIVE must be 0 or 1, got 'no'"),
        ("MFA_KERNELS_BACKEND", "foo", "MFA_KERNELS_BACKEND must be one of cpp, triton, portable, got 'foo'"),
    ],
)
def test_an_environment_variable_that_is_wrong_is_an_error(tmp_path, variable, value, told):
    """Of whoever uses the kernels, and of the doctor."""
    if variable == "MFA_KERNELS_MARCH" and cpp.compiler() is None:
        pytest.skip("no C++ compiler")
    doctor = "import sys; from mfa_kernels.commands.cli import main; sys.exit(main(['doctor']))"
    for code in (LOG_PROB, doctor) if variable == "MFA_KERNELS_MARCH" else (doctor,):
        out = run(code, **{"MFA_KERNELS_CACHE": str(tmp_path), variable: value})
        assert out.returncode == 1
        assert told in out.stderr.splitlines()[-1]


def test_the_doctor_says_why_there_is_no_library(tmp_path):
    (tmp_path / "file").write_text("")
    code = "import sys; from mfa_kernels.commands.cli import main; sys.exit(main(['doctor']))"
    out = run(code, MFA_KERNELS_CACHE=str(tmp_path / "file" / "cache"))
    assert out.returncode == 0
    assert out.stderr == ""
    assert "C++ kernels    not available: NotADirectoryError: " in out.stdout
    assert "mfa-kernels doctor" not in out.stdout, "it is the doctor"


def test_a_compilers_own_error_is_told(tmp_path):
    """Not the line that says that a build has failed."""
    compiler = tmp_path / "broken-c++"
    complains = "echo 'x.cpp:1:10: error: no such thing' >&2; exit 1"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *.cpp*-c*|*-c*.cpp*) {complains};; *) exec c++ "$@";; esac\n')
    compiler.chmod(0o755)
    out = run(LOG_PROB, CXX=str(compiler), MFA_KERNELS_CACHE=str(tmp_path / "cache"))
    assert "could not be built (RuntimeError: x.cpp:1:10: error: no such thing)" in out.stderr


def test_a_compiler_without_openmp_is_named(tmp_path):
    """As clang without libomp: plain PyTorch, and a warning that says what to install."""
    compiler = tmp_path / "no-openmp-c++"
    complains = "echo 'x.cpp:1:10: fatal error: omp.h file not found' >&2; exit 1"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) {complains};; esac\n')
    compiler.chmod(0o755)
    out = run(LOG_PROB, CXX=str(compiler), MFA_KERNELS_CACHE=str(tmp_path / "cache"))
    assert out.stdout.strip() == "torch.Size([3])"
    assert "builds no OpenMP programs: install its runtime (for clang libomp-dev)" in out.stderr

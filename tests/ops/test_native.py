from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from mfa_kernels.ops import native


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


LOG_PROB = "import torch, mfa_kernels; m = mfa_kernels.MFA(5, 4, 2); print(m.log_prob(torch.zeros(3, 4)).shape)"


def test_the_library_of_these_sources_is_built():
    if native.compiler() is None:
        warnings.warn("no C++ compiler: the native build is not tested", stacklevel=1)
        pytest.skip("no C++ compiler")
    assert native.library() is not None
    assert native.is_built()


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
    before = native.library_name()
    for path in native.source_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(native, "source_folder", lambda: tmp_path)
    assert native.library_name() == before
    (tmp_path / "vec.h").write_text("// changed")
    assert native.library_name() != before

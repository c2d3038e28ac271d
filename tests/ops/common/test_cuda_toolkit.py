"""The CUDA library's build on first use: the toolkit that is found, what is built for which GPU, and its name."""

from __future__ import annotations

import os
import stat
import subprocess
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mfa_kernels.ops.common import cpp, cuda

pytestmark = [pytest.mark.gpu, pytest.mark.host]


def test_without_a_device_nothing_is_built_and_nothing_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.library.__wrapped__() is None


def test_turned_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("MFA_KERNELS_NATIVE", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a device was looked for"))
    assert cuda.library.__wrapped__() is None


def pretend_device(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


def test_without_nvcc_one_warning(monkeypatch, tmp_path):
    pretend_device(monkeypatch, (9, 0))
    monkeypatch.setenv("MFA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    with pytest.warns(RuntimeWarning, match=r"could not be built \(RuntimeError: nvcc not found") as caught:
        assert cuda.library.__wrapped__() is None
    assert len(caught) == 1
    assert not any(tmp_path.iterdir())


def test_a_gpu_that_is_too_old_is_named(monkeypatch):
    pretend_device(monkeypatch, (7, 5), (6, 1))
    with pytest.warns(RuntimeWarning, match=r"compute capability \(7, 5\), and \(8, 0\) or later is needed"):
        assert cuda.library.__wrapped__() is None


def test_an_old_gpu_beside_others_takes_nothing_from_them(monkeypatch):
    pretend_device(monkeypatch, (7, 5), (9, 0))
    assert cuda.architectures() == ["90"]


def test_what_is_built_and_for_what(monkeypatch, tmp_path):
    """The call that builds: both sources, one target per kind of GPU, the toolkit of the compiler that was found."""
    pretend_device(monkeypatch, (9, 0), (8, 0), (9, 0))
    monkeypatch.setenv("MFA_KERNELS_CACHE", str(tmp_path))
    compiler = tmp_path / "toolkit" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\necho 13.0\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(cuda, "nvcc", lambda: str(compiler))
    from torch.utils import cpp_extension

    home, seen, built = cpp_extension.CUDA_HOME, {}, ModuleType("library")

    def load(name, sources, **options):
        seen.update(options, name=name, sources=sources, home=cpp_extension.CUDA_HOME)
        (Path(options["build_directory"]) / f"{name}.so").touch()
        return built

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(cpp, "compiler", lambda: "g++")
    monkeypatch.setattr(cpp, "ninja", lambda: "/usr/bin/ninja")
    assert cuda.library.__wrapped__() is built
    assert Path(built.__file__).is_file()
    assert [Path(s).name for s in seen["sources"]] == ["bindings.cpp", "kernels.cu"]
    assert [f for f in seen["extra_cuda_cflags"] if "gencode" in f] == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
    ]  # fmt: skip
    assert seen["home"] == str(tmp_path / "toolkit")
    assert home == cpp_extension.CUDA_HOME


def test_the_name_follows_sources_cuda_and_gpus(monkeypatch, tmp_path):
    before = cuda.library_name(["90"])
    assert before != cuda.library_name(["80"])
    for path in cpp.source_folder("cuda").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cpp, "source_folder", lambda backend: tmp_path)
    assert cuda.library_name(["90"]) == before
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert cuda.library_name(["90"]) != before
    monkeypatch.undo()
    (tmp_path / "warp.cuh").write_text("// changed")
    monkeypatch.setattr(cpp, "source_folder", lambda backend: tmp_path)
    assert cuda.library_name(["90"]) != before


def test_nvcc_is_found_with_its_headers(monkeypatch, tmp_path):
    """A bare nvcc on the PATH (a wrapper script) has no toolkit around it."""
    for name in ("alone", "toolkit"):
        program = tmp_path / name / "bin" / "nvcc"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "toolkit" / "include").mkdir()
    (tmp_path / "toolkit" / "include" / "cuda_runtime.h").touch()
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'toolkit' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert cuda.nvcc() == str(tmp_path / "toolkit" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "alone" / "bin"))
    assert cuda.nvcc() != str(tmp_path / "alone" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert cuda.nvcc() == str(tmp_path / "toolkit" / "bin" / "nvcc")


def test_the_newest_toolkit_comes_first():
    names = ["cuda-9.2", "cuda-13.0", "cuda", "cuda-12.8", "cuda-old"]
    ordered = sorted(map(Path, names), key=cuda._release, reverse=True)
    assert [p.name for p in ordered] == ["cuda", "cuda-13.0", "cuda-12.8", "cuda-9.2", "cuda-old"]


def test_bindings_are_what_torch_takes():
    """The host's compiler reads bindings.cpp, Torch's CUDA headers included, without a device."""
    compiler, toolkit = cpp.compiler(), cuda.nvcc()
    if compiler is None or toolkit is None:
        warnings.warn("no compiler or no CUDA headers: the CUDA bindings are not compiled", stacklevel=1)
        pytest.skip("no compiler")
    import sysconfig

    from torch.utils import cpp_extension

    folders = [
        *cpp_extension.include_paths(),
        str(Path(toolkit).parents[1] / "include"),
        sysconfig.get_paths()["include"],
    ]
    # A Torch built without CUDA lacks one generated header of c10/cuda.
    defines = ["-DTORCH_EXTENSION_NAME=bindings", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    command = [compiler, "-fsyntax-only", cuda.CFLAGS[-1], *defines, *(a for f in folders for a in ("-isystem", f))]
    done = subprocess.run(
        [*command, "-Wall", "-Werror", str(cpp.source_folder("cuda") / "bindings.cpp")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[:4000]

"""Builds csrc/cpu by ninja on first use, caches the library, and loads it. Nothing happens at import time."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# The last two: notes of gcc on how vectors are passed, of clang on loops whose length it finds to be no constant.
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-Wno-pass-failed"]

_OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"


def source_folder(backend: str = "cpu") -> Path:
    """The folder csrc/<backend>: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "csrc" / backend, package.parent / "csrc" / backend
    return inside if inside.is_dir() else beside


def cache_folder() -> Path:
    """Where built libraries live: $MFA_KERNELS_CACHE, or the user's cache folder."""
    chosen = os.environ.get("MFA_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mfa_kernels"


def library_name() -> str:
    """Name of the library for these sources, this Torch, this Python and this processor."""
    found = compiler()
    built_by = "none" if found is None else f"{os.path.realpath(found)} {compiler_version(found)}"
    # -march=native: a cache shared between machines must not hand one's instructions to the other.
    processor = _processor_flags() if architecture() == "native" else ""
    return name_for("cpu", source_folder(), [built_by, processor, *flags()])


def architecture() -> str:
    """What the kernels are compiled for: $MFA_KERNELS_MARCH, as the compiler's -march takes it; else "native".

    "x86-64-v3" (AVX2) or "x86-64-v4" (AVX-512) give machines of different make one library, where they share a cache.
    """
    chosen = os.environ.get("MFA_KERNELS_MARCH") or "native"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", chosen):
        raise ValueError(f"MFA_KERNELS_MARCH must be an architecture, as in -march=native, got {chosen!r}")
    return chosen


def flags() -> list[str]:
    """Of the compiler, for csrc/cpu."""
    return [*FLAGS, f"-march={architecture()}"]


def name_for(backend: str, sources: Path, facts: list[str]) -> str:
    """Name of a library that is built from these sources; `facts` is what else a build depends on, beyond Torch,
    Python and the kind of machine."""
    digest = hashlib.sha256()
    for path in sorted(p for p in sources.iterdir() if p.suffix != ".md"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update("\0".join([torch.__version__, sys.version, platform.machine(), *facts]).encode())
    return f"mfa_kernels_{backend}_{digest.hexdigest()[:16]}"


def _processor_flags() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def compiler() -> str | None:
    """The C++ compiler that a build would use: $CXX, else c++ or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


@functools.cache
def compiler_version(program: str) -> str:
    """The first line of what a compiler says of itself."""
    out = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    return (out.splitlines() or ["?"])[0]


def _check_openmp(program: str) -> None:
    """Says what is missing where the compiler builds no OpenMP program, before a long build fails of it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openmp.cpp"
        source.write_text(_OPENMP)
        command = [program, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        why = next((line for line in out.stderr.splitlines() if "error" in line), f"status {out.returncode}")
        raise RuntimeError(
            f"{program} builds no OpenMP programs: install its runtime (for clang libomp-dev), or set CXX to another "
            f"compiler; {why.strip()}"
        )


def ninja() -> str | None:
    """The ninja program: on the PATH, or the one in this Python's environment."""
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        from ninja import BIN_DIR

        found = shutil.which("ninja", path=BIN_DIR)
    return found


def is_built() -> bool:
    """Whether the library for these sources is in the cache."""
    return _file(library_name()).is_file()


def _file(name: str) -> Path:
    return cache_folder() / name / f"{name}.so"


def is_on() -> bool:
    """Whether kernels may be built: ``MFA_KERNELS_NATIVE=0`` says no."""
    return os.environ.get("MFA_KERNELS_NATIVE", "1") != "0"


@functools.cache
def library() -> Any:
    """The loaded C++ library, built first if need be; None (after one warning) where it cannot be built.

    ``MFA_KERNELS_NATIVE=0`` turns it off: the portable PyTorch path then serves every CPU tensor.
    """
    if not is_on():
        return None
    try:
        name = library_name()
        found = cached(name)
        if found is None:
            program = compiler()
            if program is not None:
                _check_openmp(program)
            sources = sorted(source_folder().glob("*.cpp"))
            what = "the C++ kernels, once (about a minute on two cores)"
            found = build(name, sources, what, extra_cflags=flags(), extra_ldflags=["-fopenmp"])
        return found
    except Exception as error:  # whatever the toolchain does, the portable path gives the same results
        warnings.warn(
            f"mfa_kernels: the C++ kernels could not be built ({first_line(error)}); using plain PyTorch on the CPU, "
            "which is slower and gives the same results. `mfa-kernels doctor` says what is missing.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says, for a warning."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def cached(name: str) -> ModuleType | None:
    """The library from the cache; None where it is not there, or does not load: a build that was killed, or is going
    on (`build` takes the lock)."""
    path = _file(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError:
        return None


def build(name: str, sources: list[Path], what: str, **options: Any) -> ModuleType:
    """Compiles the sources into the cache and loads the library.

    Args:
        name: from `name_for`.
        sources: C++ files, and CUDA ones.
        what: is being built, in words, for the line on stderr.
        options: of torch.utils.cpp_extension.load.
    """
    built_by = compiler()
    if built_by is None:
        raise RuntimeError("no C++ compiler found (c++ or g++, or the CXX environment variable)")
    program = ninja()
    if program is None:
        raise RuntimeError("ninja not found: pip install ninja")
    from torch.utils import cpp_extension

    folder = _file(name).parent
    folder.mkdir(parents=True, exist_ok=True)
    print(f"mfa_kernels: building {what}...", file=sys.stderr, flush=True)
    path, chosen = os.environ.get("PATH", ""), os.environ.get("CXX")
    os.environ["PATH"] = f"{Path(program).parent}{os.pathsep}{path}"
    os.environ["CXX"] = built_by  # the one that the name tells of
    try:
        # load() takes a lock in the folder, so that processes started together build once.
        return cpp_extension.load(name, [str(s) for s in sources], build_directory=str(folder), **options)
    finally:
        os.environ["PATH"] = path
        del os.environ["CXX"]
        if chosen is not None:
            os.environ["CXX"] = chosen

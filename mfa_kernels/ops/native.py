"""Builds csrc/cpu by ninja on first use, caches the library, and loads it. Nothing happens at import time."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-Wno-psabi"]


def source_folder() -> Path:
    """The folder csrc/cpu: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "csrc" / "cpu", package.parent / "csrc" / "cpu"
    return inside if inside.is_dir() else beside


def cache_folder() -> Path:
    """Where built libraries live: $MFA_KERNELS_CACHE, or the user's cache folder."""
    chosen = os.environ.get("MFA_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mfa_kernels"


def library_name() -> str:
    """Name of the library for these sources, this Torch, this Python and this processor."""
    digest = hashlib.sha256()
    for path in sorted(source_folder().iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    # -march=native: a cache shared between machines must not hand one's instructions to the other.
    facts = [torch.__version__, sys.version, platform.machine(), _processor_flags(), *FLAGS]
    digest.update("\0".join(facts).encode())
    return f"mfa_kernels_cpu_{digest.hexdigest()[:16]}"


def _processor_flags() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def compiler() -> str | None:
    """The C++ compiler that a build would use: $CXX, else c++ or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def ninja() -> str | None:
    """The ninja program: on the PATH, or the one in this Python's environment."""
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        from ninja import BIN_DIR

        found = shutil.which("ninja", path=BIN_DIR)
    return found


def is_built() -> bool:
    """Whether the library for these sources is in the cache."""
    name = library_name()
    return (cache_folder() / name / f"{name}.so").is_file()


@functools.cache
def library() -> Any:
    """The loaded C++ library, built first if need be; None (after one warning) where it cannot be built.

    ``MFA_KERNELS_NATIVE=0`` turns it off: the portable PyTorch path then serves every CPU tensor.
    """
    if os.environ.get("MFA_KERNELS_NATIVE", "1") == "0":
        return None
    try:
        if is_built():
            with contextlib.suppress(ImportError):  # a build that was killed, or is going on: build() takes the lock
                return _load()
        return _build()
    except Exception as error:  # whatever the toolchain does, the portable path gives the same results
        warnings.warn(
            f"mfa_kernels: the C++ kernels could not be built ({_first_line(error)}); using plain PyTorch on the CPU, "
            "which is slower and gives the same results. `mfa-kernels doctor` says what is missing.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _load() -> ModuleType:
    name = library_name()
    spec = importlib.util.spec_from_file_location(name, cache_folder() / name / f"{name}.so")
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build() -> ModuleType:
    if compiler() is None:
        raise RuntimeError("no C++ compiler found (c++ or g++, or the CXX environment variable)")
    program = ninja()
    if program is None:
        raise RuntimeError("ninja not found: pip install ninja")
    from torch.utils import cpp_extension

    name = library_name()
    folder = cache_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    print("mfa_kernels: building the C++ kernels, once (about half a minute)...", file=sys.stderr, flush=True)
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(program).parent}{os.pathsep}{path}"
    try:
        # load() takes a lock in the folder, so that processes started together build once.
        return cpp_extension.load(
            name, [str(source_folder() / "bindings.cpp")], extra_cflags=FLAGS, build_directory=str(folder)
        )
    finally:
        os.environ["PATH"] = path

"""Builds csrc/cuda by nvcc on first use, caches the library, and loads it. Nothing happens at import time.

What the library's functions take and return is said in csrc/cuda/README.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mfa_kernels.ops.common import cpp

CFLAGS = ["-O3", "-std=c++20"]
CUDA_FLAGS = ["-O3", "-std=c++17"]
OLDEST = (8, 0)
"""Compute capability that the kernels need: double-precision tensor instructions, asynchronous copies."""


def nvcc() -> str | None:
    """The CUDA compiler that a build would use, its headers beside it: of $CUDA_HOME or $CUDA_PATH, on the PATH, or
    the newest under /usr/local; None where there is none."""
    homes = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        homes.append(_home(on_path))
    homes += sorted(Path("/usr/local").glob("cuda*"), key=_release, reverse=True)
    for home in homes:
        compiler = home / "bin" / "nvcc"
        if os.access(compiler, os.X_OK) and (home / "include" / "cuda_runtime.h").is_file():
            return str(compiler)
    return None


def _home(compiler: str) -> Path:
    return Path(compiler).resolve().parents[1]


def _release(folder: Path) -> tuple[int, ...]:
    """(13, 0) for cuda-13.0; the plain name `cuda`, the installation's own choice, before all."""
    digits = folder.name.removeprefix("cuda").strip("-").split(".")
    return (1 << 16,) if digits == [""] else tuple(int(d) if d.isdigit() else 0 for d in digits)


def architectures() -> list[str]:
    """The architectures of the GPUs that this process sees, such as ["90"]; of those that are new enough.

    Raises:
        RuntimeError: none is.
    """
    found = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    served = [capability for capability in found if capability >= OLDEST]
    if not served:
        raise RuntimeError(f"the newest GPU has compute capability {found[-1]}, and {OLDEST} or later is needed")
    return [f"{major}{minor}" for major, minor in served]


def library_name(architectures: list[str]) -> str:
    """Name of the library for these sources, this Torch and its CUDA, this Python and these GPUs."""
    facts = [str(torch.version.cuda), *architectures, *CFLAGS, *CUDA_FLAGS]
    return cpp.name_for("cuda", cpp.source_folder("cuda"), facts)


@functools.cache
def library() -> Any:
    """The loaded CUDA library, built first if need be; None without a CUDA device, and (after one warning) where it
    cannot be built.

    ``MFA_KERNELS_NATIVE=0`` turns it off, as it does the C++ kernels for the CPU.
    """
    if not cpp.is_on() or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    try:
        targets = architectures()
        name = library_name(targets)
        return cpp.cached(name) or _build(name, targets)
    except Exception as error:  # whatever the toolchain does, the other paths give the same results
        warnings.warn(
            f"mfa_kernels: the CUDA C++ kernels could not be built ({cpp.reason(error)}); what they do runs "
            "on other kernels, slower and with the same results. `mfa-kernels doctor` says what is missing.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


_hidden = 0  # contexts of `hidden` that are open


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Leaves to Triton what the library would do."""
    global _hidden
    _hidden += 1
    try:
        yield
    finally:
        _hidden -= 1


def library_in_use() -> Any:
    """`library`, unless it is `hidden`."""
    return None if _hidden else library()


def _build(name: str, targets: list[str]) -> Any:
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc not found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda*)")
    folder = cpp.source_folder("cuda")
    with _toolkit(_home(compiler)):
        return cpp.build(
            name,
            [folder / "bindings.cpp", folder / "kernels.cu"],
            "the CUDA C++ kernels, once (about a minute)",
            further=_version(compiler),
            extra_cflags=CFLAGS,
            extra_cuda_cflags=[*CUDA_FLAGS, *(f"-gencode=arch=compute_{t},code=sm_{t}" for t in targets)],
        )


def _version(compiler: str) -> str:
    """The path of a compiler and its description of itself, in a line."""
    out = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    return f"{os.path.realpath(compiler)} {' '.join(out.split())}"


@contextlib.contextmanager
def _toolkit(home: Path) -> Iterator[None]:
    """Points Torch to the toolkit: it looks for one when it is imported, and in fewer places."""
    from torch.utils import cpp_extension

    before, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, str(home)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before

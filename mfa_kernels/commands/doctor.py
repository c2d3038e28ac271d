"""`mfa-kernels doctor`: reports what is built and missing, which kernels would run where, and how fast the scan is."""

from __future__ import annotations

import importlib.metadata
import platform
import warnings

import torch

from mfa_kernels.commands.rates import processor, rates
from mfa_kernels.mixture.functional import compute_dtype
from mfa_kernels.ops.common import backends, cpp, cuda

_RANK = 10  # a common rank of mixtures


def version(package: str) -> str:
    """Returns the installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def serving(device: str, dtype: torch.dtype) -> str:
    """Returns the backend for a mixture on this device, with parameters of this dtype and a common rank, and why."""
    (parameters,) = compute_dtype(torch.empty(0, dtype=dtype, device=device))
    compute = str(parameters.dtype).removeprefix("torch.")
    note = "" if parameters.dtype == dtype else f", computing in {compute}"
    try:
        name, reason = backends.decided(parameters, _RANK)
    except ValueError as error:
        return f"nothing: {str(error).replace(backends.ASK, '')}"
    if name == "cpp":
        return f"C++ kernels, {8 * cpp.library().vector_bytes}-bit vectors, {torch.get_num_threads()} threads{note}"
    if name == "triton":
        few = "CUDA C++ for stage 0 and up to 16 tokens" if cuda.library() is not None else "no CUDA C++ (nvcc)"
        return f"Triton kernels, {few}{note}"
    return f"plain PyTorch{note}" + ("" if reason is None else f" ({reason.replace(backends.ASK, '')})")


def report() -> list[tuple[str, str]]:
    """Returns rows (what, state), after building the C++ library if it is not in the cache.

    Raises:
        ValueError: naming an environment variable with a value that is not allowed.
    """
    backends.asked_for()
    compiler = cpp.compiler()
    lines = [("python", platform.python_version()), ("platform", platform.platform()), ("processor", processor())]
    packages = ("mfa_kernels", "torch", "triton", "transformers", "numpy", "safetensors", "ninja", "matplotlib")
    lines += [(name, version(name)) for name in packages]
    if compiler is not None:
        compiler = f"{compiler} ({cpp.compiler_version(compiler)}), -march={cpp.architecture()}"
    lines += [
        ("C++ compiler", compiler or "none: install g++, or set CXX"),
        ("ninja program", cpp.ninja() or "none"),
    ]
    lines += [("nvcc", cuda.nvcc() or "none (not needed on the CPU)")]
    cached = cpp.is_built()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the lines below say the same
        built = cpp.library() is not None
    state = f"{'in the cache' if cached else 'built now'}: {cpp.library_name()}"
    if not built:
        state = f"not available: {cpp.problem() if cpp.is_on() else 'MFA_KERNELS_NATIVE=0 turns them off'}"
    lines += [("kernel cache", str(cpp.cache_folder())), ("C++ kernels", state)]
    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    for device in devices:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            lines.append((f"{device}, {str(dtype).removeprefix('torch.')}", serving(device.split()[0], dtype)))
    return lines + (rates() if built and backends.asked_for() in ("", "cpp") else [])

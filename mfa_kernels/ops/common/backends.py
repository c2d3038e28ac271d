"""Decides which kernels serve a tensor, per call, from its device and dtype. Nothing is probed at import.

    cpp        C++ (csrc/cpu), CPU tensors; until 0.1 its name was native, which is still understood
    triton     Triton and CUDA C++ (csrc/cuda), CUDA tensors of float32 parameters; CPU tensors under
               TRITON_INTERPRET=1, if asked for
    portable   plain PyTorch, everywhere

The best that fits is taken, and where a GPU's kernels cannot serve a mixture, one message says why. The environment
variable ``MFA_KERNELS_BACKEND`` asks for one of the three, and then what cannot be served is an error.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp

NAMES = ("cpp", "triton", "portable")
LARGEST_RANK = 64
ASK = " (`mfa-kernels doctor` says what is missing)"
"""Ends a reason; the doctor leaves it out."""


def serving(parameters: Tensor, rank: int) -> str:
    """The backend for float32 or float64 `parameters` (any of the mixture's) with R = `rank`.

    Raises:
        ValueError: MFA_KERNELS_BACKEND is not a backend, or not one that can serve them.
    """
    name, reason = decided(parameters, rank)
    if reason is not None and parameters.device.type not in ("cpu", "meta"):
        _say_once(reason)
    return name


def decided(parameters: Tensor, rank: int) -> tuple[str, str | None]:
    """The backend, as of `serving`, and why it is not a faster one; None where it is the fastest, or asked for."""
    device, asked = parameters.device.type, asked_for()
    if asked == "":
        if device == "cpu":
            return ("cpp", None) if cpp.library() is not None else ("portable", _no_cpp())
        reason = _triton_refuses(parameters, rank)
        return ("triton", None) if reason is None else ("portable", reason)
    reason = None
    if asked == "cpp":
        if device != "cpu":
            reason = f"the C++ kernels serve CPU tensors, and these are on {device}"
        elif cpp.library() is None:
            reason = _no_cpp()
    elif asked == "triton":
        reason = _triton_refuses(parameters, rank)
    if reason is not None:
        raise ValueError(f"MFA_KERNELS_BACKEND={asked}, but {reason}")
    return asked, None


def asked_for() -> str:
    """The backend that MFA_KERNELS_BACKEND asks for; "" where it asks for none.

    Raises:
        ValueError: there is none of that name.
    """
    asked = os.environ.get("MFA_KERNELS_BACKEND", "")
    asked = "cpp" if asked == "native" else asked  # its name of before
    if asked and asked not in NAMES:
        raise ValueError(f"MFA_KERNELS_BACKEND must be one of {', '.join(NAMES)}, got {asked!r}")
    return asked


def _no_cpp() -> str:
    if not cpp.is_on():
        return "MFA_KERNELS_NATIVE=0 turns the C++ kernels off"
    return f"the C++ kernels could not be built{ASK}"


def _triton_refuses(parameters: Tensor, rank: int) -> str | None:
    """Why the Triton kernels cannot serve these parameters; None if they can."""
    if not _has_triton():
        return "the package triton is not installed"
    if parameters.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton kernels serve CPU tensors only under TRITON_INTERPRET=1"
    if parameters.device.type not in ("cpu", "cuda"):
        return f"the Triton kernels are written for CUDA, and these tensors are on {parameters.device.type}"
    if parameters.device.type == "cuda" and torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA's GPUs, and this PyTorch is for AMD's (ROCm)"
    if parameters.dtype != torch.float32:
        return f"the Triton kernels compute in float32, and the parameters are {parameters.dtype}"
    if rank > LARGEST_RANK:
        return f"the Triton kernels serve ranks up to {LARGEST_RANK}, and this one is {rank}"
    if parameters.device.type == "cuda" and _capability(parameters.device.index) < 8:
        return "the Triton kernels need a GPU of compute capability 8.0 or later"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"mfa_kernels: {reason}; using plain PyTorch, which is slower and gives the same results.",
        RuntimeWarning,
        stacklevel=4,
    )

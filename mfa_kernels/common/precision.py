"""Precision of all operators: they compute in the dtype of the parameters, and have one derivative."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def no_autocast(like: Tensor) -> torch.autocast:
    """Turns autocast off on the device of `like`: bfloat16 products would break the promise of precision="exact"."""
    return torch.autocast(like.device.type, enabled=False)


@contextlib.contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Turns autocast off, and computes float32 products in float32, whatever the user allows elsewhere (TF32)."""
    kind = like.device.type
    _enter(kind)
    try:
        with no_autocast(like):
            yield
    finally:
        _leave(kind)


# PyTorch's setting is of the process. The first of the threads that need float32 changes it, the last one changes it
# back: one that left before would let the others multiply in TF32.
_lock = threading.Lock()
_inside: dict[str, int] = {}
_before: dict[str, str] = {}  # what is to be set again


def _enter(kind: str) -> None:
    with _lock:
        _inside[kind] = _inside.get(kind, 0) + 1
        found = of_products(kind)
        if found not in FULL:
            _before[kind] = found
            set_of_products(kind)


def _leave(kind: str) -> None:
    with _lock:
        _inside[kind] -= 1
        if not _inside[kind] and kind in _before:
            set_of_products(kind, _before.pop(kind))


FULL = ("none", "ieee", "highest")
"""Precisions of float32 products that are float32, by the words of either of PyTorch's ways to ask."""


def of_products(kind: str) -> str:
    """Returns the precision of float32 products on a kind of device, "cpu" or "cuda"."""
    owner = _products(kind)
    return torch.get_float32_matmul_precision() if owner is None else owner.fp32_precision


def set_of_products(kind: str, precision: str | None = None) -> None:
    """Sets the precision of float32 products to a result of `of_products`; None: to float32."""
    owner = _products(kind)
    if owner is None:
        torch.set_float32_matmul_precision(precision or "highest")
    else:
        owner.fp32_precision = precision or "ieee"


def _products(kind: str) -> Any:
    """Returns PyTorch's object with the precision of float32 products on a kind of device; None before torch 2.9."""
    backend = torch.backends.cuda if kind == "cuda" else getattr(torch.backends, "mkldnn", None)
    owner = getattr(backend, "matmul", None)
    return owner if isinstance(getattr(owner, "fp32_precision", None), str) else None


def no_tangents(name: str, *tensors: Tensor | None) -> None:
    """Raises where a forward-mode derivative is wanted, which PyTorch would silently set to zero.

    Raises:
        NotImplementedError: one of the tensors has a tangent (torch.func.jvp, jacfwd, forward_ad).
    """
    # The private `_current_level` tells that no tensor has a tangent. Without it, every tensor is asked, 0.2 us each.
    if getattr(forward_ad, "_current_level", 0) < 0 or torch.compiler.is_compiling():
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (jvp, jacfwd): take backward(), or precision='reference'"
        )

"""Global modes of PyTorch: those that a caller may be in, and those in which this library works.

Fitting, evaluating, harvesting, making and loading mixtures give the same results in whatever mode they are called:
each of these functions is a `door` to ordinary modes. Iterables and callbacks of the caller run meanwhile in the modes
of the caller, under `of_the_caller`. The methods of `MFA` on tokens are not doors: they record gradients, or not, as
the caller wants, and the other modes do not reach their operators.

`torch.use_deterministic_algorithms` is left as it is, because it changes only the repeatability of results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from mfa_kernels.common import precision

Item = TypeVar("Item")
P = ParamSpec("P")
Result = TypeVar("Result")

_END = object()


@dataclass(frozen=True)
class Modes:
    """The modes of a thread; the default dtype, products and anomaly detection are those of the whole process.

    Attributes:
        grad: True where gradients are recorded.
        inference: True in inference mode.
        autocast: by kind of device, the dtype to which autocast casts there; devices without autocast are absent.
        dtype, device: the default dtype and device of new tensors.
        products: by kind of device, the precision of float32 products; devices with full precision are absent.
        anomaly: True where autograd looks for NaN, and True where it raises then.
    """

    grad: bool = True
    inference: bool = False
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    products: tuple[tuple[str, str], ...] = ()
    anomaly: tuple[bool, bool] = (False, True)

    @classmethod
    def now(cls) -> Modes:
        """Returns the modes of this moment."""
        kinds = _kinds()
        precisions = ((kind, precision.of_products(kind)) for kind in kinds)
        is_anomalous = torch.is_anomaly_enabled()
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)),
            torch.get_default_dtype(),
            str(torch.get_default_device()),
            tuple((kind, found) for kind, found in precisions if found not in precision.FULL),
            (is_anomalous, not is_anomalous or torch.is_anomaly_check_nan_enabled()),
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Sets these modes for a `with` block; modes that are set already are not touched."""
        before = Modes.now()
        if before == self:
            yield
            return
        with ExitStack() as stack:
            if self.inference != before.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            # Grad mode is set after inference mode, which changes it too.
            stack.enter_context(torch.set_grad_enabled(self.grad))
            casts = dict(self.autocast)
            for kind in dict(before.autocast) | casts if self.autocast != before.autocast else ():
                stack.enter_context(torch.autocast(kind, casts.get(kind), enabled=kind in casts))
            if self.device != before.device:
                stack.enter_context(torch.device(self.device))
            if self.dtype != before.dtype:
                torch.set_default_dtype(self.dtype)
                stack.callback(torch.set_default_dtype, before.dtype)
            wanted, found = dict(self.products), dict(before.products)
            for kind in (wanted | found) if wanted != found else ():
                precision.set_of_products(kind, wanted.get(kind))
                stack.callback(precision.set_of_products, kind, found.get(kind))
            if self.anomaly != before.anomaly:
                stack.enter_context(torch.autograd.set_detect_anomaly(*self.anomaly))
            yield


ORDINARY = Modes()
"""The modes of a new thread."""

_thread = threading.local()  # `caller` has the modes that the outermost door found


def _kinds() -> tuple[str, ...]:
    """Returns the kinds of devices whose modes matter here."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@contextmanager
def ordinary(gradients: bool = True) -> Iterator[None]:
    """Sets the modes in which this library works, for a `with` block.

    Args:
        gradients: True to set grad mode and inference mode too, False to leave them as they are.
    """
    outer, now = getattr(_thread, "caller", None), Modes.now()
    _thread.caller = outer or now
    try:
        with (ORDINARY if gradients else replace(ORDINARY, grad=now.grad, inference=now.inference)).entered():
            yield
    finally:
        _thread.caller = outer


def door(function: Callable[P, Result]) -> Callable[P, Result]:
    """Returns the function, made to run in ordinary modes."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Result:
        with ordinary():
            return function(*args, **kwargs)

    return inside


@contextmanager
def of_the_caller() -> Iterator[None]:
    """Sets the modes in which the outermost `ordinary` was entered, for code of the caller."""
    caller = getattr(_thread, "caller", None)
    if caller is None:
        yield
        return
    _thread.caller = None  # a door that the caller's own code opens is an outermost one
    try:
        with caller.entered():
            yield
    finally:
        _thread.caller = caller


def read(batches: Iterable[Item]) -> Iterator[Item]:
    """Yields the items of an iterable of the caller's, each made in the caller's modes."""
    with of_the_caller():
        iterator = iter(batches)
    return _each(iterator, of_the_caller)


def made(items: Iterator[Item]) -> Iterator[Item]:
    """Yields the items of an iterator of ours, each made in ordinary modes; in between, the caller's modes are on."""
    return _each(items, ordinary)


def _each(items: Iterator[Item], modes: Callable[[], AbstractContextManager[None]]) -> Iterator[Item]:
    while True:
        with modes():
            item: Any = next(items, _END)
        if item is _END:
            return
        yield item

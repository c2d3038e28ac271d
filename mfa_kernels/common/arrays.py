"""Tensors from array-likes: NumPy's arrays, and all that NumPy can make an array of.

Their type does not matter, only that they say how to be read (`__array__`, `__dlpack__`), as frames and series of
pandas, memory maps, and arrays of other libraries do; lists of numbers are accepted too.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KINDS = "fiubc"  # NumPy's letters for the kinds of numbers


def is_array(value: Any) -> bool:
    """True for a value that can be read as an array, without reading it; False for NumPy's scalars and for lists."""
    is_one = isinstance(value, type | np.generic)
    return not is_one and (hasattr(value, "__array__") or hasattr(value, "__dlpack__"))


def is_several(value: Any) -> bool:
    """True for an array or a list, False for a number; an array of no dimension is a number."""
    return isinstance(value, list | tuple) or (is_array(value) and getattr(value, "ndim", 1) != 0)


def is_spread(tensor: Tensor) -> bool:
    """True for a tensor that is spread over processes (a DTensor), as FSDP and tensor parallelism make them."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none, and importing it takes a second
    return module is not None and isinstance(tensor, module.DTensor)


def as_array(value: Any, name: str) -> np.ndarray:
    """Returns an array-like as an array of numbers, which shares its memory where it can.

    Raises:
        TypeError: naming the argument: it is no array, has a mask, or does not hold numbers of a size that torch knows.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, got a masked one: fill it, or leave its rows out")
    try:
        array = np.asarray(value)
    except Exception as error:  # any kind: lists may be ragged, arrays on a GPU
        raise TypeError(f"{name} must be a tensor or an array, got {reprlib.repr(value)}: {error}") from None
    if array.dtype.kind not in _KINDS:
        hint = ", as text and missing values make it" if array.dtype == object else ""
        raise TypeError(f"{name} must hold numbers, got a {type(value).__name__} of dtype {array.dtype}{hint}")
    if array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):
        raise TypeError(f"{name} must have at most 64 bits a number, got {array.dtype}")
    return array


def as_tensor(value: Any, name: str) -> Tensor:
    """Returns a tensor as it is, and an array-like or a (nested) list of numbers as a tensor.

    Python's floats get torch's default dtype, as from `torch.tensor`; other values keep their own. Memory is shared
    where torch can: with writable arrays of this machine's byte order whose strides are not negative.

    Raises:
        TypeError: naming the argument, as for `as_array`, and for a tensor that is spread over processes.
    """
    if isinstance(value, Tensor):
        if is_spread(value):
            raise TypeError(f"{name} must be a tensor of one process, got a DTensor: pass its full_tensor()")
        return value
    if not is_array(value) and (not isinstance(value, Sequence) or isinstance(value, str | bytes)):
        raise TypeError(f"{name} must be a tensor or an array, got {type(value).__name__}")
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
        with suppress(Exception):  # any kind: a library may not lend its memory, and a copy may do
            return torch.from_dlpack(value)
    array = as_array(value, name)
    tensor = torch.from_numpy(array if shares_memory(array) else in_native_order(array))
    return tensor.to(torch.get_default_dtype()) if type(_first(value)) is float else tensor


def _first(value: Any) -> Any:
    """Returns the first number of nested lists; a value that is no list, as it is."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return value


def shares_memory(array: np.ndarray) -> bool:
    """True where a tensor can be a view of an array."""
    steps = all(step >= 0 and step % array.itemsize == 0 for step in array.strides)
    return array.flags.writeable and array.dtype.isnative and steps


def in_native_order(array: np.ndarray) -> np.ndarray:
    """Returns a copy of an array in the byte order of this machine."""
    return np.array(array, array.dtype.newbyteorder("="))

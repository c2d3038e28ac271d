"""One view of activations of any kind: `Source` reads tensors, arrays, stores and batches by row."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfa_kernels.common import modes
from mfa_kernels.common.arrays import as_array, as_tensor, in_native_order, is_array, shares_memory
from mfa_kernels.common.checks import check_floats


@dataclass(eq=False)
class Source:
    """N activations of width D, read by row number in one float dtype. Made by `as_source`.

    Attributes:
        length: N.
        n_features: D.
        dtype: the dtype of rows as they are read: float32, or float64 where the data is float64.
        read: a function from row numbers (n,) to rows (n, D), in the dtype of the data.
        read_range: a function from start and stop to rows [start, stop); None: `read` serves.
        device: the device of rows as they are read.
        in_memory: True where reading is cheap, False where it is worth reading ahead.
        texts: a function that returns the number of the text of each row, (N,) int64; None where that is not known.
        meta: facts about the data, as in `ActivationStore.meta`: model, layer, ...; may be empty.
        weights: positive weights of the rows, (N,) float64 on the CPU; None: all 1 (`mfa_kernels.fitting.row_weights`).
    """

    length: int
    n_features: int
    dtype: torch.dtype
    read: Callable[[Tensor], Tensor]
    read_range: Callable[[int, int], Tensor] | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    in_memory: bool = True
    texts: Callable[[], Tensor] | None = None
    meta: Any = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)  # a text will do
        self.dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.meta = self.meta if isinstance(self.meta, Mapping) else {}

    def __len__(self) -> int:
        return self.length

    def rows(self, index: Tensor) -> Tensor:
        """Returns the rows (n, D) at `index` (n,) int64, in its order."""
        return self.read(index).to(self.dtype)

    def chunk(self, start: int, stop: int) -> Tensor:
        """Returns rows [start, stop), (stop - start, D): a view of the data where that is possible."""
        found = self.read(torch.arange(start, stop)) if self.read_range is None else self.read_range(start, stop)
        return found.to(self.dtype)


def picked(source: Source, index: Tensor) -> Source:
    """Returns a `Source` of the rows at `index` (n,), in its order; they are read when they are asked for."""
    texts, weights = source.texts, source.weights
    return replace(
        source,
        length=len(index),
        read=lambda place: source.rows(index[place.to(index.device)]),
        read_range=lambda start, stop: source.rows(index[start:stop]),
        texts=None if texts is None else lambda: texts()[index.cpu()],
        weights=None if weights is None else weights[index.cpu()],
    )


def home(source: Source, rows: int, device: torch.device) -> torch.device:
    """Returns the device that holds a sample of so many rows: `device`, or that of the data if it would be too full."""
    return device if rows * source.n_features * source.dtype.itemsize <= room(device) else source.device


def room(device: torch.device) -> float:
    """Returns the bytes of a sample that a device takes."""
    return torch.cuda.get_device_properties(device).total_memory / 4 if device.type == "cuda" else float("inf")


def as_source(activations: Any, name: str = "activations") -> Source:
    """Returns activations of any accepted kind as a `Source`.

    Args:
        activations: one of
            a tensor (..., D) of a floating-point dtype, on any device; leading dimensions are flattened;
            an array (..., D), or what NumPy makes one of, such as a data frame; a memory map is read row by row;
            an object with `__len__`, `n_features` and `rows(index) -> (n, D)`, such as an `ActivationStore`; its
            `texts` (N,), if any, number the text of each row, and whole texts are then held out; from its dict `meta`,
            if any, the report of a fit keeps the model, the tokenizer and the layer;
            an iterable of batches (..., D), each a tensor or array, or a tuple that begins with one: they are
            concatenated in memory, in their own dtype.
        name: the name of the argument, for messages.

    Raises:
        TypeError, ValueError: naming the argument, for integers, no rows, or batches of several widths, among others.
    """
    if isinstance(activations, Source):
        source = activations
    elif isinstance(activations, Tensor):
        source = _tensor_source(activations.detach(), name)
    elif hasattr(activations, "rows") and hasattr(activations, "n_features"):
        source = _store_source(activations, name)
    elif is_array(activations):
        source = _array_source(activations, name)
    elif isinstance(activations, Iterable) and not isinstance(activations, str | bytes | dict):
        source = _tensor_source(_concatenate(activations, name), name)
    else:
        raise TypeError(
            f"{name} must be a tensor, an array, an object with rows(index) and n_features (an ActivationStore) "
            f"or an iterable of batches (B, D), got {type(activations).__name__}{_opened(activations)}"
        )
    if not len(source) or not source.n_features:
        raise ValueError(f"{name} must hold at least one row and one feature, got {len(source)} x {source.n_features}")
    return source


def _opened(value: Any) -> str:
    """Returns a hint for a path: what to give in its place."""
    if not isinstance(value, str | os.PathLike):
        return ""
    return f": ActivationStore({os.fspath(value)!r}) opens a store"


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) < 2:
        raise ValueError(f"{name} must have shape (N, D) or (..., D), got {tuple(shape)}")


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating-point dtype, got {dtype}")


def _check_values(data: Tensor, name: str) -> None:
    _check_shape(check_floats(data, name).shape, name)
    if data.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")


def _tensor_source(data: Tensor, name: str) -> Source:
    _check_values(data, name)
    data = data.flatten(0, -2)

    def read(index: Tensor) -> Tensor:
        return data.index_select(0, index.to(data.device))

    return Source(len(data), data.shape[1], data.dtype, read, lambda start, stop: data[start:stop], data.device)


def _array_source(activations: Any, name: str) -> Source:
    if not isinstance(activations, np.ndarray):
        return _tensor_source(as_tensor(activations, name), name)
    data = as_array(activations, name)
    _check_shape(data.shape, name)
    dtype = torch.from_numpy(in_native_order(data[:0])).dtype
    _check_dtype(dtype, name)
    is_mapped = isinstance(activations, np.memmap)
    if not is_mapped and shares_memory(data):
        return _tensor_source(torch.from_numpy(data), name)
    data = data.reshape(-1, data.shape[-1])

    def read(index: Tensor) -> Tensor:
        return torch.from_numpy(in_native_order(data[index.cpu().numpy()]))

    def read_range(start: int, stop: int) -> Tensor:
        return torch.from_numpy(in_native_order(data[start:stop]))

    return Source(len(data), data.shape[1], dtype, read, read_range, in_memory=not is_mapped)


def _store_source(store: Any, name: str) -> Source:
    length, features = len(store), int(store.n_features)

    def read(index: Tensor) -> Tensor:
        out = store.rows(index.cpu())
        if not isinstance(out, Tensor) or tuple(out.shape) != (len(index), features):
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{name}.rows must return a tensor of shape ({len(index)}, {features}), got {found}")
        return out

    if not length:
        return Source(0, features, torch.float32, read)
    first, *again = [read(torch.zeros(1, dtype=torch.long)) for _ in range(3)]
    if any(other.data_ptr() == first.data_ptr() for other in again):
        shared = read  # perhaps a buffer that is filled again, which would change the rows kept

        def read(index: Tensor) -> Tensor:
            return shared(index).clone()

    _check_dtype(first.dtype, f"{name}.rows")
    texts = (lambda: _texts(store, name)) if hasattr(store, "texts") else None
    meta = getattr(store, "meta", None)
    return Source(length, features, first.dtype, read, None, first.device, False, texts, meta)


def _texts(store: Any, name: str) -> Tensor:
    texts = store.texts
    if not isinstance(texts, Tensor) or texts.shape != (len(store),) or texts.is_floating_point():
        found = f"{texts.dtype} of shape {tuple(texts.shape)}" if isinstance(texts, Tensor) else type(texts).__name__
        raise ValueError(f"{name}.texts must be integers of shape ({len(store)},), a text for each row, got {found}")
    return texts.long().cpu()


def _may_be_rows(value: Any) -> bool:
    """True for a value that could be activations by itself: labels and masks could not."""
    if not is_array(value):
        return False
    tensor = as_tensor(value, "activations")
    return tensor.dim() > 1 and tensor.is_floating_point()


def as_rows(batch: Any, name: str) -> Tensor:
    """Returns a batch (..., D), which is a tensor, an array, or a tuple that begins with one, as a tensor (n, D).

    Loaders make lists too in place of tuples. A list of several activations is refused, because only its first would be
    taken.
    """
    if isinstance(batch, list) and sum(map(_may_be_rows, batch)) > 1:
        raise ValueError(
            f"{name} is a list of {len(batch)} activations: give them as one tensor (torch.cat), or as a tuple whose "
            "first entry is what is meant"
        )
    found = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not is_array(found):
        several = isinstance(found, Mapping) and all(map(is_array, found.values()))
        hint = ": fit_many fits to the layers of a stream, fit to one of them" if several else ""
        raise TypeError(f"{name} must be a tensor or an array, got {type(found).__name__}{hint}")
    rows = as_tensor(found, name)
    _check_values(rows, name)
    return rows.detach().flatten(0, -2)


def _concatenate(batches: Iterable[Any], name: str) -> Tensor:
    """Returns all the batches in one tensor; each is released after its copy, so that the data is held once."""
    held: deque[Tensor] = deque()
    dtype: torch.dtype | None = None
    for i, item in enumerate(modes.read(batches)):
        batch = as_rows(item, f"{name}: batch {i}")
        if held and batch.shape[-1] != held[0].shape[-1]:
            raise ValueError(
                f"{name}: batch {i} has width {batch.shape[-1]}, but batch 0 has width {held[0].shape[-1]}"
            )
        dtype = batch.dtype if dtype is None else torch.promote_types(dtype, batch.dtype)
        # A generator of batches may refill one tensor; the batches of a list are all there at once.
        held.append(batch if isinstance(batches, list | tuple) else batch.clone())
    if not held:
        raise ValueError(f"{name} is an iterable without batches (an iterator can be read only once)")
    out = torch.empty(sum(len(batch) for batch in held), held[0].shape[-1], dtype=dtype, device=held[0].device)
    start = 0
    while held:
        batch = held.popleft()
        out[start : start + len(batch)] = batch
        start += len(batch)
    return out

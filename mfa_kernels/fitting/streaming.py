"""Fits that are fed: a stream is read once, batch by batch, for one fit or for several in lock step."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from mfa_kernels.common.modes import ordinary
from mfa_kernels.data.source import Source, as_rows, as_source
from mfa_kernels.mixture.mfa import MFA

P = ParamSpec("P")

_MOST_EMPTY = 10_000  # batches in a row that hold no row, after which a stream is taken to bring none
_END = object()  # of a stream; None in one is somebody's mistake

Steps = Generator[None, Any, None]
"""Work that yields when it needs another batch, and is sent it; None says that there are no more."""

Fitting = Generator[None, Any, MFA]
"""The same, with the mixture that it comes to."""


class Feed:
    """The rows of a stream between the batches that they come in and those that they are wanted in, in order.

    Batches are tensors, arrays or tuples that begin with one, (..., D). They are copied: a stream may refill one.
    """

    def __init__(self) -> None:
        self._held: deque[Tensor] = deque()
        self._rows = self._batches = self._all = 0
        self._none = torch.empty(0, 0)  # rows like those of the first batch
        self._empty = 0  # batches without a row since the last one with some
        self.ended = False  # whether the stream has, as far as is known

    def put(self, batch: Any) -> None:
        """Takes a batch over; None: the stream has ended."""
        if batch is None:
            self.ended = True
            return
        rows = as_rows(batch, f"activations: batch {self._batches}")
        if not self._batches:
            self._none = rows.new_empty(0, rows.shape[1])
        elif rows.shape[1] != self._none.shape[1]:
            raise ValueError(
                f"activations: batch {self._batches} has width {rows.shape[1]}, but batch 0 has width "
                f"{self._none.shape[1]}"
            )
        self._batches += 1
        self._empty = 0 if len(rows) else self._empty + 1
        if self._empty >= _MOST_EMPTY:
            raise ValueError(
                f"activations: {self._empty:,} batches in a row hold no row, up to batch {self._batches - 1}"
            )
        self._rows += len(rows)
        self._all += len(rows)
        self._held.append(rows.clone())

    @property
    def taken(self) -> int:
        """Rows that came and are no longer here."""
        return self._all - self._rows

    def holds(self, rows: int) -> bool:
        """Whether that many rows are here, or all that are left."""
        return self.ended or self._rows >= rows

    def take(self, rows: int) -> Tensor:
        """The next `rows` rows, fewer where they are the last: float32, or float64 where they came so."""
        if self._held and len(self._held[0]) < rows:
            self._held = deque([torch.cat(tuple(self._held))])
        first = self._held.popleft() if self._held else self._none
        if len(first) > rows:
            self._held.appendleft(first[rows:])
            first = first[:rows]
        self._rows -= len(first)
        return first if first.dtype == torch.float64 else first.float()

    def peek(self, rows: int) -> Tensor:
        """What `take` gives, which stays here."""
        first = self.take(rows)
        self._held.appendleft(first)
        self._rows += len(first)
        return first

    def source(self) -> Source:
        """All the rows that are here; they are no longer here afterwards, and each batch is let go when it is copied.

        Raises:
            ValueError: there are none.
        """
        self._rows = 0
        return as_source(self._held.popleft() for _ in range(len(self._held)))


def alone(fitting: Callable[P, Fitting]) -> Callable[P, MFA]:
    """A fit as a function: its first argument, where it is an iterator, is what it is fed."""

    @wraps(fitting)
    def fit(*args: P.args, **kwargs: P.kwargs) -> MFA:
        steps = fitting(*args, **kwargs)
        activations: Any = args[0] if args else kwargs["activations"]
        return drive({"": steps}, activations if isinstance(activations, Iterator) else iter(()))[""]

    fit.__annotations__ = {**fitting.__annotations__, "return": "MFA"}
    fit.__signature__ = inspect.signature(fitting).replace(return_annotation="MFA")  # type: ignore[attr-defined]
    return fit


def drive(
    fits: Mapping[str, Fitting],
    batches: Iterator[Any],
    part: Callable[[str, Any], Any] = lambda name, batch: batch,
) -> dict[str, MFA]:
    """Runs fits to their ends, each of them fed with every batch before the next one is read.

    What they do does not depend on who else is fed. Ctrl-C is handed to all that still go on, and each may return what
    it has; an error of one of them ends all, and its message begins with the name of the fit, if it has one.

    Args:
        fits: that have not begun, by name.
        batches: read until it ends or all fits have.
        part: called as part(name, batch), what a fit is sent of a batch.

    Returns:
        The mixtures, by name.
    """
    found: dict[str, MFA] = {}
    read = 0
    going = dict(fits)

    def advance(name: str, step: Callable[[Any], None], sent: Any) -> None:
        with told_of(name), ordinary():
            try:
                step(sent)
            except StopIteration as stop:
                found[name] = stop.value
                del going[name]

    try:
        try:
            for name in fits:
                advance(name, going[name].send, None)
            while going:
                batch = next(batches, _END)
                for name in list(going):
                    with told_of(name):
                        own = None if batch is _END else part(name, batch)
                        if own is None and batch is not _END:
                            raise TypeError(f"activations: batch {read} must be a tensor or an array, got None")
                    advance(name, going[name].send, own)
                read += 1
                if any(mfa.fit_report.interrupted for mfa in found.values()):
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            for name in list(going):
                advance(name, going[name].throw, KeyboardInterrupt)
    finally:
        for fitting in going.values():
            fitting.close()
    return {name: found[name] for name in fits}


@contextmanager
def told_of(name: str) -> Iterator[None]:
    """Errors of the user's begin with the name of the fit, where it has one."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        if name and type(error) in (TypeError, ValueError, RuntimeError):  # others may take other arguments
            raise type(error)(f"{name}: {error}") from error
        raise

"""The rows of a stream, from the batches that they come in to those that are wanted."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.data.source import Source, as_rows, as_source

_MOST_EMPTY = 10_000  # batches without a row that may follow each other before the stream is taken to bring none


class RowQueue:
    """The rows of a stream that have come and are not used yet, in order.

    Batches are tensors, arrays or tuples that begin with one, (..., D). They are copied: a stream may refill one.

    Attributes:
        ended: true where no more rows will come.
    """

    def __init__(self) -> None:
        self._parts: deque[Tensor] = deque()
        self._rows = self._batches = self._all = 0
        self._none = torch.empty(0, 0)  # no rows, with the width and the dtype of the first batch
        self._empty = 0  # batches without a row since the last one with some
        self.ended = False

    def put(self, batch: Any) -> None:
        """Takes a batch over.

        Raises:
            TypeError, ValueError: naming the batch by its number; one that is None or has another width among them.
        """
        if batch is None:
            raise TypeError(f"activations: batch {self._batches} must be a tensor or an array, got None")
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
        self._parts.append(rows.clone())

    @property
    def taken(self) -> int:
        """Rows that came and are no longer here."""
        return self._all - self._rows

    def holds(self, rows: int) -> bool:
        """True where that many rows are here, or all that are left."""
        return self.ended or self._rows >= rows

    def take(self, rows: int) -> Tensor:
        """Removes and returns the next `rows` rows, fewer at the end: (n, D) float64 where they came so, else
        float32."""
        if self._parts and len(self._parts[0]) < rows:
            self._parts = deque([torch.cat(tuple(self._parts))])
        first = self._parts.popleft() if self._parts else self._none
        if len(first) > rows:
            self._parts.appendleft(first[rows:])
            first = first[:rows]
        self._rows -= len(first)
        return first if first.dtype == torch.float64 else first.float()

    def peek(self, rows: int) -> Tensor:
        """The rows that `take` would return, which stay here."""
        first = self.take(rows)
        self._parts.appendleft(first)
        self._rows += len(first)
        return first

    def source(self) -> Source:
        """Removes and returns all the rows; each batch is freed when it is copied.

        Raises:
            ValueError: there are none.
        """
        self._rows = 0
        return as_source(self._parts.popleft() for _ in range(len(self._parts)))

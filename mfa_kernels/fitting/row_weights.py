"""Rows that weigh: a row of weight 2 counts as two, in whatever takes sums over rows."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_finite, check_tensor
from mfa_kernels.data.source import Source, picked

_MOST = 2.0**53  # rows that float64 counts one by one


class Weighed(NamedTuple):
    """Rows of the data.

    Attributes:
        rows: (n, D).
        weights: what each weighs, (n,) float64 on their device; None: all 1.
        numbers: of the rows in their source, (n,) int64; None where nobody asks.
    """

    rows: Tensor
    weights: Tensor | None = None
    numbers: Tensor | None = None

    @property
    def mass(self) -> float:
        """The sum of the weights."""
        return float(len(self.rows)) if self.weights is None else float(self.weights.sum())


def check_weights(weights: Any, rows: int, name: str) -> Tensor:
    """Weights of so many rows, (N,) float64, where they are; raises for what is not finite and non-negative."""
    found = check_tensor(weights, name).detach()
    if found.is_complex():
        raise TypeError(f"{name} must be real, got {found.dtype}")
    if found.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    found = found.to(torch.float64)
    if found.shape != (rows,):
        raise ValueError(f"{name} must have shape (N,) = ({rows},), got {tuple(found.shape)}")
    if not (check_finite(found, name) >= 0).all():
        raise ValueError(f"{name} must be finite and non-negative")
    return found


def weighted(source: Source, row_weights: Any) -> Source:
    """The rows that weigh anything, with their weights; the source itself where there are none.

    Raises:
        TypeError, ValueError: naming `row_weights`; all of them 0, or a sum that overflows, among it.
    """
    if row_weights is None:
        return source
    weights = check_weights(row_weights, len(source), "row_weights").cpu()
    if not 0 < float(weights.sum()) <= _MOST:
        raise ValueError(f"row_weights must have a sum in (0, {_MOST:g}], as they count rows, got {weights.sum():g}")
    index = (weights > 0).nonzero().squeeze(1)
    found = copy.copy(source) if len(index) == len(source) else picked(source, index)
    found.weights = weights[index]
    return found


def mean_weight(source: Source, rows: Tensor) -> float:
    """The mean weight of the rows with these numbers."""
    return 1.0 if source.weights is None or not len(rows) else float(source.weights[rows].mean())

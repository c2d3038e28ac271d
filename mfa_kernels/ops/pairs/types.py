"""Pairs of tokens and components."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pairs(NamedTuple):
    """The pairs (x[tokens[p]], components[p]).

    Attributes:
        x: (N, D), any float dtype.
        tokens: (P,) int64.
        components: (P,) int32; -1 stands for no pair.
    """

    x: Tensor
    tokens: Tensor
    components: Tensor

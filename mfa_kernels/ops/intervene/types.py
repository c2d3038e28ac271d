"""An intervention as the operator takes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Edit(NamedTuple):
    """The change to the tokens of each batch row. B' divides B, S is 1 or T; row i of B takes entry i // (B / B').

    Attributes:
        coefficients: scale, weight and spread, (B', S, 3), in the dtype that x is steered in: the wider of its own and
            the mixture's, float32 or float64.
        shift: (B', S, D), in that dtype.
        rules: (B', 3) int32. The kind of gate, a number of portable.py: ALWAYS, RESPONSIBILITY and NOT_RESPONSIBILITY
            (of the region, against the threshold), DENSITY and NOT_DENSITY (log p(x)), or NEVER. The region whose
            responsibility is read, -1 for none. Whether the norm is kept, 0 or 1.
        thresholds: of the gates, (B',), in the dtype of the mixture.
        keeps_norm: whether any row keeps its norm.
        latents: z, (B', S, R), in the dtype of the mixture; None for 0.
        spreads: whether spread may differ from 0.
    """

    coefficients: Tensor
    shift: Tensor
    rules: Tensor
    thresholds: Tensor
    keeps_norm: bool = False
    latents: Tensor | None = None
    spreads: bool = False


class Mixture(NamedTuple):
    """The tensors of a mixture that steering reads: its means and loadings, and the terms behind E[z | x, k]."""

    means: Tensor
    loadings: Tensor
    rows: Tensor
    cholesky: Tensor
    scale: Tensor

"""The one definition of a finite row, for everything that sums or averages over rows."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """True for the rows of x (n, D) that are finite, their squared norms too: (n,) bool.

    The others have no distance and no density: one of them would make every mean that it is in NaN. Fitting, K-means,
    starts from clusters, evaluation and harvesting leave them out and count them. What answers row by row, as
    `MFA.log_prob` and `MFA.encode` do, says NaN for each row that has no density.

    Args:
        x: any float dtype.
        dtype: of the work, whose range decides: float64, or float32 for any other. None: that of x.
    """
    wide = torch.float64 if (dtype or x.dtype) == torch.float64 else torch.float32
    # Squared again: of a single feature PyTorch takes the magnitude, without a square that could overflow.
    return torch.linalg.vector_norm(x.to(wide), dim=1).square().isfinite()

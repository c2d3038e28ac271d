"""How far steered tokens are from those of plain PyTorch: what `mfa_kernels.ops.common.first_use` asks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mfa_kernels.ops.common.first_use import worst

_ALLOWED = 2.0**-12  # of the largest value of a token, besides what its dtype rounds
_TOKENS = 4096  # that plain PyTorch steers again; of more, it is looked at whether they are finite


def of_steered(
    found: tuple[Tensor, Tensor], hidden: Tensor, plain: Callable[[], tuple[Tensor, Tensor]]
) -> float | None:
    """The largest error of steered tokens (B, T, D) over what is allowed."""
    steered = found[0]
    if hidden.shape[0] * hidden.shape[1] > _TOKENS:
        return math.inf if bool((hidden.isfinite().all(-1) & steered.isnan().any(-1)).any()) else None
    expected = plain()[0]
    finite = expected.isfinite().all(-1)
    steered, expected = steered[finite], expected[finite]
    if not len(expected):
        return None
    largest = expected.double().abs().amax(-1, keepdim=True) if expected.numel() else expected.double()
    allowed = (_ALLOWED + 2 * torch.finfo(expected.dtype).eps) * (largest + 1e-30)
    return worst(steered, expected, allowed.expand_as(expected))

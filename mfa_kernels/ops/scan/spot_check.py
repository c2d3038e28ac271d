"""How far a scan's results on a few tokens are from float64: what `mfa_kernels.ops.common.first_use` asks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.ops.common.first_use import spread, worst
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.types import Woodbury

ALLOWED = 256 * 2.0**-23
"""Of |v|^2, what rounding in float32 may cost a logit, and next to no mistake stays below."""

ALLOWED_FAST = 2.0**-7
"""The same where low precision was asked for."""

_COMPONENTS = 256  # at a time: all rows in float64 take eight times what a GPU keeps


def logits_in_float64(x: Tensor, woodbury: Woodbury, constants: Tensor) -> tuple[Tensor, Tensor]:
    """Every logit of tokens x (n, D), and what its error is measured by: |v|^2 and the constant; (n, K) both."""
    rank, logits, sizes = woodbury.cholesky.shape[-1], [], []
    for rows, own in zip(woodbury.rows.split(_COMPONENTS), constants.split(_COMPONENTS)):
        rows, own = rows.double(), own.double()
        scale = rows[:, -1] if woodbury.per_component else woodbury.scale.double()
        v = (x.double().unsqueeze(1) - rows[:, 0]) * scale
        square, t = v.square().sum(-1), torch.einsum("nkd,krd->nkr", v, rows[:, 1 : rank + 1])
        logits.append(own - (square - t.square().sum(-1)) / 2)
        sizes.append(square + own.abs() + 1)
    return torch.cat(logits, 1), torch.cat(sizes, 1)


def of_scan(
    active: ActivePairs, x: Tensor, woodbury: Woodbury, constants: Tensor, allowed: float = ALLOWED
) -> float | None:
    """The largest error of the active pairs of tokens x (N, D) over what is allowed; None of no finite token."""
    few = spread(len(x), x.device)
    logits, sizes = logits_in_float64(x[few], woodbury, constants)
    log_prob, components, found, _ = (part[few] for part in active)
    finite = x[few].isfinite().all(1) & logits.isfinite().all(1)
    if not finite.any():
        return None
    logits, sizes, log_prob, components, found = (part[finite] for part in (logits, sizes, log_prob, components, found))
    if not bool((components[:, 0] >= 0).all()) or int(components.max()) >= logits.shape[1]:
        return math.inf
    best, at = logits.max(1)
    size = sizes.gather(1, at.unsqueeze(1)).squeeze(1) * allowed
    held, index = components >= 0, components.clamp_min(0).long()
    expected = torch.where(held, logits.gather(1, index), 0)
    return max(
        worst(log_prob, logits.logsumexp(1), size),
        worst(torch.where(held, found, 0), expected, sizes.gather(1, index) * allowed),
        worst(expected[:, 0], best, size),
    )


def of_all_logits(found: Tensor, x: Tensor, woodbury: Woodbury, constants: Tensor) -> float | None:
    """The largest error of every logit (N, K) of tokens x (N, D) over what is allowed, on some of the tokens."""
    few = spread(len(x), x.device)
    logits, sizes = logits_in_float64(x[few], woodbury, constants)
    finite = x[few].isfinite().all(1)
    return worst(found[few][finite], logits[finite], sizes[finite] * ALLOWED) if finite.any() else None

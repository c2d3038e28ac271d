"""A model of the cost of a screened token: in units of its dense scan, and in bytes read."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.screen.types import Screen
from mfa_kernels.ops.woodbury.types import Woodbury

PAIR_COST = 8
"""Cost of a logit computed by itself, in units of one in the dense scan."""


LINE_PAIR_COST = 12
"""Cost of a marginal bound computed by itself, in units of one among those of all components; kLineShare in csrc."""


STAGE_COST = (40, 1.8)
"""Cost of stage 0, in tokens of the dense scan: for reading all loadings, and for each of p coordinates."""


INT8_COST = 0.4
"""Cost of a token by the dense scan that begins in int8 (scan/README.md), in units of the one in float32: 0.29 to 0.44
on a processor that issues as many int8 as float32 products (bench/RESULTS.md)."""


def dense_cost(woodbury: Woodbury, tokens: int) -> float:
    """Cost of the dense scan of a token among so many, in units of that in float32: what bounds have to be below."""
    begins_in_int8 = bool(woodbury.int8) and woodbury.int8[0].numel() > 0 and tokens >= cpp.library().int8_tokens
    return INT8_COST if begins_in_int8 else 1.0


def modelled_cost(
    evaluated: Tensor,
    components: int,
    features: int,
    rank: int,
    kept: int,
    tokens: int | None = None,
    lines: float | None = None,
) -> float:
    """Cost of a screened token in units of its dense scan in float32: projection, bounds, and pairs; screening pays
    below `dense_cost`.

    Args:
        evaluated: of some tokens like it, (N,), as `scan` returns it: those of the batch before will do.
        components: K.
        features: D.
        rank: R.
        kept: p.
        tokens: among which stage 0 is shared, where it is to be counted: those of one training step.
        lines: share of the components that their lines leave, where the screen has lines.
    """
    marginals = 1.0  # in units of the marginal bounds of all components
    if lines is not None:
        marginals = 1 / (rank + 3) + LINE_PAIR_COST * (lines + candidates(components) / components)
    pairs = torch.where(evaluated < 0, components, PAIR_COST * evaluated).double().mean().item()
    stage_0 = 0.0 if tokens is None else (STAGE_COST[0] + STAGE_COST[1] * kept) / tokens
    return kept / features * marginals + kept / (components * (rank + 3)) + pairs / components + stage_0


def bytes_read(evaluated: Tensor, woodbury: Woodbury, screen: Screen, lines: Tensor | None = None) -> Tensor:
    """Bytes of parameters that each token reads when it comes alone, (N,) int64.

    Args:
        evaluated: (N,), as `scan` returns it.
        woodbury: of the mixture; reading all of it is `woodbury.rows.nbytes` and a little.
        screen: of the mixture.
        lines: (N,), as `lines_left` returns it, where the screen has lines.
    """
    of_all = (screen.basis, screen.radii, screen.slack, screen.log_det, woodbury.scale, woodbury.center)
    constants = screen.log_det.nbytes  # log pi_k and the rest, (K,) too
    components = woodbury.rows.shape[0]
    computed = torch.where(evaluated < 0, components, evaluated).long()
    read = sum(t.nbytes for t in of_all) + constants + computed * woodbury.rows[0].nbytes
    if lines is None:
        return read + screen.rows.nbytes
    marginals = (lines * components).round().long() + candidates(components)
    return read + screen.lines.nbytes + screen.line_terms.nbytes + marginals * screen.rows[0].nbytes


def candidates(components: int) -> int:
    """Components per token whose marginal bounds choose the first logit, as in csrc/cpu/screen/bounds.h."""
    return min(max(8, components // 128), 32)

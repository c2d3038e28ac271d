"""A model of the cost of a screened token: in units of its dense scan, and in bytes read."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.screen.types import Screen
from mfa_kernels.ops.woodbury.types import Woodbury

PAIR_COST = 6
"""Cost of a logit computed by itself, in units of one in the dense scan (`python -m bench.bench_screen --only why`)."""

GPU_PAIR_COST = 8
"""The same on a GPU."""

DENSE_SHARE = 4
"""A token that keeps more than K over this takes the dense scan; kDenseShare in csrc."""

STAGE_COST = (6000, 20)
"""Cost of stage 0, in tokens of the dense scan: for reading all loadings, and for each of p coordinates; 7,000 to
13,000 at p = 256 (`python -m bench.bench_screen --curve`)."""


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
    *,
    on_cpu: bool = True,
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
        on_cpu: whether bounds are those of the C++ kernels, in int8, or those of Triton.
    """
    dense = features * (rank + 3)
    bounds = (features + rank * kept) / (dense * cpp.library().int8_rate) if on_cpu else kept / features
    pairs = torch.where(evaluated < 0, components, (PAIR_COST if on_cpu else GPU_PAIR_COST) * evaluated)
    stage_0 = 0.0 if tokens is None else (STAGE_COST[0] + STAGE_COST[1] * kept) / tokens
    return bounds + kept / (components * (rank + 3)) + pairs.double().mean().item() / components + stage_0


def bytes_read(evaluated: Tensor, woodbury: Woodbury, screen: Screen) -> Tensor:
    """Bytes of parameters that each token reads when it comes alone, (N,) int64.

    Args:
        evaluated: (N,), as `scan` returns it.
        woodbury: of the mixture; reading all of it is `woodbury.rows.nbytes` and a little.
        screen: of the mixture.
    """
    components = woodbury.rows.shape[0]
    constants = components * woodbury.rows.element_size()  # log pi_k and the rest, (K,)
    of_all = (screen.basis, screen.rows, screen.starts, screen.terms, woodbury.scale, screen.center)
    computed = torch.where(evaluated < 0, components, evaluated).long()
    return sum(t.nbytes for t in of_all) + constants + computed * woodbury.rows[0].nbytes

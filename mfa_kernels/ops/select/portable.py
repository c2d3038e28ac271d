"""Stage 1 in plain PyTorch, for devices and machines without kernels: chunked, and exact by recompute.

A GEMM against the rows gives every logit of a chunk up to the cancellation in |x~|^2 - 2 x~.mu~ + |mu~|^2, bounded
by `delta`; whatever could be active within that bound is recomputed from the differences. Memory stays within
`CHUNK` values whatever N and K are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.factors.op import Factors

CHUNK = 1 << 23
"""Largest number of values of any temporary."""


def residuals(x: Tensor, components: Tensor, factors: Factors) -> Tensor:
    """v = lam (x - mu_k) for pairs: x (P, D), components (P,) -> (P, D)."""
    own = factors.rows[components]
    v = (x - factors.center) * factors.scale - own[:, 0]
    return v * own[:, -1] if factors.per_component else v


def explained(v: Tensor, components: Tensor, factors: Factors) -> Tensor:
    """t = A_k v for pairs: (P, D), (P,) -> (P, R)."""
    rank = factors.cholesky.shape[-1]
    return torch.einsum("prd,pd->pr", factors.rows[components, 1 : rank + 1], v)


def pair_logits(x: Tensor, components: Tensor, factors: Factors, constants: Tensor) -> Tensor:
    """Logits of the pairs (x[p], components[p]), from the differences: (P,)."""
    rows = factors.rows.shape[1] * factors.rows.shape[2]
    out = []
    for xs, ks in zip(x.split(max(1, CHUNK // rows)), components.split(max(1, CHUNK // rows)), strict=True):
        v = residuals(xs, ks, factors)
        t = explained(v, ks, factors)
        out.append(constants[ks] - 0.5 * (v.square().sum(-1) - t.square().sum(-1)))
    return torch.cat(out) if out else constants.new_empty(0)


def dense(x: Tensor, factors: Factors, constants: Tensor) -> Tensor:
    """Every logit, from the differences: (N, D) -> (N, K)."""
    components, features = factors.rows.shape[0], x.shape[1]
    rank = factors.cholesky.shape[-1]
    out = x.new_empty(x.shape[0], components)
    step = max(1, CHUNK // (components * (features + rank)))
    for start in range(0, x.shape[0], step):
        y = (x[start : start + step] - factors.center) * factors.scale
        v = y.unsqueeze(1) - factors.rows[:, 0]
        if factors.per_component:
            v = v * factors.rows[:, -1]
        t = torch.einsum("nkd,krd->nkr", v, factors.rows[:, 1 : rank + 1])
        out[start : start + step] = constants - 0.5 * (v.square().sum(-1) - t.square().sum(-1))
    return out


def _scan(y: Tensor, factors: Factors, constants: Tensor) -> Tensor:
    """Logits up to cancellation, by GEMM: whitened tokens (N, D) -> (N, K). Shared noise only."""
    rows = factors.rows
    products = torch.einsum("nd,krd->nkr", y, rows)
    mean_products = torch.einsum("kd,krd->kr", rows[:, 0], rows)
    distance = y.square().sum(-1, keepdim=True) - 2 * products[..., 0] + mean_products[:, 0]
    return constants - 0.5 * (distance - (products[..., 1:] - mean_products[:, 1:]).square().sum(-1))


def select(
    x: Tensor, factors: Factors, constants: Tensor, threshold: float, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mfa_kernels.ops.select.op`: log_prob (N,), components (N, S), logits (N, S), counts (N,)."""
    step = max(1, CHUNK // factors.rows[..., 0].numel())
    parts = [_select_chunk(chunk, factors, constants, threshold, slots) for chunk in x.split(step)]
    if not parts:
        parts = [_select_chunk(x, factors, constants, threshold, slots)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def _select_chunk(
    x: Tensor, factors: Factors, constants: Tensor, threshold: float, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if factors.per_component:
        logits = dense(x, factors, constants)
    else:
        y = (x - factors.center) * factors.scale
        logits = _scan(y, factors, constants)
        reach = y.norm(dim=-1, keepdim=True) + factors.rows[:, 0].norm(dim=-1).amax()
        rank = factors.cholesky.shape[-1]
        delta = torch.finfo(x.dtype).eps * (x.shape[1] ** 0.5) * (1 + rank**0.5) * reach.square()
        uncertain = ~(logits < logits.amax(-1, keepdim=True) - threshold - 2 * delta)
        tokens, components = uncertain.nonzero(as_tuple=True)
        logits = logits.masked_fill(~uncertain, -torch.inf)
        logits[tokens, components] = pair_logits(x[tokens], components, factors, constants)
    log_prob = torch.logsumexp(logits, dim=-1)
    log_prob = log_prob.masked_fill(log_prob == -torch.inf, torch.nan)
    best = logits.amax(-1, keepdim=True)
    active = logits > best - threshold
    found = active.sum(-1)
    kept, components = logits.masked_fill(~active, -torch.inf).topk(min(slots, logits.shape[-1]), dim=-1)
    short = slots - kept.shape[-1]
    kept = torch.nn.functional.pad(kept, (0, short), value=-torch.inf)
    components = torch.nn.functional.pad(components, (0, short)).masked_fill(kept == -torch.inf, -1)
    return log_prob, components.int(), kept, found.clamp_max(slots + 1).int()

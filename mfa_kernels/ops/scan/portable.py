"""Stage 1 in plain PyTorch, for devices and machines without kernels: chunked, and exact by recompute.

A GEMM against the rows gives every logit of a chunk up to the cancellation in |x~|^2 - 2 x~.mu~ + |mu~|^2, bounded
by `delta`; whatever could be active within that bound is recomputed from the differences. Memory stays within
a few times `CHUNK` values whatever N and K are, as long as K (R + 1) is below `CHUNK`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.woodbury.portable import CHUNK, explained, residuals
from mfa_kernels.ops.woodbury.types import Woodbury


def _distances(v: Tensor, t: Tensor) -> Tensor:
    """|v|^2 - |t|^2, of v (..., D) and t (..., R): infinite, not NaN, where finite differences have squares that are
    not. Such a component is far away."""
    square = v.square().sum(-1)
    overflows = square.isinf() & t.isfinite().all(-1)
    return torch.where(overflows, square, square - t.square().sum(-1))


def pair_logits(x: Tensor, tokens: Tensor, components: Tensor, woodbury: Woodbury, constants: Tensor) -> Tensor:
    """Logits of the pairs (x[tokens[p]], components[p]), from the differences: (P,)."""
    step = max(1, CHUNK // woodbury.rows[0].numel())
    out = []
    for n, k in zip(tokens.split(step), components.split(step)):
        v = residuals(x[n], k, woodbury)
        t = explained(v, k, woodbury)
        out.append(constants[k] - 0.5 * _distances(v, t))
    return torch.cat(out) if out else constants.new_empty(0)


def dense(x: Tensor, woodbury: Woodbury, constants: Tensor) -> Tensor:
    """Every logit, from the differences: (N, D) -> (N, K)."""
    count, features = woodbury.rows.shape[0], x.shape[1]
    rank = woodbury.cholesky.shape[-1]
    out = x.new_empty(x.shape[0], count)
    components = max(1, min(count, CHUNK // (features + rank)))
    step = max(1, CHUNK // (components * (features + rank)))
    for n in range(0, x.shape[0], step):
        for k in range(0, count, components):
            rows = woodbury.rows[k : k + components]
            v = (x[n : n + step].unsqueeze(1) - rows[:, 0]) * (
                rows[:, -1] if woodbury.per_component else woodbury.scale
            )
            t = torch.einsum("nkd,krd->nkr", v, rows[:, 1 : rank + 1])
            distance = _distances(v, t)
            out[n : n + step, k : k + components] = constants[k : k + components] - 0.5 * distance
    return out


def _scan(y: Tensor, m: Tensor, woodbury: Woodbury, constants: Tensor) -> Tensor:
    """Logits up to cancellation, by GEMM: whitened tokens (N, D) and means (K, D) -> (N, K). Shared noise only."""
    a = woodbury.rows[:, 1:]
    distance = y.square().sum(-1, keepdim=True) - 2 * y @ m.mT + m.square().sum(-1)
    t = torch.einsum("nd,krd->nkr", y, a) - torch.einsum("kd,krd->kr", m, a)
    return constants - 0.5 * (distance - t.square().sum(-1))


def scan(
    x: Tensor, woodbury: Woodbury, constants: Tensor, threshold: float, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mfa_kernels.ops.scan.op`: log_prob (N,), components (N, S), logits (N, S), counts (N,)."""
    step = max(1, CHUNK // woodbury.rows[..., 0].numel())
    parts = [_scan_chunk(chunk, woodbury, constants, threshold, slots) for chunk in x.split(step)]
    if not parts:
        parts = [_scan_chunk(x, woodbury, constants, threshold, slots)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def _scan_chunk(
    x: Tensor, woodbury: Woodbury, constants: Tensor, threshold: float, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if woodbury.per_component:
        logits = dense(x, woodbury, constants)
    else:
        y = (x - woodbury.center) * woodbury.scale
        m = (woodbury.rows[:, 0] - woodbury.center) * woodbury.scale
        logits = _scan(y, m, woodbury, constants)
        reach = y.norm(dim=-1, keepdim=True) + m.norm(dim=-1).amax()
        rank = woodbury.cholesky.shape[-1]
        delta = torch.finfo(x.dtype).eps * (x.shape[1] ** 0.5) * (1 + rank**0.5) * reach.square()
        uncertain = ~(logits < logits.amax(-1, keepdim=True) - threshold - 2 * delta)
        tokens, components = uncertain.nonzero(as_tuple=True)
        logits = logits.masked_fill(~uncertain, -torch.inf)
        logits[tokens, components] = pair_logits(x, tokens, components, woodbury, constants)
    return _active_pairs(logits, None, threshold, slots)


def scan_candidates(
    x: Tensor, candidates: Tensor, woodbury: Woodbury, constants: Tensor, threshold: float, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `mfa_kernels.ops.scan.candidates`: the active pairs, and the logits of all candidates (N, C)."""
    is_first = candidates >= 0
    for column in range(1, candidates.shape[1]):
        is_first[:, column] &= (candidates[:, :column] != candidates[:, column : column + 1]).all(-1)
    tokens, columns = is_first.nonzero(as_tuple=True)
    logits = torch.full(candidates.shape, -torch.inf, dtype=x.dtype, device=x.device)
    logits[tokens, columns] = pair_logits(x, tokens, candidates[tokens, columns].long(), woodbury, constants)
    return *_active_pairs(logits, candidates, threshold, slots), logits


def _active_pairs(
    logits: Tensor, components: Tensor | None, threshold: float, slots: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_prob, components, logits and counts, from the logits (N, C) of these components (N, C); None: of all."""
    log_prob = torch.logsumexp(logits, dim=-1)
    log_prob = log_prob.masked_fill(log_prob == -torch.inf, torch.nan)
    best = logits.amax(-1, keepdim=True)
    active = (logits >= best - threshold) & (logits > -torch.inf)
    found = active.sum(-1)
    kept, columns = logits.masked_fill(~active, -torch.inf).topk(min(slots, logits.shape[-1]), dim=-1)
    of_slots = columns if components is None else components.gather(-1, columns)
    short = slots - kept.shape[-1]
    kept = torch.nn.functional.pad(kept, (0, short), value=-torch.inf)
    of_slots = torch.nn.functional.pad(of_slots, (0, short)).masked_fill(kept == -torch.inf, -1)
    return log_prob, of_slots.int(), kept, found.clamp_max(slots + 1).int()

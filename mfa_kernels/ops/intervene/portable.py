"""Steering in plain PyTorch, from operators that have gradients: the path that autograd takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mfa_kernels.ops.intervene.types import Edit
from mfa_kernels.ops.pairs import op as pairs
from mfa_kernels.ops.scan.types import ActivePairs

ALWAYS, RESPONSIBILITY, NOT_RESPONSIBILITY, DENSITY, NOT_DENSITY, NEVER = range(6)


def per_row(value: Tensor, batch: int) -> Tensor:
    """Repeats the entries for a whole batch: row i takes entry i // (batch / entries)."""
    return value if value.shape[0] in (1, batch) else value.repeat_interleave(batch // value.shape[0], 0)


def intervene(
    hidden: Tensor,
    edit: Edit,
    chosen: Tensor | None = None,
    passed: Tensor | None = None,
    active: ActivePairs | None = None,
    parameters: tuple[Tensor, Tensor] | None = None,
    explain: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `mfa_kernels.ops.intervene.op.intervene`, with E[z | x, k] as a function of tokens, their numbers and k."""
    batch, tokens, features = hidden.shape
    coefficients, shift = per_row(edit.coefficients, batch), per_row(edit.shift, batch)
    scale, weight, spread = (c.unsqueeze(-1) for c in coefficients.unbind(-1))
    x = hidden.to(shift.dtype)
    out = torch.addcmul(shift, scale, x)
    r = None if active is None else active.responsibilities()
    if parameters is not None and explain is not None and active is not None and r is not None:
        means, loadings = parameters
        components, slots = active.components, active.components.shape[1]

        def decoded(z: Tensor) -> Tensor:
            return pairs.decode(components, r, z.contiguous(), means, loadings).view(batch, tokens, features)

        z = means.new_zeros(batch, tokens, slots, loadings.shape[2])
        center = decoded(z.flatten(0, 1))
        out = out + weight * center
        if edit.spreads:
            at = torch.arange(components.numel(), device=hidden.device) // slots
            flat = hidden.reshape(-1, features)
            own = explain(flat, at, components.flatten()).view_as(z)
            z = z + spread.to(z.dtype).unsqueeze(-1) * own
        if edit.latents is not None:
            z = z + per_row(edit.latents, batch).to(z.dtype).unsqueeze(2)
        if edit.spreads or edit.latents is not None:
            out = out + (decoded(z.flatten(0, 1)) - center)
    kind, region, keep = (c.unsqueeze(1) for c in per_row(edit.rules, batch).unbind(-1))
    if edit.keeps_norm:
        before, after = x.norm(dim=-1, keepdim=True), out.norm(dim=-1, keepdim=True)
        out = out * torch.where((after > 0) & (keep != 0).unsqueeze(-1), before / after, 1)
    here = torch.ones(batch, tokens, dtype=torch.bool, device=hidden.device) if chosen is None else chosen
    here = here.expand(batch, tokens)
    reached = here & (kind != NEVER)
    seen, looked = torch.zeros_like(here, dtype=edit.thresholds.dtype), torch.zeros_like(here)
    if active is not None and r is not None:
        threshold = per_row(edit.thresholds, batch).unsqueeze(1)
        log_prob = active.log_prob.view(batch, tokens)
        shape = (batch, tokens, active.components.shape[1])
        seen = (r.view(shape) * (active.components.view(shape) == region.unsqueeze(-1))).sum(-1)
        value = torch.where(kind <= NOT_RESPONSIBILITY, seen, log_prob)
        is_over = (value > threshold) == ((kind == RESPONSIBILITY) | (kind == DENSITY))
        reached = reached & ((kind == ALWAYS) | (is_over & ~log_prob.isnan()))
        looked = here & (region >= 0) & ~seen.isnan()
    if passed is not None:
        reached = reached & passed
    tally = torch.stack([reached.to(seen.dtype), torch.where(looked, seen, 0), looked.to(seen.dtype)], -1)
    return torch.where(reached.unsqueeze(-1), out.to(hidden.dtype), hidden), tally

"""A list of interventions folded into one map.

Every intervention is affine in x once the responsibilities are fixed, and these are taken at the activation as it
was before the first one. So any list of them, in order, is

    x -> scale x + shift + sum_k r_k(x) (weight mu_k + W_k z)

with numbers `scale`, `weight` and vectors `shift` (D,), `z` (R,) per batch row, folded once when the list is given
(once per step under a schedule). What remains per token is one multiply-add, or one more decode of the active pairs
where an intervention has component=None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mfa_kernels.mfa import MFA
from mfa_kernels.steering.interventions import Offset, Row, Toward, finite


class Affine(NamedTuple):
    """The folded map; B is 1 where all batch rows share it, S is 1 where all positions do.

    Attributes:
        scale: a float, or (B, S, 1).
        shift: (B, S, D).
        weight: of sum_k r_k mu_k; a float, or (B, S, 1).
        latents: z of sum_k r_k W_k z, (B, S, R); None where nothing asks for it.
    """

    scale: float | Tensor
    shift: Tensor
    weight: float | Tensor
    latents: Tensor | None


class _Level(NamedTuple):
    """The i-th intervention of every batch row, as x <- (1 - alpha) x + alpha target + offset.

    An `Offset` has alpha = 0 and a `Toward` no offset; a row with fewer interventions has neither.

    Attributes:
        alphas: per row, a float or a function of the step.
        target: mu_k, (rows, 1, D); 0 for the mixture.
        offset: W_k z, (rows, 1, D); 0 for the mixture.
        towards_mixture: whether the target is sum_k r_k mu_k, per row 1 or 0.
        latents: z of an offset by the mixture, (rows, 1, R), or None.
    """

    alphas: list[float | Callable[[int], float]]
    target: Tensor
    offset: Tensor
    towards_mixture: list[float]
    latents: Tensor | None


class Composition:
    """Interventions per batch row, ready to be folded for the step that a token belongs to.

    Args:
        mfa: the mixture.
        rows: as from `as_rows`.
        device: of what is folded.

    Attributes:
        rows: how many batch rows are distinguished.
        dtype: of the folded maps.
        uses_mixture: whether any intervention has component=None, and so needs responsibilities.
        is_scheduled: whether any alpha is a function of the step.
        acts: (rows,) bool, False for rows that are left alone; None where there are none.
    """

    def __init__(self, mfa: MFA, rows: list[Row], device: torch.device) -> None:
        depth = max(len(row) for row in rows)
        self.rows, self.device = len(rows), device
        self._levels = [_level(mfa, [row[i] if i < len(row) else None for row in rows], device) for i in range(depth)]
        self.uses_mixture = any(entry.component is None for row in rows for entry in row)
        self.is_scheduled = any(callable(alpha) for level in self._levels for alpha in level.alphas)
        self.acts = None if all(rows) else torch.tensor([bool(row) for row in rows], device=device)
        self.dtype = torch.promote_types(mfa.means.dtype, torch.float32)
        self._features = mfa.n_features

    def fold(self, steps: tuple[int, ...] = (0,)) -> Affine:
        """The map at these steps, in the compute dtype of the mixture; S = len(steps), B = the number of rows."""
        scale: float | Tensor = 1.0
        weight: float | Tensor = 0.0
        shift = torch.zeros(1, 1, self._features, dtype=self.dtype, device=self.device)
        latents: Tensor | None = None
        for level in self._levels:
            alpha = self._number([[_at(a, step) for step in steps] for a in level.alphas])
            keep = 1 - alpha
            scale = keep * scale
            shift = keep * shift + alpha * level.target + level.offset
            if self.uses_mixture:
                weight = keep * weight + alpha * self._number([[flag] for flag in level.towards_mixture])
                latents = None if latents is None else keep * latents
                if level.latents is not None:
                    latents = level.latents if latents is None else latents + level.latents
        return Affine(scale, shift, weight, latents)

    def _number(self, values: list[list[float]]) -> float | Tensor:
        """(B, S) numbers as one float where there is one, which keeps it on the host; else as (B, S, 1)."""
        if len(values) == len(values[0]) == 1:
            return values[0][0]
        return torch.tensor(values, dtype=self.dtype, device=self.device).unsqueeze(-1)


def _at(alpha: float | Callable[[int], float], step: int) -> float:
    return finite(alpha(step), f"alpha({step})") if callable(alpha) else alpha


def _level(mfa: MFA, entries: list[Toward | Offset | None], device: torch.device) -> _Level:
    dtype = torch.promote_types(mfa.means.dtype, torch.float32)
    targets, offsets, latents = [], [], []
    for entry in entries:
        k = None if entry is None else entry.component
        target, offset = mfa.means.new_zeros(2, mfa.n_features, dtype=dtype)
        free = mfa.means.new_zeros(mfa.rank, dtype=dtype)
        if isinstance(entry, Offset):
            free = torch.as_tensor(entry.latents).to(mfa.means.device, dtype)
            if k is not None:
                offset, free = mfa.loadings[k].to(dtype) @ free, torch.zeros_like(free)
        elif k is not None:
            target = mfa.means[k].to(dtype)
        targets.append(target)
        offsets.append(offset)
        latents.append(free)
    target, offset, free = (torch.stack(vectors).unsqueeze(1) for vectors in (targets, offsets, latents))
    return _Level(
        alphas=[entry.alpha if isinstance(entry, Toward) else 0.0 for entry in entries],  # type: ignore[misc]
        target=target.to(device, dtype),
        offset=offset.to(device, dtype),
        towards_mixture=[float(isinstance(entry, Toward) and entry.component is None) for entry in entries],
        latents=free.to(device, dtype) if any(isinstance(e, Offset) and e.component is None for e in entries) else None,
    )

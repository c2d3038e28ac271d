"""A list of interventions folded into one map.

Every intervention is affine in x once what the mixture says about x is fixed, and that is taken at the activation as it
was before the first one. So any list of them, in order, is

    x -> scale x + shift + sum_k r_k(x) (weight mu_k + W_k (z + spread E[z | x, k])) + local terms

with numbers `scale`, `weight`, `spread` and vectors `shift` (D,), `z` (R,) per batch row, folded once when the list is
given (once per step under a schedule), and one `RegionTerm` term for each `Remove` of a single region. What remains per
token is one multiply-add, or one more decode of the active pairs where an intervention asks for responsibilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_number
from mfa_kernels.common.precision import no_autocast
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.steering.interventions import Add, Intervention, Offset, Reconstruct, Remove, Row, Toward


class RegionTerm(NamedTuple):
    """coefficient g(x) (apart + W_k G_k (x - mu_k)), with G_k (x - mu_k) = E[z | x, k]; B is 1 or the number of rows.

    Attributes:
        coefficient: a float, or (B, S, 1); 0 for rows that it does not concern.
        component: k where g is the responsibility r_k(x), (B, 1, 1) int32; None where g is 1.
        mean: mu_k, (B, 1, D).
        gain: G_k = M_k^-1 W_k^T Psi^-1, (B, R, D).
        loadings: W_k^T, (B, R, D).
        apart: (B, 1, D), what is added to W_k E[z | x, k]; None for nothing.
    """

    coefficient: float | Tensor
    component: Tensor | None
    mean: Tensor
    gain: Tensor
    loadings: Tensor
    apart: Tensor | None


class Affine(NamedTuple):
    """The folded map; B is 1 where all batch rows share it, S is 1 where all positions do.

    Attributes:
        scale: a float, or (B, S, 1).
        shift: (B, S, D).
        weight: of sum_k r_k mu_k; a float, or (B, S, 1).
        spread: of sum_k r_k W_k E[z | x, k]; a float, or (B, S, 1).
        latents: z of sum_k r_k W_k z, (B, S, R); None where nothing asks for it.
        local: one term per `Remove` of a single region.
    """

    scale: float | Tensor
    shift: Tensor
    weight: float | Tensor
    spread: float | Tensor
    latents: Tensor | None
    local: tuple[RegionTerm, ...]

    def each(self, change: Callable[[Any], Any]) -> Affine:
        """With every tensor or number changed."""
        changed: Any = (*map(change, self[:-1]), tuple(RegionTerm(*map(change, term)) for term in self.local))
        return Affine(*changed)


class _Level(NamedTuple):
    """The i-th intervention of every batch row; a row with fewer leaves its activation alone.

        x <- (1 - alpha pull) x + alpha (target + on_means sum_k r_k mu_k + on_latents sum_k r_k W_k E[z | x, k])
             + offset + sum_k r_k W_k latents - alpha local

    Attributes:
        alphas: per row, a float or a function of the step.
        pull, on_means, on_latents: a number per row.
        target, offset: (rows, 1, D).
        latents: (rows, 1, R), or None.
        local: terms, each with a flag per row for a coefficient.
    """

    alphas: list[float | Callable[[int], float]]
    pull: list[float]
    on_means: list[float]
    on_latents: list[float]
    target: Tensor
    offset: Tensor
    latents: Tensor | None
    local: list[tuple[list[float], RegionTerm]]


class Composition:
    """Interventions per batch row, ready to be folded for the step that a token belongs to.

    Args:
        mfa: the mixture.
        rows: as from `as_rows`.
        device: of what is folded.

    Attributes:
        rows: how many batch rows are distinguished.
        dtype: of the folded maps.
        uses_mixture: whether any intervention needs responsibilities.
        mixes: whether any adds something for every active component.
        uses_latents: whether any needs the latents of all active components.
        is_plain: whether the map is one multiply-add.
        is_scheduled: whether any alpha is a function of the step.
        acts: (rows,) bool, False for rows that are left alone; None where there are none.
    """

    def __init__(self, mfa: MFA, rows: list[Row], device: torch.device) -> None:
        depth = max(len(row) for row in rows)
        self.rows, self.device = len(rows), device
        with no_autocast(mfa.means):
            levels = [[row[i] if i < len(row) else None for row in rows] for i in range(depth)]
            self._levels = [_level(mfa, level, device) for level in levels]
        entries = [entry for row in rows for entry in row]
        self.uses_mixture = any(_uses_mixture(entry) for entry in entries)
        self.uses_latents = any(any(level.on_latents) for level in self._levels)
        self.mixes = self.uses_latents or any(
            any(level.on_means) or level.latents is not None for level in self._levels
        )
        self.is_plain = not self.uses_mixture and not any(level.local for level in self._levels)
        self.is_scheduled = any(callable(alpha) for level in self._levels for alpha in level.alphas)
        self.acts = None if all(rows) else torch.tensor([bool(row) for row in rows], device=device)
        self.dtype = torch.promote_types(mfa.means.dtype, torch.float32)
        self._features = mfa.n_features

    def fold(self, steps: tuple[int, ...] = (0,)) -> Affine:
        """The map at these steps, in the compute dtype of the mixture; S = len(steps), B = the number of rows."""
        scale: float | Tensor = 1.0
        weight: float | Tensor = 0.0
        spread: float | Tensor = 0.0
        shift = torch.zeros(1, 1, self._features, dtype=self.dtype, device=self.device)
        latents: Tensor | None = None
        local: list[RegionTerm] = []
        for level in self._levels:
            alphas = [[_at(alpha, step) for step in steps] for alpha in level.alphas]

            def times(flags: list[float], alphas: list[list[float]] = alphas) -> float | Tensor:
                return self._number([[flag * alpha for alpha in row] for flag, row in zip(flags, alphas)])

            keep = 1 - times(level.pull)
            scale = keep * scale
            shift = keep * shift + self._number(alphas) * level.target + level.offset
            weight = keep * weight + times(level.on_means)
            spread = keep * spread + times(level.on_latents)
            latents = None if latents is None else keep * latents
            if level.latents is not None:
                latents = level.latents if latents is None else latents + level.latents
            local = [term._replace(coefficient=keep * term.coefficient) for term in local]
            local += [term._replace(coefficient=-times(flags)) for flags, term in level.local]
        return Affine(scale, shift, weight, spread, latents, tuple(local))

    def _number(self, values: list[list[float]]) -> float | Tensor:
        """(B, S) numbers as one float where there is one, which keeps it on the host; else as (B, S, 1)."""
        if len(values) == len(values[0]) == 1:
            return values[0][0]
        return moved(values, self.dtype, self.device).unsqueeze(-1)


def moved(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, which waits for nothing: on a GPU they come from pinned memory."""
    numbers = torch.tensor(values, dtype=dtype, device="cpu")
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


def _uses_mixture(entry: Intervention) -> bool:
    if isinstance(entry, Reconstruct):
        return True
    return not isinstance(entry, Add) and (
        entry.component is None or (isinstance(entry, Remove) and entry.part == "region")
    )


def _at(alpha: float | Callable[[int], float], step: int) -> float:
    return check_number(alpha(step), f"alpha({step})") if callable(alpha) else alpha


def _level(mfa: MFA, entries: list[Intervention | None], device: torch.device) -> _Level:
    dtype = torch.promote_types(mfa.means.dtype, torch.float32)
    count = len(entries)
    pull, on_means, on_latents = [0.0] * count, [0.0] * count, [0.0] * count
    nowhere = mfa.means.new_zeros(mfa.n_features, dtype=dtype)
    targets, offsets = [nowhere] * count, [nowhere] * count
    latents = [mfa.means.new_zeros(mfa.rank, dtype=dtype)] * count
    alone: dict[str, list[int | None]] = {"latents": [None] * count, "region": [None] * count}
    for i, entry in enumerate(entries):
        if isinstance(entry, Toward):
            pull[i], on_means[i] = 1.0, float(entry.component is None)
            if entry.component is not None:
                targets[i] = mfa.means[entry.component].to(dtype)
        elif isinstance(entry, Offset):
            z = torch.as_tensor(entry.latents).to(mfa.means.device, dtype)
            if entry.component is None:
                latents[i] = z
            else:
                offsets[i] = mfa.loadings[entry.component].to(dtype) @ z
        elif isinstance(entry, Add):
            targets[i] = torch.as_tensor(entry.direction).to(mfa.means.device, dtype)
        elif isinstance(entry, Reconstruct):
            pull[i] = on_means[i] = on_latents[i] = 1.0
        elif isinstance(entry, Remove):
            if entry.component is not None:
                alone[entry.part][i] = int(entry.component)  # type: ignore[arg-type]
                continue
            on_latents[i] = -1.0
            if entry.part == "region":
                on_means[i], targets[i] = -1.0, _mean(mfa)
    used = any(isinstance(entry, Offset) and entry.component is None for entry in entries)
    return _Level(
        alphas=[0.0 if entry is None or isinstance(entry, Offset) else entry.alpha for entry in entries],  # type: ignore[misc]
        pull=pull,
        on_means=on_means,
        on_latents=on_latents,
        target=torch.stack(targets).unsqueeze(1).to(device, dtype),
        offset=torch.stack(offsets).unsqueeze(1).to(device, dtype),
        latents=torch.stack(latents).unsqueeze(1).to(device, dtype) if used else None,
        local=[
            ([float(k is not None) for k in components], _local(mfa, components, part, device))
            for part, components in alone.items()
            if any(k is not None for k in components)
        ],
    )


def _mean(mfa: MFA) -> Tensor:
    """m = sum_k pi_k mu_k, (D,)."""
    means, _, _, log_weights = mfa.parameters_in_compute_dtype()
    return log_weights.exp() @ means


def _local(mfa: MFA, components: list[int | None], part: str, device: torch.device) -> RegionTerm:
    """The term of a single region per row, its coefficient still to come; rows without one get any region's."""
    index = torch.tensor([0 if k is None else k for k in components], device=mfa.means.device)
    means, loadings, noise_variance, _ = mfa.parameters_in_compute_dtype()
    dtype, mean, write = means.dtype, means[index].unsqueeze(1), loadings[index].mT
    precision = 1 / (noise_variance if noise_variance.dim() == 1 else noise_variance[index]).double()
    weighed = write.double() * (precision if precision.dim() == 1 else precision.unsqueeze(1))
    eye = torch.eye(mfa.rank, dtype=torch.float64, device=mean.device)
    gain = torch.linalg.solve(eye + weighed @ write.double().mT, weighed).to(dtype)
    is_region = part == "region"
    term = RegionTerm(
        coefficient=0.0,
        component=index.int().reshape(-1, 1, 1) if is_region else None,
        mean=mean,
        gain=gain,
        loadings=write,
        apart=mean - _mean(mfa) if is_region else None,
    )
    moved: list[Any] = [value.to(device) if isinstance(value, Tensor) else value for value in term]
    return RegionTerm(*moved)

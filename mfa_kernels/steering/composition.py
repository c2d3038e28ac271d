"""Lists of interventions, folded into one affine map per batch row.

Every intervention is affine in x once responsibilities and latents are fixed, and these are taken at the activation as
it was before the first intervention. So any list of them, in order, is

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
    """The term coefficient g(x) (apart + W_k G_k (x - mu_k)), with G_k (x - mu_k) = E[z | x, k]; B is 1 or the rows.

    Attributes:
        coefficient: a float, or (B, S, 1); 0 for rows without the term.
        component: k where g is the responsibility r_k(x), (B, 1, 1) int32; None where g is 1.
        mean: mu_k, (B, 1, D).
        gain: G_k = M_k^-1 W_k^T Psi^-1, (B, R, D).
        loadings: W_k^T, (B, R, D).
        apart: (B, 1, D), added to W_k E[z | x, k]; None for nothing.
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
        weight: the factor of sum_k r_k mu_k; a float, or (B, S, 1).
        spread: the factor of sum_k r_k W_k E[z | x, k]; a float, or (B, S, 1).
        latents: the z of sum_k r_k W_k z, (B, S, R); None where there is no such term.
        local: one term per `Remove` of a single region.
    """

    scale: float | Tensor
    shift: Tensor
    weight: float | Tensor
    spread: float | Tensor
    latents: Tensor | None
    local: tuple[RegionTerm, ...]

    def each(self, change: Callable[[Any], Any]) -> Affine:
        """Returns the map with `change` applied to every tensor and number."""
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
        local: terms, each with a flag (1 or 0) per row.
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
    """Interventions per batch row, ready to be folded for the generation step of a token.

    Args:
        mfa: the mixture.
        rows: as from `as_rows`.
        device: where the folded maps are.

    Attributes:
        rows: the number of batch rows that are distinguished.
        dtype: the dtype of the folded maps.
        uses_mixture: True where an intervention needs responsibilities.
        mixes: True where an intervention adds something for every active component.
        uses_latents: True where an intervention needs the latents of all active components.
        is_plain: True where the map is one multiply-add.
        is_scheduled: True where an alpha is a function of the step.
        acts: (rows,) bool, False for rows that are left alone; None where there are none.
    """

    def __init__(self, mfa: MFA, rows: list[Row], device: torch.device) -> None:
        depth = max(len(row) for row in rows)
        self.rows, self.device = len(rows), device
        with no_autocast(mfa.means):
            levels = [[row[i] if i < len(row) else None for row in rows] for i in range(depth)]
            self._levels = [_level(mfa, level, device) for level in levels]
        terms = [term for level in self._levels for _, term in level.local]
        self.uses_latents = any(any(level.on_latents) for level in self._levels)
        self.mixes = self.uses_latents or any(
            any(level.on_means) or level.latents is not None for level in self._levels
        )
        self.uses_mixture = self.mixes or any(term.component is not None for term in terms)
        self.is_plain = not self.uses_mixture and not terms
        self.is_scheduled = any(callable(alpha) for level in self._levels for alpha in level.alphas)
        self.acts = None if all(rows) else torch.tensor([bool(row) for row in rows], device=device)
        self.dtype = torch.promote_types(mfa.means.dtype, torch.float32)
        self._features = mfa.n_features

    def fold(self, steps: tuple[int, ...] = (0,)) -> Affine:
        """Returns the map at these steps, in the compute dtype of the mixture; S = len(steps), and B counts rows."""
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
        """Returns numbers (B, S) as one float if there is one, so that it stays on the host; else as (B, S, 1)."""
        if len(values) == len(values[0]) == 1:
            return values[0][0]
        return moved(values, self.dtype, self.device).unsqueeze(-1)


def moved(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns numbers on a device without waiting for it: to a GPU they go from pinned memory."""
    numbers = torch.tensor(values, dtype=dtype, device="cpu")
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


def _at(alpha: float | Callable[[int], float], step: int) -> float:
    return check_number(alpha(step), f"alpha({step})") if callable(alpha) else alpha


def _level(mfa: MFA, entries: list[Intervention | None], device: torch.device) -> _Level:
    effects = [_effect(mfa, entry) for entry in entries]

    def each(name: str, otherwise: Any = 0.0) -> list[Any]:
        return [effect.get(name, otherwise) for effect in effects]

    def stacked(name: str, width: int) -> Tensor:
        dtype = torch.promote_types(mfa.means.dtype, torch.float32)
        nothing = mfa.means.new_zeros(width, dtype=dtype)
        return torch.stack(each(name, nothing)).unsqueeze(1).to(device, dtype)

    single = {part: each(part, None) for part in ("remove_latents", "remove_region")}
    return _Level(
        alphas=each("alpha"),
        pull=each("pull"),
        on_means=each("on_means"),
        on_latents=each("on_latents"),
        target=stacked("target", mfa.n_features),
        offset=stacked("offset", mfa.n_features),
        latents=stacked("latents", mfa.rank) if any("latents" in effect for effect in effects) else None,
        local=[
            ([float(k is not None) for k in components], _local(mfa, components, part == "remove_region", device))
            for part, components in single.items()
            if any(k is not None for k in components)
        ],
    )


def _effect(mfa: MFA, entry: Intervention | None) -> dict[str, Any]:
    """Returns the fields of `_Level` in which a row with this intervention differs from one that is left alone."""

    def vector(values: Any) -> Tensor:
        return torch.as_tensor(values).to(mfa.means.device, torch.promote_types(mfa.means.dtype, torch.float32))

    match entry:
        case None:
            return {}
        case Offset(component, latents):
            z = vector(latents)
            return {"latents": z} if component is None else {"offset": vector(mfa.loadings[component]) @ z}
        case Toward(None, alpha):
            return {"alpha": alpha, "pull": 1.0, "on_means": 1.0}
        case Toward(component, alpha):
            return {"alpha": alpha, "pull": 1.0, "target": vector(mfa.means[component])}
        case Add(direction, alpha):
            return {"alpha": alpha, "target": vector(direction)}
        case Reconstruct(alpha):
            return {"alpha": alpha, "pull": 1.0, "on_means": 1.0, "on_latents": 1.0}
        case Remove(None, "latents", alpha):
            return {"alpha": alpha, "on_latents": -1.0}
        case Remove(None, _, alpha):
            return {"alpha": alpha, "on_latents": -1.0, "on_means": -1.0, "target": _mean(mfa)}
        case Remove(component, part, alpha):
            return {"alpha": alpha, f"remove_{part}": component}


def _mean(mfa: MFA) -> Tensor:
    """Returns m = sum_k pi_k mu_k, (D,)."""
    means, _, _, log_weights = mfa.parameters_in_compute_dtype()
    return log_weights.exp() @ means


def _local(mfa: MFA, components: list[int | None], is_region: bool, device: torch.device) -> RegionTerm:
    """Returns the term of a single region per row, without its coefficient; rows without a region get region 0."""
    index = torch.tensor([0 if k is None else k for k in components], device=mfa.means.device)
    means, loadings, noise_variance, _ = mfa.parameters_in_compute_dtype()
    dtype, mean, write = means.dtype, means[index].unsqueeze(1), loadings[index].mT
    precision = 1 / (noise_variance if noise_variance.dim() == 1 else noise_variance[index]).double()
    weighed = write.double() * (precision if precision.dim() == 1 else precision.unsqueeze(1))
    eye = torch.eye(mfa.rank, dtype=torch.float64, device=mean.device)
    gain = torch.linalg.solve(eye + weighed @ write.double().mT, weighed).to(dtype)
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

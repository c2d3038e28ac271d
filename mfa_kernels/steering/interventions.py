"""What to do to an activation, as values; and lists of them, one per batch row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mfa_kernels.checks import check_component
from mfa_kernels.mfa import MFA

Alpha: TypeAlias = "float | Tensor | Callable[[int], float]"


@dataclass(frozen=True, eq=False)
class Toward:
    """x <- (1 - alpha) x + alpha mu_k: interpolation, because a mean is a place (arXiv 2602.02464, eq. 14).

    Attributes:
        component: k; an integer tensor (B,) with one per batch row; or None for sum_k r_k(x) mu_k, with the
            responsibilities of the activation as it was before any intervention.
        alpha: 0 leaves x alone, 1 replaces it. A float, a tensor (B,), or a function of the generation step:
            0 for the prompt, 1 for the first generated token that the model reads, then 2, ...
    """

    component: int | Tensor | None
    alpha: Alpha = 1.0


@dataclass(frozen=True, eq=False)
class Offset:
    """x <- x + W_k z: a step along a region's own directions (arXiv 2602.02464, eq. 15).

    Attributes:
        component: as in `Toward`; None moves by sum_k r_k(x) W_k z.
        latents: z, (R,), or (B, R) with one per batch row; in the units of the mixture's prior, N(0, I).
    """

    component: int | Tensor | None
    latents: Tensor | Sequence[float]


Intervention: TypeAlias = "Toward | Offset"
Row: TypeAlias = "tuple[Intervention, ...]"


def as_rows(interventions: Any, rows: Any, mfa: MFA) -> list[Row]:
    """One checked tuple of interventions per batch row, a single one where all rows are treated alike.

    In the result every component is an int or None, every alpha a float or a function, and latents are (R,).

    Args:
        interventions: an intervention or a sequence of them, whose tensors may have a batch dimension; or None.
        rows: a sequence with an intervention, a sequence of them, or None (leave the row alone) for each row; or None.
        mfa: the mixture that they refer to.
    """
    if (interventions is None) == (rows is None):
        raise ValueError("interventions, rows: give exactly one of them")
    if rows is None:
        return _split(_as_tuple(interventions, "interventions"), mfa)
    if not isinstance(rows, Sequence) or not rows:
        raise ValueError(f"rows must be a sequence with one entry per batch row, got {rows!r}")
    checked = []
    for i, row in enumerate(rows):
        split = _split(() if row is None else _as_tuple(row, f"rows[{i}]"), mfa)
        if len(split) != 1:
            raise ValueError(f"rows[{i}] is for one row, but its tensors have a batch dimension of {len(split)}")
        checked += split
    return checked


def _as_tuple(value: Any, name: str) -> Row:
    entries = (value,) if isinstance(value, Toward | Offset) else value
    if not isinstance(entries, Sequence) or not all(isinstance(e, Toward | Offset) for e in entries):
        raise TypeError(f"{name} must be Toward, Offset or a sequence of them, got {value!r}")
    return tuple(entries)


def _split(interventions: Row, mfa: MFA) -> list[Row]:
    """The same for each batch row that the tensors distinguish."""
    checked = [_checked(intervention, mfa) for intervention in interventions]
    sizes = {name: len(value) for fields in checked for name, value in fields.items() if len(value) > 1}
    count = max(sizes.values(), default=1)
    if any(size != count for size in sizes.values()):
        raise ValueError(f"{', '.join(sizes)}: batch dimensions differ, {sizes}")
    return [
        tuple(
            replace(intervention, **{name: value[i if len(value) > 1 else 0] for name, value in fields.items()})
            for intervention, fields in zip(interventions, checked)
        )
        for i in range(count)
    ]


def _checked(intervention: Intervention, mfa: MFA) -> dict[str, Any]:
    """Each field as a sequence over batch rows, of length 1 where all share it."""
    fields: dict[str, Any] = {"component": _components(intervention.component, mfa.n_components)}
    if isinstance(intervention, Toward):
        fields["alpha"] = _alphas(intervention.alpha)
    else:
        fields["latents"] = _latents(intervention.latents, mfa.rank)
    return fields


def _components(component: int | Tensor | None, count: int) -> list[int | None]:
    if component is None:
        return [None]
    if isinstance(component, Tensor) and (component.dim() > 1 or component.dtype.is_floating_point):
        raise ValueError(
            f"component must be an int or an integer tensor of shape (B,), "
            f"got {component.dtype} of shape {tuple(component.shape)}"
        )
    values = component.reshape(-1).tolist() if isinstance(component, Tensor) else [component]
    if not values:
        raise ValueError("component is an empty tensor")
    if any(isinstance(k, bool) or not hasattr(k, "__index__") for k in values):
        raise TypeError(f"component must be an int, an integer tensor (B,) or None, got {component!r}")
    return [check_component(k, count) for k in values]


def _alphas(alpha: Alpha) -> list[float | Callable[[int], float]]:
    if callable(alpha):
        return [alpha]
    if isinstance(alpha, Tensor):
        if alpha.dim() > 1 or not alpha.numel():
            raise ValueError(f"alpha must be a float or a tensor of shape (B,), got shape {tuple(alpha.shape)}")
        values = alpha.detach().reshape(-1).tolist()
    else:
        values = [alpha]
    return [finite(value, "alpha") for value in values]


def _latents(latents: Tensor | Sequence[float], rank: int) -> Tensor:
    if rank == 0:
        raise ValueError("latents: the mixture has rank 0, its components have no directions to move along")
    z = torch.as_tensor(latents)
    if z.dim() not in (1, 2) or z.shape[-1] != rank or not len(z):
        raise ValueError(f"latents must have shape (R,) = ({rank},) or (B, R) = (B, {rank}), got {tuple(z.shape)}")
    if not z.isfinite().all():
        raise ValueError("latents must be finite")
    return z.reshape(-1, rank)


def finite(value: Any, name: str) -> float:
    """`value` as a finite float; raises otherwise."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number

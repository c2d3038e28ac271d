"""Interventions: what to do to an activation, as values, and lists of them, one per batch row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.checks import (
    check_choice,
    check_component,
    check_components,
    check_finite,
    check_number,
    check_tensor,
)
from mfa_kernels.mixture.mfa import MFA

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


@dataclass(frozen=True, eq=False)
class Add:
    """x <- x + alpha v: a steering vector, such as a difference of means.

    Attributes:
        direction: v, (D,), or (B, D) with one per batch row.
        alpha: as in `Toward`; 0 leaves x alone.
    """

    direction: Tensor | Sequence[float]
    alpha: Alpha = 1.0


@dataclass(frozen=True, eq=False)
class Reconstruct:
    """x <- (1 - alpha) x + alpha sum_k r_k(x) (mu_k + W_k E[z | x, k]): the reconstruction of x (eq. 11-13).

    Attributes:
        alpha: as in `Toward`; 1 replaces the activation by its reconstruction.
    """

    alpha: Alpha = 1.0


@dataclass(frozen=True, eq=False)
class Remove:
    """Removes a region's part from x, as estimated from the activation before any intervention.

    part="latents"  x <- x - alpha W_k E[z | x, k] removes the variation along the region's own directions, from tokens
                    of every region unless a gate limits it. For None, sum_k r_k(x) W_k E[z | x, k] is removed.
    part="region"   x <- x - alpha r_k(x) (mu_k - m + W_k E[z | x, k]), with m = sum_j pi_j mu_j, the mixture's mean,
                    removes the region's term of the reconstruction and puts r_k m in its place. A token wholly in the
                    region keeps only its residual, around m; a token with no part in it is unchanged. The result does
                    not depend on the origin. For None, the sum over all k is removed.

    Attributes:
        component: k; an integer tensor (B,) with one per batch row; or None for all of them.
        part: "latents" or "region".
        alpha: as in `Toward`; 1 removes it, a negative number amplifies it.
    """

    component: int | Tensor | None
    part: str = "latents"
    alpha: Alpha = 1.0


Intervention: TypeAlias = "Toward | Offset | Add | Reconstruct | Remove"
Row: TypeAlias = "tuple[Intervention, ...]"

_LARGEST = torch.finfo(torch.float32).max
_KINDS = (Toward, Offset, Add, Reconstruct, Remove)


def as_rows(interventions: Any, rows: Any, mfa: MFA) -> list[Row]:
    """Returns one checked tuple of interventions per batch row, or a single tuple if all rows share it.

    In the result every component is an int or None, every alpha a float or a function, and vectors are (R,) or (D,).

    Args:
        interventions: an intervention or a sequence of them, whose tensors may have a batch dimension; or None.
        rows: a sequence with an intervention, a sequence of them, or None (leave the row alone) for each row; or None.
        mfa: the mixture that they refer to.

    Raises:
        IndexError, TypeError, ValueError: naming the argument that does not fit.
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
    entries = (value,) if isinstance(value, _KINDS) else value
    if not isinstance(entries, Sequence) or not all(isinstance(e, _KINDS) for e in entries):
        kinds = ", ".join(kind.__name__ for kind in _KINDS)
        raise TypeError(f"{name} must be {kinds} or a sequence of them, got {value!r}")
    return tuple(entries)


def _split(interventions: Row, mfa: MFA) -> list[Row]:
    """Returns the interventions of each batch row that their tensors distinguish."""
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
    """Returns each field as a sequence over batch rows, of length 1 where all share it."""
    if isinstance(intervention, Remove):
        check_choice(intervention.part, ("latents", "region"), "part")
        if intervention.part == "latents":
            _check_rank(mfa, "Remove")
    fields: dict[str, Any] = {}
    if isinstance(intervention, Toward | Offset | Remove):
        fields["component"] = _components(intervention.component, mfa.n_components)
    if isinstance(intervention, Offset):
        _check_rank(mfa, "latents")
        fields["latents"] = _vectors(intervention.latents, mfa.rank, "latents", "R")
    else:
        fields["alpha"] = _alphas(intervention.alpha)
    if isinstance(intervention, Add):
        fields["direction"] = _vectors(intervention.direction, mfa.n_features, "direction", "D")
    return fields


def _components(component: int | Tensor | None, count: int) -> list[int | None]:
    if component is None:
        return [None]
    if not is_several(component):
        return [check_component(component, count)]
    several = check_tensor(component, "component")
    if several.dim() > 1 or not several.numel():
        raise ValueError(
            f"component must be an int or an integer tensor of shape (B,), "
            f"got {several.dtype} of shape {tuple(several.shape)}"
        )
    return list(check_components(several.reshape(-1), count, "component"))


def _alphas(alpha: Alpha) -> list[float | Callable[[int], float]]:
    if callable(alpha):
        return [alpha]
    values = [alpha]
    if is_several(alpha):
        several = check_tensor(alpha, "alpha")
        if several.dim() > 1 or not several.numel():
            raise ValueError(f"alpha must be a float or a tensor of shape (B,), got shape {tuple(several.shape)}")
        values = check_finite(several, "alpha").detach().reshape(-1).tolist()
    return [check_number(value, "alpha", -_LARGEST, _LARGEST) for value in values]


def _check_rank(mfa: MFA, name: str) -> None:
    if mfa.rank == 0:
        raise ValueError(f"{name}: the mixture has rank 0, its components have no directions to move along")


def _vectors(values: Tensor | Sequence[float], width: int, name: str, letter: str) -> Tensor:
    """Returns finite real vectors, (1 or B, width)."""
    vectors = check_tensor(values, name)
    if vectors.dim() not in (1, 2) or vectors.shape[-1] != width or not len(vectors):
        raise ValueError(
            f"{name} must have shape ({letter},) = ({width},) or (B, {letter}) = (B, {width}), "
            f"got {tuple(vectors.shape)}"
        )
    if vectors.is_complex():
        raise TypeError(f"{name} must be real, got {vectors.dtype}")
    check_finite(vectors, name)
    return vectors.reshape(-1, width)

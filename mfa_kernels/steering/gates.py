"""Conditions on a token's place in the mixture, which combine with `&`, `|` and `~`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from mfa_kernels.common.checks import check_component, check_integer, check_number, shown
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.ops import ActivePairs


class Gate:
    """A condition on a token. `a & b`, `a | b` and `~a` are gates too."""

    def __and__(self, other: Gate) -> Gate:
        return Both(self, _operand(other))

    def __or__(self, other: Gate) -> Gate:
        return Either(self, _operand(other))

    def __invert__(self) -> Gate:
        return Not(self)

    def passes(self, seen: ActivePairs) -> Tensor:
        """Returns True for tokens that pass, (N,); under `steer`, a token that is not finite passes no gate."""
        raise NotImplementedError

    def leaves(self) -> Iterator[Gate]:
        """Yields the conditions it is made of."""
        yield self


@dataclass(frozen=True)
class Responsibility(Gate):
    """Tokens whose responsibility for a region, p(component | x), exceeds the threshold; `~` gives its complement."""

    component: int
    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "component", check_integer(self.component, "component"))
        object.__setattr__(self, "threshold", check_number(self.threshold, "threshold"))

    def passes(self, seen: ActivePairs) -> Tensor:
        return seen.responsibility(self.component) > self.threshold


@dataclass(frozen=True)
class LogDensity(Gate):
    """Tokens with log p(x) above the threshold, in nats; `~LogDensity(t)` acts out of the mixture's distribution."""

    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_number(self.threshold, "threshold"))

    def passes(self, seen: ActivePairs) -> Tensor:
        return seen.log_prob > self.threshold


@dataclass(frozen=True)
class Both(Gate):
    """Tokens that pass both gates."""

    first: Gate
    second: Gate

    def passes(self, seen: ActivePairs) -> Tensor:
        return self.first.passes(seen) & self.second.passes(seen)

    def leaves(self) -> Iterator[Gate]:
        yield from self.first.leaves()
        yield from self.second.leaves()


@dataclass(frozen=True)
class Either(Both):
    """Tokens that pass at least one of the gates."""

    def passes(self, seen: ActivePairs) -> Tensor:
        return self.first.passes(seen) | self.second.passes(seen)


@dataclass(frozen=True)
class Not(Gate):
    """Tokens that do not pass the inner gate."""

    inner: Gate

    def passes(self, seen: ActivePairs) -> Tensor:
        return ~self.inner.passes(seen)

    def leaves(self) -> Iterator[Gate]:
        yield from self.inner.leaves()


Gates: TypeAlias = "Gate | tuple[int, float] | list[Gate | tuple[int, float] | None] | None"


def check_gates(gate: Any, mfa: MFA) -> list[Gate | None]:
    """Returns one checked gate per batch row, a single one where all rows share it; [None] where there is none."""
    if not isinstance(gate, list):
        return [_checked(gate, mfa, "gate")]
    if not gate:
        raise ValueError("gate is an empty list; it takes one gate, or None, per batch row")
    return [_checked(entry, mfa, f"gate[{i}]") for i, entry in enumerate(gate)]


def _checked(gate: Any, mfa: MFA, name: str) -> Gate | None:
    if gate is None:
        return None
    if isinstance(gate, tuple) and len(gate) == 2:
        gate = Responsibility(*gate)
    if not isinstance(gate, Gate):
        raise TypeError(f"{name} must be (component, threshold) or a gate such as Responsibility, got {shown(gate)}")
    for leaf in gate.leaves():
        if isinstance(leaf, Responsibility):
            check_component(leaf.component, mfa.n_components, f"{name} component")
            if not 0 <= leaf.threshold < 1:
                raise ValueError(
                    f"{name} threshold must be in [0, 1), a responsibility to exceed; got {leaf.threshold}"
                )
    return gate


def _operand(gate: Any) -> Gate:
    if not isinstance(gate, Gate):
        raise TypeError(f"a gate combines with a gate such as Responsibility, got {shown(gate)}")
    return gate

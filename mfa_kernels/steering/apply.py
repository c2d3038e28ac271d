"""Composed interventions applied to hidden states."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_choice, check_floats, check_mixture
from mfa_kernels.common.modes import ordinary
from mfa_kernels.common.precision import full_precision, no_autocast
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.ops.intervene.op import Edit
from mfa_kernels.ops.intervene.op import intervene as steer_tokens
from mfa_kernels.ops.intervene.portable import (
    ALWAYS,
    DENSITY,
    NEVER,
    NOT_DENSITY,
    NOT_RESPONSIBILITY,
    RESPONSIBILITY,
    per_row,
)
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.steering.active_pairs import Reader
from mfa_kernels.steering.composition import Affine, Composition, RegionTerm, moved
from mfa_kernels.steering.gates import Gate, Gates, LogDensity, Not, Responsibility, check_gates
from mfa_kernels.steering.interventions import Row, as_rows

_TOKENS_PER_CHUNK = 4096  # active pairs are found for so many at once, so that they are never N x K in memory


def intervene(
    x: Tensor,
    mfa: MFA,
    interventions: Any = None,
    *,
    rows: Any = None,
    gate: Gates = None,
    norm: Any = None,
    step: int = 0,
) -> Tensor:
    """Returns `x` after the interventions, for any framework that hands out activations (TransformerLens, nnsight).

    Args:
        x: (..., D), any float dtype and device; the first dimension is the batch where there are two or more.
        mfa: the mixture.
        interventions: an intervention or a sequence of them, applied in order; see `mfa_kernels.steering`.
        rows: instead of interventions, one entry per batch row; see `steer`.
        gate: which tokens change; see `steer`.
        norm: "keep" gives each token back the Euclidean norm it had; None does not; a list has one per batch row.
        step: generation step at which an alpha that is a function is taken.

    Returns:
        A new tensor like x. Differentiable in x, in latents and directions, and in the mixture's parameters.

    Raises:
        IndexError, TypeError, ValueError: naming the argument that does not fit.
    """
    x = check_hidden(x, check_mixture(mfa).n_features, "x")
    if x.is_meta:
        raise ValueError("x must hold values, got a tensor on the meta device")
    with ordinary(gradients=False):
        program = Program(mfa, as_rows(interventions, rows, mfa), x.device, gate, norm, differentiable=True)
        if not x.numel():
            return x.clone()
        batch = x.shape[0] if x.dim() > 1 else 1
        return program(x.reshape(batch, -1, mfa.n_features), True, (step,)).hidden.reshape(x.shape)


def check_hidden(x: Any, features: int, name: str) -> Tensor:
    """Returns `x` as a float tensor (..., D).

    Raises:
        TypeError, ValueError: naming the argument that is none.
    """
    x = check_floats(x, name)
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name} must have shape (..., {features}) to fit the mixture, got {tuple(x.shape)}")
    return x


class Outcome(NamedTuple):
    """Hidden states after the interventions.

    Attributes:
        hidden: (B, T, D).
        reached: True if all tokens were acted on, or a mask that broadcasts to (B, T); None where the tally has it.
        tally: (B, T, 3), as `mfa_kernels.ops.intervene.op.intervene` returns it: the tokens that gates let through, and
            their responsibilities for the first region that a row's gate names. None where positions alone decide.
    """

    hidden: Tensor
    reached: bool | Tensor | None
    tally: Tensor | None


class Program:
    """Interventions and the mixture that they refer to, ready to run on hidden states (B, T, D).

    With fixed components this is one multiply-add in the dtype of the hidden states, and a select where some tokens
    are left alone. Gates, responsibilities and norms take the operator `intervene`, on the mixture's device, for every
    token of the pass: shapes depend on no value, so on a GPU nothing waits for the host, and it compiles.
    """

    def __init__(
        self,
        mfa: MFA,
        rows: list[Row],
        device: torch.device,
        gate: Gates = None,
        norm: Any = None,
        differentiable: bool = False,
    ) -> None:
        self.composition = Composition(mfa, rows, device)
        gates, norms = check_gates(gate, mfa), _check_norm(norm)
        self._sizes = {"interventions": len(rows), "gates": len(gates), "norms": len(norms)}
        is_gated = any(entry is not None for entry in gates)
        self._keeps_norm = any(norms)
        self._is_plain = self.composition.is_plain and not self._keeps_norm and not is_gated
        self._decides = is_gated or self.composition.acts is not None  # which tokens are reached
        self._device, self._mixture_dtype = mfa.means.device, torch.promote_types(mfa.means.dtype, torch.float32)
        self._reader = Reader(mfa, differentiable) if is_gated or self.composition.uses_mixture else None
        self._folded: Any = (None, None, None)  # (dtype, device and steps), the map, the operator's argument
        count = math.lcm(*self._sizes.values())
        rules = [
            (*_rule(gates[i * len(gates) // count], bool(rows[i * len(rows) // count])), norms[i * len(norms) // count])
            for i in range(count)
        ]
        self._rules = torch.tensor([(kind, region, keep) for kind, region, _, keep in rules], device=self._device).int()
        self._thresholds = torch.tensor([rule[2] for rule in rules], dtype=self._mixture_dtype, device=self._device)
        composed = [gate for gate in dict.fromkeys(gates) if gate is not None and _simple(gate) is None]
        self._composed = [
            (gate, torch.tensor([gate != other for other in gates], device=self._device)) for gate in composed
        ]

    def __call__(self, hidden: Tensor, chosen: bool | Tensor, steps: tuple[int, ...]) -> Outcome:
        """Returns the hidden states after the interventions, and which tokens they reached.

        Args:
            hidden: (B, T, D).
            chosen: tokens to act on: True for all, or a mask that broadcasts to (B, T).
            steps: of each position, or one for all of them.
        """
        batch, tokens, _ = hidden.shape
        for name, count in self._sizes.items():
            if batch % count:
                raise ValueError(f"{name} for {count} batch rows do not fit a batch of {batch}")
        affine, edit = self.prepare(hidden.dtype, hidden.device, steps)
        if edit is None:
            return self._fixed(affine, hidden, chosen)
        x, mask = hidden.to(self._device), chosen.to(self._device) if isinstance(chosen, Tensor) else None
        width = max(1, _TOKENS_PER_CHUNK // batch)
        parts = [self._columns(affine, edit, x, mask, a, min(a + width, tokens)) for a in range(0, tokens, width)]
        steered, tally = parts[0] if len(parts) == 1 else (torch.cat(of, 1) for of in zip(*parts))
        steered = steered.to(hidden.device)
        return Outcome(steered, None, tally) if self._decides else Outcome(steered, chosen, None)

    def prepare(self, dtype: torch.dtype, device: torch.device, steps: tuple[int, ...]) -> tuple[Affine, Edit | None]:
        """Returns the map folded for such hidden states, and the operator's argument (None where it needs none).

        Both are kept until the dtype or device of the hidden states, or the steps change. They are returned, not read
        from this object later, because another thread may have folded them for other steps meanwhile.
        """
        key = (dtype, device, steps)
        kept, affine, edit = self._folded
        if key == kept:
            return affine, edit
        folded = self.composition.fold(steps)
        most = torch.finfo(dtype).max
        if not isinstance(folded.scale, Tensor) and abs(folded.scale) > most:
            raise ValueError(
                f"alpha must be below {most:g}, as hidden states are in {dtype}; x is scaled by {folded.scale:g}"
            )
        if not self._is_plain:
            dtype, device = torch.promote_types(dtype, self._mixture_dtype), self._device
        if isinstance(folded.scale, Tensor):
            # Half precision would round a scale of 0.6 to 0.6016, so that only the sum is rounded to it.
            dtype = torch.promote_types(dtype, torch.float32)

        def ready(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        affine, edit = folded.each(ready), None
        if not self._is_plain:
            latents = folded.latents
            edit = Edit(
                _side_by_side(folded, dtype, device),
                affine.shift,
                self._rules,
                self._thresholds,
                self._keeps_norm,
                None if latents is None else latents.to(device, self._mixture_dtype),
                self.composition.uses_latents,
            )
        self._folded = (key, affine, edit)
        return affine, edit

    def _fixed(self, affine: Affine, hidden: Tensor, chosen: bool | Tensor) -> Outcome:
        batch, acts = hidden.shape[0], self.composition.acts
        shift, scale = per_row(affine.shift, batch), affine.scale
        if isinstance(scale, Tensor):
            steered = torch.addcmul(shift, per_row(scale, batch), hidden.to(shift.dtype)).to(hidden.dtype)
        else:
            steered = torch.add(shift, hidden, alpha=scale)
        if acts is not None:
            acts = per_row(acts.to(hidden.device), batch).unsqueeze(1)
            chosen = acts if chosen is True else acts & chosen
        if isinstance(chosen, Tensor):
            steered = torch.where(chosen.unsqueeze(-1), steered, hidden)
        return Outcome(steered, chosen, None)

    def _columns(
        self, affine: Affine, edit: Edit, hidden: Tensor, chosen: Tensor | None, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """Returns columns [start, stop) of the hidden states, steered, and their tally."""

        def here(value: Any) -> Any:
            is_long = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] > 1
            return value[:, start:stop] if is_long and stop - start < tokens else value

        batch, tokens, features = hidden.shape
        hidden, chosen = here(hidden), here(chosen)
        edit = edit._replace(**{name: here(getattr(edit, name)) for name in _PER_POSITION})
        seen, passed = None, None
        mixture: Any = (None, None)
        if self._reader is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.composition.uses_mixture):
                seen = self._reader.read(hidden.reshape(-1, features))
            passed = self._passed(seen, hidden.shape[:2])
            if self.composition.mixes:
                mixture = self._reader.mixture()
        for term in affine.local:
            own: list[Any] = [here(term.coefficient), *term[1:]]
            term = RegionTerm(*(per_row(v, batch) if isinstance(v, Tensor) else v for v in own))
            shift = _local_shift(term, hidden.to(edit.shift.dtype), seen)
            edit = edit._replace(shift=per_row(edit.shift, batch) + shift)
        return steer_tokens(hidden, edit, chosen, passed, seen, *mixture)

    def _passed(self, seen: ActivePairs, shape: torch.Size) -> Tensor | None:
        """Returns True where composed gates let a token through (or a row has none), (B, T); None without any."""
        passed = None
        for gate, elsewhere in self._composed:
            own = (gate.passes(seen) & ~seen.log_prob.isnan()).view(shape)
            if self._sizes["gates"] > 1:
                own = own | per_row(elsewhere, shape[0]).unsqueeze(1)
            passed = own if passed is None else passed & own
        return passed


_PER_POSITION = ("coefficients", "shift", "latents")


def _side_by_side(affine: Affine, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns scale, weight and spread, (B, S, 3)."""
    numbers = [affine.scale, affine.weight, affine.spread]
    like = next((n for n in numbers if isinstance(n, Tensor)), None)
    if like is None:
        return moved([[numbers]], dtype, device)
    columns = [n if isinstance(n, Tensor) else torch.full_like(like, n) for n in numbers]
    return torch.cat(torch.broadcast_tensors(*columns), -1).to(device, dtype)


def _check_norm(norm: Any) -> list[bool]:
    """Returns True for each distinguished row that keeps its norm."""
    entries = norm if isinstance(norm, list) and norm else [norm]
    for entry in entries:
        if entry is not None:
            check_choice(entry, ("keep",), "norm")
    return [entry is not None for entry in entries]


def _rule(gate: Gate | None, acts: bool) -> tuple[int, int, float]:
    """Returns kind, region and threshold of a row's gate, as in `Edit`; a row left alone still reports its region."""
    leaves = [] if gate is None else gate.leaves()
    region = next((leaf.component for leaf in leaves if isinstance(leaf, Responsibility)), -1)
    kind, threshold = (None if gate is None else _simple(gate)) or (ALWAYS, 0.0)
    return kind if acts else NEVER, region, threshold


def _simple(gate: Gate) -> tuple[int, float] | None:
    """Returns kind and threshold of a gate on one region or on the density, or of its complement; else None."""
    inverted = isinstance(gate, Not)
    leaf = gate.inner if isinstance(gate, Not) else gate
    if isinstance(leaf, Responsibility):
        return NOT_RESPONSIBILITY if inverted else RESPONSIBILITY, leaf.threshold
    if isinstance(leaf, LogDensity):
        return NOT_DENSITY if inverted else DENSITY, leaf.threshold
    return None


def _local_shift(term: RegionTerm, x: Tensor, seen: ActivePairs | None) -> Tensor:
    # Compiled code cannot set the precision of float32 products.
    with no_autocast(x) if torch.compiler.is_compiling() else full_precision(x):
        out = (x - term.mean) @ term.gain.mT @ term.loadings
    if term.apart is not None:
        out = out + term.apart
    coefficient = term.coefficient
    if term.component is not None and seen is not None:
        component = term.component.expand(*x.shape[:2], 1).reshape(-1, 1)
        coefficient = coefficient * seen.responsibility(component).view(*x.shape[:2], 1)
    return coefficient * out

"""Composed interventions applied to hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.checks import check_choice
from mfa_kernels.mfa import MFA
from mfa_kernels.steering.composition import Affine, Composition, Local
from mfa_kernels.steering.evidence import Evidence, Reader
from mfa_kernels.steering.gates import Gate, Gates, Responsibility, check_gates
from mfa_kernels.steering.interventions import Row, as_rows

_TOKENS_PER_CHUNK = 4096  # of the evidence, so that a diffuse mixture does not hold N x K of it


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
    """`x` after the interventions, for any framework that hands out activations: TransformerLens, nnsight, hooks.

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
    check_hidden(x, mfa.n_features, "x")
    program = Program(mfa, as_rows(interventions, rows, mfa), x.device, gate, norm, differentiable=True)
    if not x.numel():
        return x.clone()
    batch = x.shape[0] if x.dim() > 1 else 1
    return program(x.reshape(batch, -1, mfa.n_features), True, (step,)).hidden.reshape(x.shape)


def check_hidden(x: Any, features: int, name: str) -> None:
    """Raises unless `x` is a float tensor (..., D)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name} must have shape (..., {features}) to fit the mixture, got {tuple(x.shape)}")


class Outcome(NamedTuple):
    """Hidden states after the interventions.

    Attributes:
        hidden: (B, T, D).
        reached: the tokens that were acted on: True for all, or a mask that broadcasts to (B, T).
        responsibility: (B, T), for the first region that a row's gate looks at, NaN in rows whose gate looks at none;
            None where no gate looks at a region.
    """

    hidden: Tensor
    reached: bool | Tensor
    responsibility: Tensor | None


class Program:
    """Interventions with the mixture they refer to, ready to run on hidden states (B, T, D).

    With fixed components this is one multiply-add in the dtype of the hidden states, and a select where some tokens
    are left alone. What depends on responsibilities is computed on the mixture's device in its compute dtype, for
    every token of the pass: shapes depend on no value, so on a GPU nothing waits for the host, and it compiles.
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
        self._gates = check_gates(gate, mfa)
        self._keeps_norm = _check_norm(norm)
        self.is_gated = any(entry is not None for entry in self._gates)
        self._is_plain = self.composition.is_plain and not any(self._keeps_norm)
        self._device = mfa.means.device
        self._reader = Reader(mfa, differentiable) if self.is_gated or self.composition.uses_mixture else None
        self._key: Any = None
        self._affine: Affine

        def per_row(values: list[Any], device: torch.device) -> Tensor:
            return torch.tensor(values, device=device)

        watched = [_watched(gate) for gate in self._gates]
        self.watches = any(k >= 0 for k in watched)
        self._watched = per_row(watched, mfa.means.device).int()
        self._norm_rows = None if all(self._keeps_norm) else per_row(self._keeps_norm, self._device)
        gates = list(dict.fromkeys(self._gates))
        self._distinct = [(gate, per_row([gate == g for g in self._gates], mfa.means.device)) for gate in gates]

    def __call__(self, hidden: Tensor, chosen: bool | Tensor, steps: tuple[int, ...]) -> Outcome:
        """The hidden states after the interventions, and which tokens they reached.

        Args:
            hidden: (B, T, D).
            chosen: tokens to act on: True for all, or a mask that broadcasts to (B, T).
            steps: of each position, or one for all of them.
        """
        batch, tokens, _ = hidden.shape
        acts, composition = self.composition.acts, self.composition
        for name, count in (("interventions", composition.rows), ("gates", len(self._gates)),
                            ("norms", len(self._keeps_norm))):  # fmt: skip
            if batch % count:
                raise ValueError(f"{name} for {count} batch rows do not fit a batch of {batch}")
        if acts is not None:
            acts = _repeated(acts.to(hidden.device), batch).unsqueeze(1)
            chosen = acts if chosen is True else acts & chosen
        affine = self.prepare(hidden.dtype, hidden.device, steps)
        width = tokens if self._is_plain and not self.is_gated else max(1, _TOKENS_PER_CHUNK // batch)
        parts = [self._columns(hidden, affine, a, min(a + width, tokens)) for a in range(0, tokens, width)]
        steered, passed, responsibility = parts[0] if len(parts) == 1 else _joined(parts)
        if passed is not None:
            passed = passed.to(hidden.device)
            chosen = passed if chosen is True else passed & chosen
        if isinstance(chosen, Tensor):
            steered = torch.where(chosen.unsqueeze(-1), steered, hidden)
        return Outcome(steered, chosen, responsibility)

    def prepare(self, dtype: torch.dtype, device: torch.device, steps: tuple[int, ...]) -> Affine:
        """The folded map for hidden states like these; kept until their dtype or device, or the steps change."""
        if not self._is_plain:
            dtype, device = self.composition.dtype, self._device
        key = (dtype, device, steps)
        if key != self._key:
            folded = self.composition.fold(steps)
            if isinstance(folded.scale, Tensor):
                # Half precision would round a scale of 0.6 to 0.6016: here the sum alone is rounded.
                dtype = torch.promote_types(dtype, torch.float32)

            def ready(value: Any, varies: bool) -> Any:
                if not isinstance(value, Tensor):
                    return value
                return value.to(device, dtype) if value.is_floating_point() else value.to(device)

            self._key, self._affine = key, folded.each(ready)
        return self._affine

    def _columns(
        self, hidden: Tensor, affine: Affine, start: int, stop: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Columns [start, stop) of the hidden states steered; where the gates pass; what they saw."""
        batch, tokens, features = hidden.shape
        if stop - start < tokens:
            hidden = hidden[:, start:stop]

        def here(value: Any, varies: bool) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value[:, start:stop] if varies and value.shape[1] > 1 else value
            return _repeated(value, batch)

        affine = affine.each(here)
        seen, flat = None, None
        if self._reader is not None:
            flat = hidden.reshape(-1, features).to(self._reader.device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.composition.uses_mixture):
                seen = self._reader.read(flat)
        steered = _plain(affine, hidden) if self._is_plain else self._general(affine, hidden, flat, seen).to(hidden)
        if seen is None or not self.is_gated:
            return steered, None, None
        shape = hidden.shape[:2]
        return steered, self._passed(seen, shape), self._responsibility(seen, shape) if self.watches else None

    def _general(self, affine: Affine, hidden: Tensor, flat: Tensor | None, seen: Evidence | None) -> Tensor:
        x = hidden.to(self._device, self.composition.dtype)
        out = affine.scale * x + affine.shift
        if flat is not None and seen is not None and self.composition.uses_mixture:
            out = out + self._mixture_shift(affine, flat, seen, hidden.shape)
        for term in affine.local:
            out = out + _local_shift(term, x, seen)
        if any(self._keeps_norm):
            before, after = x.norm(dim=-1, keepdim=True), out.norm(dim=-1, keepdim=True)
            factor = torch.where(after > 0, before / after, 1)
            if self._norm_rows is not None:
                factor = torch.where(_repeated(self._norm_rows, x.shape[0]).reshape(-1, 1, 1), factor, 1)
            out = out * factor
        return out

    def _mixture_shift(self, affine: Affine, x: Tensor, seen: Evidence, shape: torch.Size) -> Tensor:
        """sum_k r_k (weight mu_k + W_k (z + spread E[z | x, k])) over the active components, (B, T, D)."""
        assert self._reader is not None
        reader, (tokens, slots), rank = self._reader, seen.components.shape, self._reader.loadings.shape[-1]

        def per_token(value: Tensor) -> Tensor:
            return value.expand(*shape[:2], value.shape[-1]).reshape(tokens, 1, -1)

        latents = x.new_zeros(tokens, slots, rank, dtype=reader.means.dtype)
        center = reader.decode(seen, latents)  # sum_k r_k mu_k
        out = affine.weight * center.view(shape)
        if self.composition.uses_latents:
            spread = affine.spread
            of_token = per_token(spread) if isinstance(spread, Tensor) else spread
            latents = latents + of_token * reader.latents(x, seen)
        if affine.latents is not None:
            latents = latents + per_token(affine.latents)
        if self.composition.uses_latents or affine.latents is not None:
            out = out + (reader.decode(seen, latents) - center).view(shape)
        return out

    def _passed(self, seen: Evidence, shape: torch.Size) -> Tensor:
        """Where the gate of its row lets a token through, (B, T)."""
        batch = shape[0]
        passed = torch.zeros(shape, dtype=torch.bool, device=seen.log_prob.device)
        for gate, rows in self._distinct:
            here = _repeated(rows, batch).unsqueeze(1)
            passed = passed | (here if gate is None else here & self._finite_pass(gate, seen).view(shape))
        return passed

    @staticmethod
    def _finite_pass(gate: Gate, seen: Evidence) -> Tensor:
        return gate.passes(seen) & ~seen.log_prob.isnan()

    def _responsibility(self, seen: Evidence, shape: torch.Size) -> Tensor:
        watched = _repeated(self._watched, shape[0]).unsqueeze(1)
        r = seen.responsibility(watched.expand(shape).reshape(-1, 1)).view(shape)
        return torch.where(watched >= 0, r, torch.nan)


def _check_norm(norm: Any) -> list[bool]:
    """Whether a row keeps its norm, for each row that is distinguished."""
    entries = norm if isinstance(norm, list) and norm else [norm]
    for entry in entries:
        if entry is not None:
            check_choice(entry, ("keep",), "norm")
    return [entry is not None for entry in entries]


def _watched(gate: Gate | None) -> int:
    """The first region that a gate looks at, or -1."""
    leaves = [] if gate is None else gate.leaves()
    return next((leaf.component for leaf in leaves if isinstance(leaf, Responsibility)), -1)


def _repeated(value: Tensor, batch: int) -> Tensor:
    """Per batch row what is given for fewer of them: row i takes entry i // (batch / entries)."""
    return value if value.shape[0] in (1, batch) else value.repeat_interleave(batch // value.shape[0], 0)


def _joined(parts: list[tuple[Tensor, Tensor | None, Tensor | None]]) -> Any:
    return tuple(None if of[0] is None else torch.cat(of, 1) for of in zip(*parts))  # type: ignore[arg-type]


def _plain(affine: Affine, hidden: Tensor) -> Tensor:
    if isinstance(affine.scale, Tensor):
        return torch.addcmul(affine.shift, affine.scale, hidden.to(affine.shift.dtype)).to(hidden.dtype)
    return torch.add(affine.shift, hidden, alpha=affine.scale)


def _local_shift(term: Local, x: Tensor, seen: Evidence | None) -> Tensor:
    out = (x - term.mean) @ term.gain.mT @ term.loadings
    if term.apart is not None:
        out = out + term.apart
    coefficient = term.coefficient
    if term.component is not None and seen is not None:
        component = term.component.expand(*x.shape[:2], 1).reshape(-1, 1)
        coefficient = coefficient * seen.responsibility(component).view(*x.shape[:2], 1)
    return coefficient * out

"""Composed interventions applied to hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mfa_kernels.checks import check_component
from mfa_kernels.code import Code
from mfa_kernels.functional import compute_dtype
from mfa_kernels.mfa import MFA
from mfa_kernels.steering.composition import Affine, Composition
from mfa_kernels.steering.interventions import Row, as_rows, finite

_TOKENS_PER_CHUNK = 4096  # of the responsibilities, so that a diffuse mixture does not hold N x K of them

Gate = tuple[int, float]


def intervene(
    x: Tensor,
    mfa: MFA,
    interventions: Any = None,
    *,
    rows: Any = None,
    gate: Gate | None = None,
    step: int = 0,
) -> Tensor:
    """`x` after the interventions, for any framework that hands out activations: TransformerLens, nnsight, hooks.

    Args:
        x: (..., D), any float dtype and device; the first dimension is the batch where there are two or more.
        mfa: the mixture.
        interventions: `Toward`, `Offset` or a sequence of them, applied in order.
        rows: instead of interventions, one entry per batch row; see `steer`.
        gate: (component, threshold): only tokens whose responsibility for the component exceeds the threshold change.
        step: generation step at which an alpha that is a function is taken.

    Returns:
        A new tensor like x. Differentiable in x, in latents, and in the mixture's parameters.

    Raises:
        IndexError, TypeError, ValueError: naming the argument that does not fit.
    """
    check_hidden(x, mfa.n_features, "x")
    program = Program(mfa, as_rows(interventions, rows, mfa), check_gate(gate, mfa), x.device)
    if not x.numel():
        return x.clone()
    batch = x.shape[0] if x.dim() > 1 else 1
    out, _ = program(x.reshape(batch, -1, mfa.n_features), True, (step,))
    return out.reshape(x.shape)


def check_gate(gate: Gate | None, mfa: MFA) -> Gate | None:
    """`gate` as (int, float), or None; raises otherwise."""
    if gate is None:
        return None
    try:
        component, threshold = gate
    except (TypeError, ValueError):
        raise TypeError(f"gate must be (component, threshold), got {gate!r}") from None
    threshold = finite(threshold, "gate threshold")
    if not 0 <= threshold < 1:
        raise ValueError(f"gate threshold must be in [0, 1), a responsibility to exceed; got {threshold}")
    return check_component(component, mfa.n_components, "gate component"), threshold


def check_hidden(x: Any, features: int, name: str) -> None:
    """Raises unless `x` is a float tensor (..., D)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name} must have shape (..., {features}) to fit the mixture, got {tuple(x.shape)}")


class Program:
    """Interventions with the mixture they refer to, ready to run on hidden states (B, T, D).

    With fixed components and no gate this is one multiply-add in the dtype of the hidden states, and a select where
    some tokens are left alone: no host synchronisation. Responsibilities, for component=None or a gate, are computed
    on the mixture's device in its compute dtype, for the chosen tokens alone.
    """

    def __init__(self, mfa: MFA, rows: list[Row], gate: Gate | None, device: torch.device) -> None:
        self.gate = gate
        self._mfa = mfa
        self.composition = Composition(mfa, rows, device)
        self._key: Any = None
        self._affine: Affine

    def __call__(self, hidden: Tensor, chosen: bool | Tensor, steps: tuple[int, ...]) -> tuple[Tensor, bool | Tensor]:
        """The hidden states after the interventions, and which tokens they reached.

        Args:
            hidden: (B, T, D).
            chosen: tokens to act on: True for all, or a mask that broadcasts to (B, T).
            steps: of each position, or one for all of them.
        """
        batch, tokens, _ = hidden.shape
        composition = self.composition
        if batch % composition.rows:
            raise ValueError(f"interventions for {composition.rows} batch rows do not fit a batch of {batch}")
        if composition.acts is not None:
            acts = composition.acts.to(hidden.device).repeat_interleave(batch // composition.rows).unsqueeze(1)
            chosen = acts.expand(batch, tokens) if chosen is True else acts & chosen
        if self.gate is None and not composition.uses_mixture:
            return self._fixed(hidden, chosen, steps), chosen
        return self._by_responsibility(hidden, chosen, steps)

    def prepare(self, batch: int, dtype: torch.dtype, device: torch.device, steps: tuple[int, ...]) -> Affine:
        """The folded map for a batch, cast and moved; kept until one of these changes."""
        repeats = 1 if self.composition.rows == 1 else batch // self.composition.rows
        key = (repeats, dtype, device, steps)
        if key != self._key:
            folded = self.composition.fold(steps)
            if isinstance(folded.scale, Tensor):
                # Half precision would round a scale of 0.6 to 0.6016: here the sum alone is rounded.
                dtype = torch.promote_types(dtype, torch.float32)

            def ready(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                value = value.to(device, dtype)
                return value if repeats == 1 else value.repeat_interleave(repeats, 0)

            self._key, self._affine = key, Affine(*map(ready, folded))
        return self._affine

    def _fixed(self, hidden: Tensor, chosen: bool | Tensor, steps: tuple[int, ...]) -> Tensor:
        affine = self.prepare(hidden.shape[0], hidden.dtype, hidden.device, steps)
        if isinstance(affine.scale, Tensor):
            steered = torch.addcmul(affine.shift, affine.scale, hidden.to(affine.shift.dtype)).to(hidden.dtype)
        else:
            steered = torch.add(affine.shift, hidden, alpha=affine.scale)
        return torch.where(chosen.unsqueeze(-1), steered, hidden) if isinstance(chosen, Tensor) else steered

    def _by_responsibility(
        self, hidden: Tensor, chosen: bool | Tensor, steps: tuple[int, ...]
    ) -> tuple[Tensor, bool | Tensor]:
        batch, tokens, features = hidden.shape
        flat, device = hidden.reshape(-1, features), self._mfa.means.device
        if isinstance(chosen, Tensor):
            index = chosen.expand(batch, tokens).reshape(-1).nonzero().squeeze(-1)
        else:
            index = torch.arange(len(flat), device=hidden.device)
        affine = self.prepare(batch, self.composition.dtype, device, steps)
        reached, steered = [index[:0]], [flat[:0]]
        for part in index.split(_TOKENS_PER_CHUNK) if len(index) else ():
            x = flat[part].to(device)
            code = self._mfa.encode(x, top_k=None)
            if self.gate is not None:
                component, threshold = self.gate
                keep = (code.responsibilities * (code.components == component)).sum(-1) > threshold
                x, code, part = x[keep], _at(code, keep), part[keep.to(part.device)]
            at = _at_tokens(affine, part.to(device), tokens)
            out = at.scale * x.to(self.composition.dtype) + at.shift
            if self.composition.uses_mixture:
                out = out + _mixture_shift(self._mfa, code, at.weight, at.latents)
            reached.append(part)
            steered.append(out.to(hidden))
        index = torch.cat(reached)
        mask = torch.zeros(len(flat), dtype=torch.bool, device=hidden.device).index_fill_(0, index, True)
        return flat.index_copy(0, index, torch.cat(steered)).reshape(hidden.shape), mask.reshape(batch, tokens)


def _at(code: Code, keep: Tensor) -> Code:
    return Code(code.components[keep], code.responsibilities[keep], code.latents[keep], code.dropped[keep])


def _at_tokens(affine: Affine, index: Tensor, tokens: int) -> Affine:
    """The map's fields at flat token indices (M,): floats, (X,) where all tokens share them, or (M, X)."""

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        row = index.div(tokens, rounding_mode="floor") if value.shape[0] > 1 else 0
        return value[row, index.remainder(tokens) if value.shape[1] > 1 else 0]

    return Affine(*map(pick, affine))


def _mixture_shift(mfa: MFA, code: Code, weight: float | Tensor, latents: Tensor | None) -> Tensor:
    """sum_k r_k (weight mu_k + W_k z) over the active components, (M, D)."""
    (means,) = compute_dtype(mfa.means)
    components, responsibilities = code.components, code.responsibilities
    target = F.embedding_bag(components.clamp_min(0), means, per_sample_weights=responsibilities, mode="sum")
    if latents is None:
        return weight * target
    # One decode gives sum_k r_k (mu_k + W_k z): the means in it are exchanged for their weighted share.
    spread = mfa.decode(Code(components, responsibilities, latents.unsqueeze(-2).expand_as(code.latents), code.dropped))
    return (weight - 1) * target + spread

"""The sparse code of tokens that `MFA.encode` returns, and how it is made of the active pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import MOST_COMPONENTS, check_floats, check_integer, check_integers, shown
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs


@dataclass(frozen=True)
class Code:
    """A sparse code of tokens: the components that matter, largest responsibility first.

    Attributes:
        components: (..., C) int64; -1 marks an empty slot (fewer than C components are active).
        responsibilities: p(k | x), (..., C); 0 in an empty slot, NaN for a token that is not finite.
        latents: E[z | x, k], (..., C, R); 0 in an empty slot.
        dropped: upper bound on the responsibility of all the components left out, (...); it holds for the logits as
            computed, which in float32 carry the rounding of their own magnitude (1e-4 at thousands of nats).
    """

    components: Tensor
    responsibilities: Tensor
    latents: Tensor
    dropped: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Code:
        """Moves or casts like `torch.Tensor.to`; components stay int64."""
        moved = {f.name: getattr(self, f.name).to(*args, **kwargs) for f in fields(self)}
        return Code(**{**moved, "components": moved["components"].long()})

    def hard(self) -> Code:
        """The most responsible component alone, with responsibility 1: (..., 1)."""
        first = self.responsibilities[..., :1]
        return Code(
            self.components[..., :1],
            torch.where(self.components[..., :1] < 0, first, torch.ones_like(first)),
            self.latents[..., :1, :],
            (1 - first.squeeze(-1)).clamp_min(0),
        )

    def to_dense(self, n_components: Any = None, *, mfa: Any = None) -> Tensor:
        """Coefficients in the paper's dictionary order, (..., K (1 + R)): per component [r_k, r_k z_k] (eq. 11-13).

        Args:
            n_components: K, or the mixture itself.
            mfa: the name that the argument had before; either will do.
        """
        given = mfa if n_components is None else n_components
        count = check_integer(getattr(given, "n_components", given), "n_components", 1, MOST_COMPONENTS)
        # A GPU would wait for this, and has its own check of indices.
        seen = self.components.device.type == "cpu" and not torch.compiler.is_compiling()
        if seen and bool((self.components >= count).any()):
            raise ValueError(f"n_components must be above all components of the code, got {count}")
        shape, rank = self.components.shape[:-1], self.latents.shape[-1]
        blocks = torch.cat([torch.ones_like(self.latents[..., :1]), self.latents], dim=-1)
        blocks = blocks * self.responsibilities.unsqueeze(-1)
        # Empty slots go to a component past the last, which is cut off.
        index = torch.where(self.components < 0, count, self.components)
        dense = blocks.new_zeros(*shape, count + 1, 1 + rank)
        dense = dense.scatter_add(-2, index.unsqueeze(-1).expand_as(blocks), blocks)
        return dense[..., :-1, :].flatten(-2)


def checked_code(code: Any, rank: int, device: torch.device) -> Code:
    """A code of components (..., C), responsibilities of that shape and latents (..., C, R); raises otherwise."""
    if not isinstance(code, Code):
        raise TypeError(f"code must be a Code, as `encode` returns it, got {shown(code)}")
    components = check_integers(code.components, "code.components")
    if not components.dim():
        raise ValueError("code.components must have shape (..., C), got ()")
    shape = tuple(components.shape)
    responsibilities = check_floats(code.responsibilities, "code.responsibilities")
    latents = check_floats(code.latents, "code.latents")
    for name, tensor, wanted in (("responsibilities", responsibilities, shape), ("latents", latents, (*shape, rank))):
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"code.{name} must have shape {wanted} beside components of shape {shape}, got {tuple(tensor.shape)}"
            )
    checked = Code(components, responsibilities, latents, code.dropped)
    for name, tensor in vars(checked).items():
        if name != "dropped" and tensor.device != device:
            raise ValueError(f"code.{name} is on {tensor.device}, but the mixture is on {device}: move one of them")
    return checked


def every_active_pair(scan: Callable[[int], ActivePairs], components: int) -> ActivePairs:
    """Returns what `scan` finds with so many slots that the active components of no token overflow them.

    Args:
        scan: takes slots, and returns the active pairs of some tokens.
        components: K, the most slots that a token can need.
    """
    slots = min(SLOTS, components)
    active = scan(slots)
    return scan(components) if slots < components and bool((active.counts > slots).any()) else active


def code_of(active: ActivePairs, latents: Tensor, lead: torch.Size) -> Code:
    """The code (*lead, C) of tokens from all of their slots (N, S) and the latents (N, C, R) of the first C."""
    slots, held = active.logits.shape[-1], latents.shape[1]
    responsibilities = active.responsibilities()
    with torch.no_grad():
        overflow, eps = active.counts > slots, torch.finfo(responsibilities.dtype).eps
        rounding = torch.where(overflow, 4 * eps * (1 + active.log_prob.abs()), eps * slots)
        rest = torch.where(
            overflow, 1 - responsibilities[:, :held].sum(-1), responsibilities[:, held:].sum(-1)
        ).clamp_min(0)
        # The components that are not active weigh eps together.
        dropped = (rest + eps + rounding).clamp_max(1)
    return Code(
        active.components[:, :held].long().reshape(*lead, held),
        responsibilities[:, :held].reshape(*lead, held),
        latents.reshape(*lead, held, latents.shape[-1]),
        dropped.reshape(lead),
    )

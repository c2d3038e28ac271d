"""What `MFA.encode` returns: where tokens sit and how they vary there."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mfa_kernels.mfa import MFA


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

    def to_dense(self, mfa: MFA) -> Tensor:
        """Coefficients in the paper's dictionary order, (..., K (1 + R)): per component [r_k, r_k z_k] (eq. 11-13)."""
        shape, rank = self.components.shape[:-1], self.latents.shape[-1]
        blocks = torch.cat([torch.ones_like(self.latents[..., :1]), self.latents], dim=-1)
        blocks = blocks * self.responsibilities.unsqueeze(-1)
        # Empty slots go to a component past the last, which is cut off.
        index = torch.where(self.components < 0, mfa.n_components, self.components)
        dense = blocks.new_zeros(*shape, mfa.n_components + 1, 1 + rank)
        dense = dense.scatter_add(-2, index.unsqueeze(-1).expand_as(blocks), blocks)
        return dense[..., :-1, :].flatten(-2)

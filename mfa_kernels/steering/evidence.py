"""What a mixture says about tokens, for gates and for interventions that depend on responsibilities.

`MFA.encode` finds the same, but looks up its cached factors at each call, and under `torch.compile` computes them each
time. Steering runs at every generated token: here the factors are held.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfa_kernels import ops
from mfa_kernels.mfa import MFA
from mfa_kernels.ops.screen import op as screening
from mfa_kernels.ops.select.op import SLOTS, activity_threshold

_SCREENED_VALUES = 1 << 22
"""Values of the rows, K (R + 1) D, from which on a token is screened: 16 MB in float32, more than a cache holds."""


class Evidence(NamedTuple):
    """Of N tokens and their C slots for active components, largest responsibility first.

    Attributes:
        log_prob: log p(x), (N,); NaN for a token that is not finite.
        components: (N, C) int32; -1 marks an empty slot.
        responsibilities: (N, C).
    """

    log_prob: Tensor
    components: Tensor
    responsibilities: Tensor

    def responsibility(self, component: int | Tensor) -> Tensor:
        """p(component | x), (N,), for one component or one per token (N, 1)."""
        return (self.responsibilities * (self.components == component)).sum(-1)


class Reader(nn.Module):
    """A mixture's parameters and factors, as they are now.

    On a CPU every active component of a token is kept. On other devices, and under `torch.compile`, asking how many
    there are would wait for the answer: there the SLOTS most responsible ones are, which is all of them but for
    tokens of a diffuse mixture, and a component that is not among them counts as having no responsibility.

    Args:
        mfa: the mixture.
        differentiable: whether gradients reach its parameters.
    """

    means: Tensor
    loadings: Tensor
    noise_variance: Tensor
    log_weights: Tensor

    def __init__(self, mfa: MFA, differentiable: bool) -> None:
        super().__init__()
        # Buffers, because a CUDA graph copies every other tensor that it reads before each replay.
        names = ("means", "loadings", "noise_variance", "log_weights")
        for name, value in zip(names, mfa.parameters_in_compute_dtype()):
            self.register_buffer(name, value if differentiable else value.detach(), persistent=False)
        with torch.no_grad():  # factors of a training step would not be kept
            factors = mfa.factors()
            self._screen = None if differentiable else _screen(mfa, factors)
            self._constants = factors.constants(self.log_weights)
        self._parts = [self._keep(field.name, getattr(factors, field.name)) for field in fields(factors)]
        self._exact = mfa.precision != "fast"

    @property
    def device(self) -> torch.device:
        return self.means.device

    def _keep(self, name: str, value: Any) -> Any:
        """A field of the factors with buffers' names in the place of tensors."""
        if isinstance(value, tuple):
            return tuple(self._keep(f"{name}_{i}", entry) for i, entry in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        self.register_buffer(f"factor_{name}", value, persistent=False)
        return f"factor_{name}"

    def _kept(self, part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(self._kept(entry) for entry in part)
        return getattr(self, part) if isinstance(part, str) else part

    def _factors(self) -> ops.Factors:
        return ops.Factors(*(self._kept(part) for part in self._parts))

    def read(self, x: Tensor) -> Evidence:
        """Evidence of tokens (N, D)."""
        count = self.means.shape[0]
        slots = min(SLOTS, count)
        active = self._active(x, slots)
        waits = x.is_cuda or torch.compiler.is_compiling()
        if not waits and slots < count and bool((active.counts > slots).any()):
            slots = count
            active = self._active(x, slots)
        # Softmax, not exp(logits - log_prob), but where slots are missing: log_prob carries its own rounding.
        of_all = (active.logits - active.log_prob.unsqueeze(-1)).exp()
        held = active.logits.softmax(-1)
        responsibilities = torch.where((active.counts > slots).unsqueeze(-1), of_all, held)
        return Evidence(active.log_prob, active.components, responsibilities)

    def _active(self, x: Tensor, slots: int) -> ops.Active:
        if self._screen is not None and not (torch.is_grad_enabled() and x.requires_grad):
            threshold = activity_threshold(self.means.shape[0], self.means.dtype)
            return screening.select(x, self._factors(), self._constants, self._screen, threshold, slots).active
        parameters = (self.means, self.loadings, self.noise_variance, self.log_weights)
        return ops.log_prob(x, *parameters, self._factors(), slots, self._exact)

    def latents(self, x: Tensor, seen: Evidence) -> Tensor:
        """E[z | x, k] of the slots, (N, C, R); 0 in empty ones."""
        count, slots = seen.components.shape
        tokens = torch.arange(count * slots, device=x.device) // slots
        parameters = (self.means, self.loadings, self.noise_variance)
        return ops.latents(x, tokens, seen.components.flatten(), *parameters, self._factors()).view(count, slots, -1)

    def decode(self, seen: Evidence, latents: Tensor) -> Tensor:
        """sum_k r_k (mu_k + W_k z_k) over the slots, (N, D)."""
        return ops.decode(seen.components, seen.responsibilities, latents.contiguous(), self.means, self.loadings)


def _screen(mfa: MFA, factors: ops.Factors) -> screening.AnyScreen | None:
    """The mixture's screen; prepared here for a large mixture, where the rows of every token are read from memory."""
    if factors.rows.dim() != 4:  # on a GPU a few tokens read all rows faster
        return None
    tried, screen = mfa.screened()
    if not tried and factors.rows.numel() >= _SCREENED_VALUES:
        mfa.screen()
        _, screen = mfa.screened()
    return screen

"""The active pairs of tokens, for gates and for interventions that depend on responsibilities.

`MFA.encode` finds the same, but looks up its Woodbury terms at each call, and under `torch.compile` computes them each
time. Steering runs at every generated token: here the terms are held.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels import ops
from mfa_kernels.mixture.codes import every_active_pair
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.screening import pays_for_lone_tokens
from mfa_kernels.ops.scan.types import SLOTS, activity_threshold
from mfa_kernels.ops.screen import op as screening
from mfa_kernels.ops.screen.types import AnyScreen


class Reader(nn.Module):
    """A mixture's parameters and Woodbury terms, as they are now.

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
        with torch.no_grad():  # the terms of a training step would not be kept
            woodbury = mfa.woodbury()
            screen = None if differentiable else _screen(mfa, woodbury)
            self._screen = None if screen is None else (screen, woodbury.constants(self.log_weights))
        self._parts = [self._keep(field.name, getattr(woodbury, field.name)) for field in fields(woodbury)]
        self._exact = mfa.precision != "fast"

    @property
    def device(self) -> torch.device:
        return self.means.device

    def _keep(self, name: str, value: Any) -> Any:
        """A field of the Woodbury terms with buffers' names in the place of tensors."""
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

    def _factors(self) -> ops.Woodbury:
        return ops.Woodbury(*(self._kept(part) for part in self._parts))

    def read(self, x: Tensor) -> ops.ActivePairs:
        """Returns the active pairs of tokens (N, D)."""
        scan, count = partial(self._active, x), self.means.shape[0]
        waits = x.is_cuda or torch.compiler.is_compiling()
        return scan(min(SLOTS, count)) if waits else every_active_pair(scan, count)

    def _active(self, x: Tensor, slots: int) -> ops.ActivePairs:
        if self._screen is not None and not (torch.is_grad_enabled() and x.requires_grad):
            threshold = activity_threshold(self.means.shape[0], self.means.dtype)
            screen, constants = self._screen
            return screening.scan(x, self._factors(), constants, screen, threshold, slots).active
        parameters = (self.means, self.loadings, self.noise_variance, self.log_weights)
        return ops.log_prob(x, *parameters, self._factors(), slots, self._exact)

    def mixture(self) -> tuple[tuple[Tensor, Tensor, Tensor], ops.Woodbury]:
        """Returns means, loadings and noise variance, and their Woodbury terms."""
        return (self.means, self.loadings, self.noise_variance), self._factors()


def _screen(mfa: MFA, woodbury: ops.Woodbury) -> AnyScreen | None:
    """The mixture's screen; prepared here for a large mixture, where the rows of every token are read from memory."""
    if not woodbury.is_cpp:  # on a GPU a few tokens read all rows faster
        return None
    if not mfa.screened()[0] and pays_for_lone_tokens(woodbury):
        mfa.screen()
    return mfa.screened()[1]

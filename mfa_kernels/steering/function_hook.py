"""Steering as a plain function of hidden states, for frameworks that hold the hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_mixture
from mfa_kernels.common.modes import ordinary
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.steering.apply import Program, check_hidden
from mfa_kernels.steering.gates import Gates
from mfa_kernels.steering.interventions import as_rows


class SteeringFunction:
    """The function `intervene` with everything but x given, and prepared once instead of at each call.

        fn = SteeringFunction(mfa, Toward(17, 0.4))
        tl_model.run_with_hooks(tokens, fwd_hooks=[("blocks.8.hook_resid_post", fn)])        # TransformerLens
        with model.trace(prompt):                                                            # nnsight
            hidden = model.model.layers[8].output
            hidden[:] = fn(hidden)

    Every token of every call is steered, padding and the beginning of the sequence included: a framework's hook does
    not say which they are. Where that matters, or text is generated from a plain Hugging Face model, use `steer`.

    Args:
        mfa: a mixture of the activations at the hook; its parameters are read now.
        interventions, rows, gate, norm: as for `intervene`.
    """

    def __init__(
        self, mfa: MFA, interventions: Any = None, *, rows: Any = None, gate: Gates = None, norm: Any = None
    ) -> None:
        self._features = check_mixture(mfa).n_features
        with ordinary(), torch.no_grad():
            self._program = Program(mfa, as_rows(interventions, rows, mfa), mfa.means.device, gate, norm)

    def __call__(self, x: Tensor, hook: Any = None, step: int = 0) -> Tensor:
        """Returns x (..., D) after the interventions; differentiable in x.

        Args:
            x: (..., D); the first dimension is the batch where there are two or more.
            hook: the hook point, which TransformerLens passes; not used.
            step: generation step for an alpha that is a function.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        x = check_hidden(x, self._features, "x")
        if x.is_meta:
            raise ValueError("x must hold values, got a tensor on the meta device")
        if not x.numel():
            return x.clone()
        batch = x.shape[0] if x.dim() > 1 else 1
        return self._program(x.reshape(batch, -1, self._features), True, (step,)).hidden.reshape(x.shape)

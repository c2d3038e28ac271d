"""The screened scan with its gradients: ``torch.ops.mfa_kernels.screened_log_prob``.

Backward works on the active pairs and does not know how they were found: it is that of `mfa_kernels::log_prob`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.precision import no_tangents
from mfa_kernels.ops.common.register import operator
from mfa_kernels.ops.scan.op import PARAMETERS, gradients_of
from mfa_kernels.ops.scan.types import ActivePairs, activity_threshold
from mfa_kernels.ops.screen.op import scan
from mfa_kernels.ops.screen.types import AnyScreen, Screen, ScreenedPairs
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury


def log_prob(x: Tensor, parameters: Parameters, woodbury: Woodbury, screen: AnyScreen, slots: int) -> ScreenedPairs:
    """As `mfa_kernels.ops.scan.op.log_prob`, through the bounds; differentiable in x and the parameters.

    Args:
        x: (N, D), any float dtype.
        parameters: noise_variance (D,).
        woodbury: of these parameters.
        screen: of these parameters.
        slots: S, the most active components kept per token.
    """
    no_tangents("log_prob", x, *parameters)
    if not isinstance(screen, Screen):
        *active, dropped, evaluated = _Screened.apply(x, *parameters, woodbury, screen, slots)
        return ScreenedPairs(ActivePairs(*active), dropped, evaluated)
    *active, dropped, evaluated = torch.ops.mfa_kernels.screened_log_prob(
        x, *parameters, *woodbury.tensors(), *screen, slots
    )
    return ScreenedPairs(ActivePairs(*active), dropped, evaluated)


def _fake(given):
    return _screened(*vars(given).values())


@operator(
    "screened_log_prob",
    "(Tensor x, Tensor means, Tensor loadings, Tensor noise_variance, Tensor log_weights, Tensor rows, Tensor cholesky,"
    " Tensor log_det, Tensor scale, Tensor center, Tensor screen_center, Tensor basis, Tensor bound_rows,"
    " Tensor starts, Tensor terms, float exact_slack, int slots)"
    " -> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts, Tensor dropped, Tensor evaluated)",
    {"x": "any(N, D)", **PARAMETERS, "slots": "positive"},
    last=("x",),
    fake=_fake,
    gradient=gradients_of,
    saves=lambda inputs, output: (*inputs[:10], *output[:4]),
    devices=("CPU",),
)
def _screened(*given: Any) -> tuple[Tensor, ...]:
    x, means, _, _, log_weights, rows, _, _, scale, _, *screen, slots = given
    constants = Woodbury.of_tensors(*given[5:10]).constants(log_weights)
    threshold = activity_threshold(means.shape[0], means.dtype)
    return torch.ops.mfa_kernels.select_screened(x, rows, constants, scale, *screen, threshold, slots)


class _Screened(torch.autograd.Function):
    """The Triton scan with its gradients; eager only."""

    @staticmethod
    def forward(ctx, x, *given):
        *parameters, woodbury, screen, slots = given
        means, _, _, log_weights = parameters
        threshold = activity_threshold(len(means), means.dtype)
        active, dropped, evaluated = scan(x, woodbury, woodbury.constants(log_weights), screen, threshold, slots)
        ctx.save_for_backward(x, *parameters, *woodbury.tensors(), *active)
        ctx.mark_non_differentiable(active.components, active.counts, dropped, evaluated)
        return *active, dropped, evaluated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        return *gradients_of(ctx.saved_tensors, ctx.needs_input_grad, *gradients), None, None, None

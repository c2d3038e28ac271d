"""A bound on the error of log p(x): its rounding, and the components that were left out.

Derived in README.md, "The error of log p(x)".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from mfa_kernels.ops.scan.op import dense_logits
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.portable import CHUNK
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury

_DOUBT = 1e-3
"""Share of the rounding above which the rough bound on what was left out is replaced by one from every logit."""


@torch.no_grad()
def error_bound(
    x: Tensor, parameters: Parameters, woodbury: Woodbury, active: ActivePairs, dropped: Tensor | None = None
) -> Tensor:
    """Bound on |active.log_prob - log p(x)|, in nats: (N,) float64; NaN where log p(x) is.

    Args:
        x: (N, D), finite or not.
        parameters: those behind `woodbury`.
        woodbury: of these parameters.
        active: what `log_prob` or a screened scan found, with exact logits.
        dropped: of a screened scan, (N,): bound on the responsibility of what it never computed.
    """
    means, _, noise_variance, log_weights = parameters
    unit = torch.finfo(means.dtype).eps / 2
    rounding = _per_squared_residual(woodbury, x.shape[1], unit)
    x = x.to(means.dtype)
    scale = noise_variance.double().rsqrt()
    fixed = 4 * unit * (log_weights.abs() + x.shape[1] + woodbury.log_det.abs()).double()
    tokens, slots = (active.components >= 0).nonzero(as_tuple=True)
    k = active.components[tokens, slots].long()
    held = torch.zeros(active.components.shape, dtype=torch.float64, device=x.device)
    step = max(1, CHUNK // x.shape[1])
    for n, s, own in zip(tokens.split(step), slots.split(step), k.split(step)):
        v = (x[n].double() - means[own].double()) * (scale if scale.dim() == 1 else scale[own])
        held[n, s] = rounding * v.square().sum(-1) + fixed[own] + unit * active.logits[n, s].abs()
    worst = held.amax(-1)
    norms, radii = _norms(x, means, scale, woodbury.center)
    far = rounding * (norms + radii.max()).square() + fixed.max()
    overflows = active.counts > active.components.shape[1]  # active components that no slot holds
    worst = torch.where(overflows, torch.maximum(worst, far), worst)
    left_out = torch.finfo(means.dtype).eps * (far + worst).exp()
    doubtful = (left_out > _DOUBT * worst).nonzero().squeeze(-1)
    for n in doubtful.split(max(1, CHUNK // (4 * len(means)))):
        logits = dense_logits(x[n], woodbury, woodbury.constants(log_weights)).double()
        logits += rounding * (norms[n].unsqueeze(-1) + radii).square() + fixed
        logits -= (active.logits[n, 0].double() - worst[n]).unsqueeze(-1)
        held_here = active.components[n].long()
        held_here[held_here < 0] = len(means)  # a column that is cut off again
        logits = functional.pad(logits, (0, 1)).scatter_(1, held_here, -torch.inf)[:, :-1]
        left_out[n] = torch.minimum(left_out[n], logits.logsumexp(-1).exp())
    if dropped is not None:
        left_out = left_out + dropped
    log_prob = active.log_prob.double()
    bound = worst + left_out + unit * (2 * log_prob.abs() + active.components.shape[1] + 8)
    return bound.masked_fill(log_prob.isnan(), math.nan)


def _per_squared_residual(woodbury: Woodbury, features: int, unit: float) -> float:
    """Error of a logit per |v|^2, at most."""
    length, rank = features, woodbury.cholesky.shape[-1]
    if woodbury.backend == "cpp":  # the C++ kernels sum in lanes, and flush every 64 features
        length = max(66 + -(-features // 64), -(-features // woodbury.rows.shape[-1]) + 8)
    total = 1.01 * length * unit
    explained = (5 * unit + total) * math.sqrt(rank)
    return 0.5 * (8 * unit + total + 2 * explained + explained**2 + (rank + 2) * unit)


def _norms(x: Tensor, means: Tensor, scale: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds on |lam (x - c)|, (N,), and on |lam (mu_k - c)|, (K,): |v| is at most their sum."""
    center = center.double()
    widest = scale if scale.dim() == 1 else scale.amax(0)
    step = max(1, CHUNK // x.shape[1])
    norms = [((part.double() - center) * widest).norm(dim=-1) for part in x.split(step)]
    parts = zip(means.split(step), scale.expand(means.shape).split(step))
    return torch.cat(norms), torch.cat([((m.double() - center) * s).norm(dim=-1) for m, s in parts])

"""How far the statistics of one component are from float64: what `mfa_kernels.ops.common.first_use` asks."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.ops.common.first_use import worst
from mfa_kernels.ops.pairs.spot_check import busiest, some_components
from mfa_kernels.ops.statistics import portable
from mfa_kernels.ops.statistics.types import Sums
from mfa_kernels.ops.woodbury.types import Woodbury

_ALLOWED = 256 * 2.0**-23  # of the root of what the squares of the two factors add up to


def of_sums(
    x: Tensor, components: Tensor, weights: Tensor, woodbury: Woodbury, out: Sums, before: Sums
) -> float | None:
    """The largest error of what was added to `before` over what is allowed, in one component."""
    slots = components.shape[1]
    flat, weight = components.flatten(), weights.flatten()
    k, own = busiest(flat, weight != 0, len(woodbury.rows))
    if not len(own) or not weight.isfinite().all():
        return None
    terms = some_components(woodbury, torch.tensor([k], device=flat.device))
    tokens = torch.div(own, slots, rounding_mode="floor")
    shared = {"squares"} if not woodbury.per_component else set()  # of all components
    parts = zip(Sums._fields, out, strict=True)
    sums = Sums(*(torch.zeros_like(part if name in shared else part[k : k + 1]) for name, part in parts))
    index = torch.zeros(len(own), 1, dtype=torch.int32, device=flat.device)
    portable.accumulate(x[tokens].double(), index, weight[own].double().unsqueeze(1), terms, sums)
    mass, squares = sums.mass.abs().sum(), sums.second[0].diagonal().sum().abs()
    lengths = ((x[tokens].double() - terms.rows[0, 0]).square().sum(1) * weight[own].abs().double()).sum()
    sizes = {
        "mass": mass, "shift": (mass * lengths).sqrt(), "latent": (mass * (squares + mass)).sqrt(), "second": squares,
        "cross": (lengths * (squares + mass)).sqrt(), "squares": lengths,
    }  # fmt: skip
    errors = [0.0]
    for name, found, old, expected in zip(Sums._fields, out, before, sums):
        if name in shared:
            continue
        gap = (found[k] - old[k] - expected[0]).norm()
        errors.append(worst(gap, torch.zeros_like(gap), _ALLOWED * (sizes[name] + 1e-30)))
    return max(errors)

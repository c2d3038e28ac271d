"""Latents for `Offset`: drawn from the prior, or quantiles of those of a region's activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.checks import (
    check_component,
    check_floats,
    check_generator,
    check_integer,
    check_mixture,
    check_number,
)
from mfa_kernels.common.modes import door
from mfa_kernels.data.source import as_source
from mfa_kernels.mixture.mfa import MFA

BATCH = 8192  # rows that are assigned at once


def prior_latents(mfa: MFA, rows: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Returns latents drawn from the prior of every region, z ~ N(0, I): (R,), or (rows, R) with one per batch row.

    Args:
        mfa: the mixture.
        rows: the number of batch rows; None for a single vector.
        generator: a seeded generator on the device of the result; None draws from the CPU's global one.
    """
    check_mixture(mfa)
    check_generator(generator)
    shape = (mfa.rank,) if rows is None else (check_integer(rows, "rows"), mfa.rank)
    device = "cpu" if generator is None else generator.device
    dtype = torch.float64 if mfa.means.dtype == torch.float64 else torch.float32
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


@door
@torch.no_grad()
def latent_quantiles(mfa: MFA, activations: Any, component: int, q: float | Sequence[float] | Tensor) -> Tensor:
    """Returns quantiles of a region's observed latents, axis by axis.

    The latents are E[z | x, k] of the activations for which the region is the most responsible one.

    Args:
        mfa: the mixture.
        activations: anything `fit` takes, (N, D). Rows that are not finite belong to no region.
        component: k.
        q: in [0, 1]; a number, or (Q,) of them.

    Returns:
        (R,) for a number, else (Q, R).

    Raises:
        ValueError: the width or q does not fit, or the region owns none of the activations.
    """
    k = check_component(component, check_mixture(mfa).n_components)
    wanted = (check_floats(q, "q") if is_several(q) else torch.tensor(check_number(q, "q"))).double()
    if wanted.dim() > 1 or not ((wanted >= 0) & (wanted <= 1)).all():
        raise ValueError(f"q must be a number in [0, 1] or a vector of them, got {q!r}")
    source = as_source(activations)
    if source.n_features != mfa.n_features:
        raise ValueError(f"activations have {source.n_features} features, but the mixture has {mfa.n_features}")
    found = []
    for start in range(0, len(source), BATCH):
        x = source.chunk(start, min(start + BATCH, len(source))).to(mfa.means.device)
        own = x[mfa.assign(x) == k]
        found.append(mfa.posterior(own, k)[0])
    observed = torch.cat(found) if found else mfa.means.new_empty(0, mfa.rank)
    if not len(observed):
        raise ValueError(f"component {k} is the most responsible one for none of the {len(source)} activations")
    # torch.quantile takes at most 2^24 numbers.
    ordered = observed.sort(0).values
    at = wanted.to(ordered.device) * (len(ordered) - 1)
    low, high = at.floor().long(), at.ceil().long()
    return torch.lerp(ordered[low], ordered[high], (at - low).to(ordered).unsqueeze(-1))

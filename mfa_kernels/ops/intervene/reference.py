"""Steering of one token at a time, in float64, from the parameters and by the definitions: the oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def latents(x: Tensor, mean: Tensor, loadings: Tensor, noise_variance: Tensor) -> Tensor:
    """E[z | x, k] = W^T C^-1 (x - mu), C = W W^T + Psi: x, mean and noise_variance (D,), loadings (D, R) -> (R,)."""
    covariance = loadings @ loadings.mT + noise_variance.diag()
    return loadings.mT @ torch.linalg.solve(covariance, x - mean)


def passes(kind: int, responsibility: float, log_prob: float, threshold: float) -> bool:
    """True where a gate lets a token through; none lets one through that is not finite."""
    if kind == 0:  # no gate
        return True
    if kind == 5 or math.isnan(log_prob):  # a row that is left alone
        return False
    value = responsibility if kind in (1, 2) else log_prob
    return (value > threshold) == (kind in (1, 3))


def steered(
    x: Tensor,
    coefficients: Tensor,
    shift: Tensor,
    latents_given: Tensor | None,
    keeps_norm: bool,
    components: Tensor | None = None,
    responsibilities: Tensor | None = None,
    parameters: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """scale x + shift + sum_k r_k (weight mu_k + W_k (z + spread E[z | x, k])), with the norm of x if it is kept: (D,).

    Args:
        x, shift: (D,).
        coefficients: scale, weight, spread.
        latents_given: z, (R,), or None.
        components, responsibilities: (C,), those of the active components; -1 marks an empty slot.
        parameters: means (K, D), loadings (K, D, R), noise_variance (D,) or (K, D); None where nothing depends on r.
    """
    scale, weight, spread = (float(c) for c in coefficients)
    out = scale * x + shift
    if parameters is not None and components is not None and responsibilities is not None:
        means, loadings, noise = parameters
        if responsibilities.isnan().any():
            return torch.full_like(x, math.nan)
        for k, r in zip(components.tolist(), responsibilities.tolist()):
            if k < 0:
                continue
            z = spread * latents(x, means[k], loadings[k], noise.expand_as(means)[k])
            z = z if latents_given is None else z + latents_given
            out = out + r * (weight * means[k] + loadings[k] @ z)
    if keeps_norm and out.norm() > 0:
        out = out * (x.norm() / out.norm())
    return out

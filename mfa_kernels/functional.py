"""Log-densities without a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfa_kernels import ops
from mfa_kernels.checks import check_activations, check_choice, check_parameters
from mfa_kernels.ops.precision import no_autocast
from mfa_kernels.ops.select import reference

PRECISIONS = ("exact", "fast", "reference")


def log_prob(
    x: Tensor,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
    *,
    center: Tensor | None = None,
    precision: str = "exact",
) -> Tensor:
    """log p(x) under a mixture of factor analyzers, fused; differentiable in the first five arguments.

        p(x) = sum_k exp(log_weights_k) N(x; means_k, loadings_k loadings_k^T + diag(noise_variance))

    (arXiv 2602.02464, eq. 5-7.) Nothing of size N x K is formed.

    Args:
        x: (..., D), any float dtype.
        means: (K, D). The mixture's dtype is that of the parameters; bfloat16 and float16 compute in float32.
        loadings: (K, D, R), R >= 0.
        noise_variance: (D,), or (K, D) for noise per component; positive.
        log_weights: (K,), normalised: logsumexp is 0.
        center: (D,), subtracted from x and means; changes no result, saves digits where magnitudes are large.
        precision: "exact" (agrees with float64 to the rounding of the dtype), "fast" (on a GPU without the exact
            recompute: logits are off by the rounding of fp16 operands, tenths of a nat; the same on the CPU), or
            "reference" (the plain formula, dense, in the dtype of the parameters: nearly collinear loadings take a QR
            decomposition in place of the Cholesky one, so that none is refused; `ops/factors/README.md`).

    Returns:
        (...), natural logarithms.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    means, loadings, noise_variance, log_weights = check_parameters(means, loadings, noise_variance, log_weights)
    x = check_activations(x, means.shape[1], means.device)
    check_choice(precision, PRECISIONS, "precision")
    means, loadings, noise_variance, log_weights = compute_dtype(means, loadings, noise_variance, log_weights)
    flat = x.reshape(-1, x.shape[-1])
    if precision == "reference":
        with no_autocast(means):
            out = reference.log_prob(flat.to(means.dtype), means, loadings, noise_variance, log_weights)
        return out.reshape(x.shape[:-1])
    center = torch.zeros_like(means[0]) if center is None else _checked_center(center, means)
    factors = ops.factorize(means, loadings, noise_variance, center)
    active = ops.log_prob(flat, means, loadings, noise_variance, log_weights, factors, exact=precision != "fast")
    return active.log_prob.reshape(x.shape[:-1])


def _checked_center(center: Any, means: Tensor) -> Tensor:
    center = check_activations(center, means.shape[1], means.device, "center")
    if center.dim() != 1:
        raise ValueError(f"center must have shape (D,) = ({means.shape[1]},), got {tuple(center.shape)}")
    return center


def compute_dtype(*parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters as float32 or float64: half precisions cannot carry a Cholesky factor."""
    return tuple(p if p.dtype == torch.float64 else p.float() for p in parameters)

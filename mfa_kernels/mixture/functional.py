"""Log-densities without a module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfa_kernels import ops
from mfa_kernels.common.checks import check_activations, check_choice, check_parameters
from mfa_kernels.common.precision import no_autocast
from mfa_kernels.ops.scan import reference

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
        noise_variance: (D,), or (K, D) for noise per component; positive and finite.
        log_weights: (K,), logarithms of weights that add up to 1 (logsumexp is 0), as `log_softmax` makes them. A part
            of a mixture may be given with its weights in the whole, which add up to less: the logsumexp over the parts
            is the log-density of the whole.
        center: (D,), subtracted from x and means; changes no result, saves digits where magnitudes are large.
        precision: "exact" (agrees with float64 to the rounding of the dtype), "fast" (on a GPU without the exact
            recompute: logits are off by the rounding of fp16 operands, tenths of a nat; the same on the CPU), or
            "reference" (the plain formula, dense, in the dtype of the parameters: nearly collinear loadings take a QR
            decomposition in place of the Cholesky one, so that none is refused; `ops/woodbury/README.md`).

    Returns:
        (...), natural logarithms.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. The values of noise_variance and log_weights are
            checked on a CPU alone, and not under torch.compile or vmap: elsewhere asking for them would wait for the
            device. What does not fit gives NaN there, or the density times the sum of the weights.
    """
    means, loadings, noise_variance, log_weights = check_parameters(means, loadings, noise_variance, log_weights)
    flat, lead = flattened(x, means.shape[1], means.device)
    check_choice(precision, PRECISIONS, "precision")
    if means.is_cpu and not torch.compiler.is_compiling():
        _check_values(noise_variance.detach(), log_weights.detach())
    means, loadings, noise_variance, log_weights = compute_dtype(means, loadings, noise_variance, log_weights)
    if precision == "reference":
        return plain(reference.log_prob, flat, means, loadings, noise_variance, log_weights).reshape(lead)
    center = torch.zeros_like(means[0]) if center is None else _checked_center(center, means)
    woodbury = ops.factorize(means, loadings, noise_variance, center)
    active = ops.log_prob(flat, means, loadings, noise_variance, log_weights, woodbury, exact=precision != "fast")
    return active.log_prob.reshape(lead)


def flattened(x: Any, features: int, device: torch.device) -> tuple[Tensor, torch.Size]:
    """Returns tokens (N, D) of x (..., D), and the shape before D; raises where x is not of this width and device."""
    x = check_activations(x, features, device)
    return x.reshape(-1, features), x.shape[:-1]


def plain(formula: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """Returns what a formula of `mfa_kernels.ops.scan.reference` makes of x (N, D), in the dtype of the parameters."""
    with no_autocast(x):
        return formula(x.to(parameters[0].dtype), *parameters)


def _check_values(noise_variance: Tensor, log_weights: Tensor) -> None:
    """Raises for a noise variance that is none, and for weights of more than the whole, as weights that are no
    logarithms are (their logsumexp is at least 1)."""
    try:
        least, most = map(float, noise_variance.aminmax())
        total = float(log_weights.double().logsumexp(0))
    except RuntimeError:  # batched by vmap, or fake: nothing there to look at
        return
    if not 0 < least <= most < math.inf:
        raise ValueError(f"noise_variance must be positive and finite, got values from {least:g} to {most:g}")
    # The rounding of each logarithm, and steps of finite differences.
    allowed = torch.finfo(log_weights.dtype).eps * math.log(len(log_weights)) + 1e-3
    if not -math.inf < total <= allowed:
        raise ValueError(
            f"log_weights must be logarithms of weights that add up to at most 1, got a logsumexp of {total:g}: "
            "log_softmax makes them of logits, log of weights"
        )


def _checked_center(center: Any, means: Tensor) -> Tensor:
    center = check_activations(center, means.shape[1], means.device, "center")
    if center.dim() != 1:
        raise ValueError(f"center must have shape (D,) = ({means.shape[1]},), got {tuple(center.shape)}")
    return center


def compute_dtype(*parameters: Tensor) -> tuple[Tensor, ...]:
    """The parameters as float32 or float64: half precisions cannot carry a Cholesky factor."""
    return tuple(p if p.dtype == torch.float64 else p.float() for p in parameters)

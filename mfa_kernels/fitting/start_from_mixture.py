"""A start from a mixture that is given: `fit` continues from its parameters, and leaves it as it is."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_finite, check_integer
from mfa_kernels.fitting.checkpoint import fingerprint
from mfa_kernels.mixture.mfa import MFA

_NOISE_FLOOR = 1e-6  # share of the median noise variance, for a mixture without a floor
_LEAST_WEIGHT = 64.0  # nats below the largest: next to nothing, and a logarithm that can be added up


def blank_mixture(
    components: int, features: int, rank: int, noise: str, precision: str, device: torch.device, dtype: torch.dtype
) -> MFA:
    """A mixture whose parameters are yet to be written: to initialise them would draw from the global generator."""
    return torch.nn.utils.skip_init(
        MFA, components, features, rank, noise, precision=precision, device=device, dtype=dtype
    )


def shape_given(
    start: MFA | None, n_components: int | None, rank: int | None, noise: str | None, others: dict[str, bool]
) -> tuple[Any, Any, Any]:
    """K, R and the kind of noise of a fit: as they are given, else those of the start, else the defaults.

    Args:
        start: the mixture to begin with.
        n_components, rank, noise: as `fit` got them.
        others: by name, whether an argument that speaks of another start was given.

    Raises:
        TypeError, ValueError: naming what is no mixture, holds no values, or differs from the start.
    """
    if start is None:
        if n_components is None:
            raise TypeError("n_components must be an integer, or be left to a start, got neither of the two")
        return n_components, 10 if rank is None else rank, "shared" if noise is None else noise
    _check(start)
    for name, given in others.items():
        if given:
            raise ValueError(f"{name} must be left out beside start, which is where training begins")
    for name, value in (("n_components", n_components), ("rank", rank)):
        if value is not None and check_integer(value, name) != getattr(start, name):
            raise ValueError(f"{name} must be that of start, {getattr(start, name)}, or left out, got {value}")
    if noise is not None and noise != start.noise:
        raise ValueError(f"noise must be that of start, {start.noise!r}, or left out, got {noise!r}")
    return start.n_components, start.rank, start.noise


def _check(start: Any) -> None:
    if not isinstance(start, MFA):
        raise TypeError(f"start must be a mixture (mfa_kernels.MFA), got {type(start).__name__}")
    for name, tensor in start.named_parameters():
        if tensor.is_meta:
            raise ValueError(f"start must hold values, got {name} on the meta device")
    with torch.no_grad():
        for name in ("means", "loadings", "noise_variance"):
            check_finite(getattr(start, name), f"start.{name}")
        if not (start.noise_variance > 0).all():
            raise ValueError("start.noise_variance must be positive, got 0 in some dimension")
        if start.log_weights.isnan().any():  # -inf is a region of weight 0
            raise ValueError("start.weight_logits must have a softmax, got one that is NaN")


def fingerprint_of(start: MFA | None) -> str | None:
    """A fingerprint of all that the density depends on; None without a start."""
    if start is None:
        return None
    parts = " ".join(fingerprint(tensor) for tensor in start.state_dict().values())
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


@torch.no_grad()
def start_from_mixture(start: MFA, precision: str, dtype: torch.dtype, device: torch.device) -> MFA:
    """A copy to train: of the given precision and dtype, on the device, with gradients, and `extra` as it was.

    Its density is that of the start. The centre, which changes no result, becomes the mean of the mixture. A mixture
    without a noise floor gets one below all of its noise, so that no dimension collapses in training; and a region of
    weight 0 a weight that is next to nothing, as a prior on weights has no density at 0.
    """
    shape = start.n_components, start.n_features, start.rank, start.noise
    mfa = blank_mixture(*shape, precision, device, dtype)
    for name, parameter in mfa.named_parameters():
        parameter.copy_(start.get_parameter(name))
    mfa.noise_floor = start.noise_floor
    if not start.noise_floor:
        noise = mfa.noise_variance.double()
        mfa.noise_floor = min(_NOISE_FLOOR * float(noise.median()), float(noise.min()) / 2)
        mfa.log_noise.copy_((noise - mfa.noise_floor).log())
    logits = mfa.weight_logits
    logits.clamp_(min=float(logits.max()) - _LEAST_WEIGHT)
    mfa.center.copy_(_mean(mfa))
    for name in ("means", "loadings", "noise_variance"):
        check_finite(getattr(mfa, name), f"start.{name} in {dtype}")
    mfa.extra = copy.deepcopy(start.extra)
    return mfa


def _mean(mfa: MFA) -> Tensor:
    return mfa.log_weights.double().exp() @ mfa.means.double()

"""Argument checks whose messages name the argument, what was found and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


def check_activations(x: Tensor, features: int, device: torch.device, name: str = "x") -> Tensor:
    """`x` as a tensor of shape (..., D), float, on the device of the parameters; raises otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name} must have shape (..., {features}), got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the mixture is on {device}: move one of them")
    return x


def check_parameters(means: Tensor, loadings: Tensor, noise_variance: Tensor, log_weights: Tensor) -> None:
    """Raises unless the four parameters of a mixture fit together."""
    named = {
        "means": means,
        "loadings": loadings,
        "noise_variance": noise_variance,
        "log_weights": log_weights,
    }
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
        if tensor.device != means.device:
            raise ValueError(f"{name} is on {tensor.device}, but means is on {means.device}")
        if tensor.dtype != means.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but means is {means.dtype}")
    if means.dim() != 2 or 0 in means.shape:
        raise ValueError(f"means must have shape (K, D) with K, D >= 1, got {tuple(means.shape)}")
    components, features = means.shape
    if loadings.dim() != 3 or loadings.shape[:2] != (components, features):
        raise ValueError(
            f"loadings must have shape (K, D, R) = ({components}, {features}, R), got {tuple(loadings.shape)}"
        )
    if loadings.shape[2] > features:
        raise ValueError(f"loadings have rank {loadings.shape[2]}, more than the {features} features")
    if noise_variance.shape not in ((features,), (components, features)):
        raise ValueError(
            f"noise_variance must have shape (D,) = ({features},) or (K, D) = ({components}, {features}), "
            f"got {tuple(noise_variance.shape)}"
        )
    if log_weights.shape != (components,):
        raise ValueError(f"log_weights must have shape (K,) = ({components},), got {tuple(log_weights.shape)}")


def check_component(component: int, components: int, name: str = "component") -> int:
    """`component` as an int in [0, K); raises otherwise."""
    if not 0 <= int(component) < components:
        raise IndexError(f"{name} must be in [0, {components}), got {int(component)}")
    return int(component)


def check_choice(value: str, choices: tuple[str, ...], name: str) -> str:
    """`value` if it is one of `choices`; raises otherwise."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value

"""What all operators share: they compute in the dtype of the parameters, and have one derivative."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(like: Tensor) -> torch.autocast:
    """Autocast off on the device of `like`: a bfloat16 product would lose what the exact policy promises."""
    return torch.autocast(like.device.type, enabled=False)


def once_differentiable(name: str) -> None:
    """Makes a second derivative through mfa_kernels::`name`, a backward operator, an error instead of silent zeros."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"mfa_kernels::{name} has no second derivative: use precision='reference' for one")

    torch.library.register_autograd(f"mfa_kernels::{name}", refuse, setup_context=lambda ctx, inputs, output: None)

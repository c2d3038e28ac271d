"""Steering a language model with a mixture: interventions as values, and hooks that apply them while it runs.

interventions   what to do to an activation: `Toward` a region (eq. 14), `Offset` inside it (eq. 15), `Add` a vector,
                `Reconstruct`, `Remove`
composition     a list of them folded into one affine map per batch row
gates           where to act: `Responsibility`, `LogDensity`, and what `&`, `|`, `~` make of them
active_pairs    the active components of a token, for gates and for what depends on responsibilities
latents         latents to give: drawn from the prior, or quantiles of those observed in a region
apply           that map on hidden states; `intervene` for any framework
tracking        where in its sequence each token of a forward pass is, under a KV cache and padding
arguments       the arguments of a forward pass, recognised by their kind, not by their names
generation      calls to `generate` while they run
compiled        compiled code is compiled again when hooks come or go
positions       which tokens are meant
handle          `steer`: the hooks, their updating, removal and counts
function_hook   the same as a function for TransformerLens hooks and nnsight
paper_api       `MFASteerer`, the method names of the paper's code
interactive     commands that change the steering while text streams
calibration     `alpha_for_kl`: how far to steer for a given change of the next-token distribution
"""

from typing import TYPE_CHECKING

from mfa_kernels.common.moved import renamed
from mfa_kernels.steering.apply import intervene
from mfa_kernels.steering.calibration import alpha_for_kl
from mfa_kernels.steering.function_hook import SteeringFunction
from mfa_kernels.steering.gates import Gate, LogDensity, Responsibility
from mfa_kernels.steering.handle import Handle, Stats, steer
from mfa_kernels.steering.interventions import Add, Offset, Reconstruct, Remove, Toward
from mfa_kernels.steering.latents import latent_quantiles, prior_latents
from mfa_kernels.steering.paper_api import MFASteerer
from mfa_kernels.steering.tracking import LostTrackError

__all__ = [
    "Add",
    "Gate",
    "Handle",
    "LogDensity",
    "LostTrackError",
    "MFASteerer",
    "Offset",
    "Reconstruct",
    "Remove",
    "Responsibility",
    "Stats",
    "SteeringFunction",
    "Toward",
    "alpha_for_kl",
    "intervene",
    "latent_quantiles",
    "prior_latents",
    "steer",
]

if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, Function="SteeringFunction")

"""Steering a language model with a mixture: interventions as values, and hooks that apply them while it runs.

interventions   what to do to an activation: `Toward` a region (eq. 14), `Offset` inside it (eq. 15)
composition     a list of them folded into one affine map per batch row
apply           that map on hidden states; `intervene` for any framework
tracking        where in its sequence each token of a forward pass is, under a KV cache and padding
positions       which tokens are meant
handle          `steer`: the hooks, their updating, removal and counts
"""

from mfa_kernels.steering.apply import intervene
from mfa_kernels.steering.handle import Handle, Stats, steer
from mfa_kernels.steering.interventions import Offset, Toward

__all__ = ["Handle", "Offset", "Stats", "Toward", "intervene", "steer"]

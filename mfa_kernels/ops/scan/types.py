"""The active pairs that the scan finds; the number of slots per token; the threshold of activity."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SLOTS = 16
"""Active components kept per token; the mixture that `mfa-kernels demo` fits has about one (README)."""


class ActivePairs(NamedTuple):
    """log p(x) and the active pairs, largest responsibility first.

    Attributes:
        log_prob: (N,).
        components: (N, S) int32; -1 marks an empty slot.
        logits: log pi_k + log p(x | k), (N, S); -inf in an empty slot.
        counts: (N,) int32, active components; S + 1 where they overflow the slots (the S largest are kept, and
            log_prob is exact all the same).
    """

    log_prob: Tensor
    components: Tensor
    logits: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, tokens: int, slots: int, like: Tensor) -> ActivePairs:
        """Room for N = `tokens`, to be written, in the dtype and on the device of `like`."""
        return cls(
            like.new_empty(tokens),
            like.new_empty(tokens, slots, dtype=torch.int32),
            like.new_empty(tokens, slots),
            like.new_empty(tokens, dtype=torch.int32),
        )

    def responsibilities(self) -> Tensor:
        """p(k | x) of the slots, (N, S); 0 in an empty one, NaN for a token that is not finite."""
        # The softmax normalises over the slots: at thousands of nats log_prob's own rounding would cost four digits.
        # Only a token that overflows needs log_prob, since its slots do not hold all that is active.
        of_all = (self.logits - self.log_prob.unsqueeze(-1)).exp()
        is_full = (self.counts > self.components.shape[1]).unsqueeze(-1)
        return torch.where(is_full, of_all, self.logits.softmax(-1))

    def responsibility(self, component: int | Tensor) -> Tensor:
        """p(component | x), (N,), for one component or one per token (N, 1)."""
        return (self.responsibilities() * (self.components == component)).sum(-1)


def activity_threshold(components: int, dtype: torch.dtype) -> float:
    """Nats below the best logit at which a component stops being active: all that are not weigh < eps together."""
    return math.log(components) - math.log(torch.finfo(dtype).eps)

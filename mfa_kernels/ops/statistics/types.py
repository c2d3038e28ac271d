"""The sufficient statistics of EM."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """The statistics that the operator adds to, as `SufficientStatistics` describes them."""

    mass: Tensor
    shift: Tensor
    latent: Tensor
    second: Tensor
    cross: Tensor
    squares: Tensor


@dataclass(frozen=True)
class SufficientStatistics:
    """Sums over the active pairs (n, k) of weight w = r_nk (times the token's weight), all float64.

    With y = x_n - mu_k and z = E[z | x_n, k], under the parameters that made them. Statistics of two batches, or of
    two shards of the data, under the same parameters add up (`+`).

    Attributes:
        mass: sum w, (K,).
        shift: sum w y, (K, D).
        latent: sum w z, (K, R).
        second: sum w (z z^T + M_k^-1) = sum w E[z z^T], (K, R, R).
        cross: sum w z y^T, (K, R, D).
        squares: sum w y^2, (D,) over all components where they share the noise, else (K, D).
        log_likelihood: sum over the tokens of log p(x), times their weight, ().
    """

    mass: Tensor
    shift: Tensor
    latent: Tensor
    second: Tensor
    cross: Tensor
    squares: Tensor
    log_likelihood: Tensor

    @classmethod
    def zeros(cls, means: Tensor, rank: int, per_component: bool) -> SufficientStatistics:
        """The statistics of no token, for means (K, D), on their device."""
        (components, features), device = means.shape, means.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            zeros(components),
            zeros(components, features),
            zeros(components, rank),
            zeros(components, rank, rank),
            zeros(components, rank, features),
            zeros(components, features) if per_component else zeros(features),
            zeros(),
        )

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        return SufficientStatistics(*(a + b for a, b in zip(self.tensors(), other.tensors())))

    def scale_(self, factor: float) -> None:
        """Multiplies them all by a factor, in place."""
        for tensor in self.tensors():
            tensor.mul_(factor)

    def move_(self, change: Tensor) -> None:
        """Makes them sums about other means, mu_k + change_k (K, D): y becomes y - change. Latents stay as they are."""
        weighted = self.mass.unsqueeze(-1) * change
        squares = change * (weighted - 2 * self.shift)
        self.squares.add_(squares if self.squares.dim() == 2 else squares.sum(0))
        self.shift.sub_(weighted)
        self.cross.addcmul_(self.latent.unsqueeze(-1), change.unsqueeze(1), value=-1)

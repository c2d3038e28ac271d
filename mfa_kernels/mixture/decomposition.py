"""The protocol of a decomposition of activations, which mixtures and K-means meet."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from mfa_kernels.mixture.codes import Code


@runtime_checkable
class Decomposition(Protocol):
    """K components of activations of width D, each with R local directions.

    `MFA`, `ShardedMFA` and the result of `kmeans` are decompositions. Interpretation and evaluation ask for no more
    wherever this is enough; what needs densities or posteriors asks for a mixture.
    """

    @property
    def n_components(self) -> int:
        """K."""

    @property
    def n_features(self) -> int:
        """D."""

    def assign(self, x: Tensor) -> Tensor:
        """The component that each token belongs to: (..., D) -> (...) int64; -1 for a token that is not finite."""

    def code(self, x: Tensor, top_k: int | None = 8) -> Code:
        """The components that make up each token, and the latents inside them.

        Args:
            x: (..., D), any float dtype.
            top_k: most components per token; None keeps every one that matters.

        Returns:
            components (..., C) int64, the largest responsibility first, responsibilities (..., C), latents
            (..., C, R) and dropped (...).
        """

    def decode(self, code: Code) -> Tensor:
        """The activations that a code stands for: (..., D), in the dtype of the decomposition."""

    def directions(self, k: int) -> Tensor:
        """The local directions of component k: (R, D), on the device and in the dtype of the decomposition; R may be
        0."""


_MEMBERS = ("n_components", "n_features", "assign", "code", "decode", "directions")


def check_decomposition(value: Any, name: str = "mfa") -> Any:
    """Returns `value` if it meets the protocol; raises TypeError, naming what is missing, otherwise."""
    if isinstance(value, Decomposition):
        return value
    missing = [part for part in _MEMBERS if not hasattr(value, part)]
    lacks = f"{type(value).__name__}, which has no {', '.join(missing)}"
    raise TypeError(f"{name} must be a mixture (mfa_kernels.MFA) or another decomposition, got {lacks}")

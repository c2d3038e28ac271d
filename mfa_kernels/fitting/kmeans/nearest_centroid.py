"""Centroids as a decomposition of activations: the nearest one, with no directions of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_component
from mfa_kernels.mixture.codes import Code, checked_code
from mfa_kernels.mixture.functional import flattened
from mfa_kernels.ops.kmeans.op import nearest


class NearestCentroid:
    """Meets `mfa_kernels.mixture.decomposition.Decomposition`, with K = `len(centroids)` and R = 0.

    Attributes:
        centroids: (K, D), float32 or float64.
    """

    centroids: Tensor

    @property
    def n_components(self) -> int:
        """K."""
        return self.centroids.shape[0]

    @property
    def n_features(self) -> int:
        """D."""
        return self.centroids.shape[1]

    @torch.no_grad()
    def assign(self, x: Tensor) -> Tensor:
        """The nearest centroid: (..., D) -> (...) int64; -1 for a token that is not finite."""
        flat, lead = flattened(x, self.n_features, self.centroids.device)
        center = self.centroids.mean(0)  # less it, the squares of distances keep their digits
        owner, _ = nearest(flat, self.centroids - center, center)
        return owner.masked_fill(owner == self.n_components, -1).reshape(lead)

    def code(self, x: Tensor, top_k: int | None = 8) -> Code:
        """The nearest centroid with responsibility 1, (..., 1), and latents (..., 1, 0); NaN for a token that is not
        finite. A larger `top_k` changes nothing."""
        components = self.assign(x).unsqueeze(-1)
        ones = torch.ones(components.shape, dtype=self.centroids.dtype, device=self.centroids.device)
        responsibilities = ones.masked_fill(components < 0, torch.nan)
        return Code(components, responsibilities, ones.new_empty(*ones.shape, 0), responsibilities.squeeze(-1) - 1)

    def decode(self, code: Code) -> Tensor:
        """sum_k r_k mu_k: (..., D), the centroid itself for a code of `code`."""
        code = checked_code(code, 0, self.centroids.device)
        centroids = self.centroids[code.components.clamp_min(0)]
        return (code.responsibilities.to(centroids.dtype).unsqueeze(-1) * centroids).sum(-2)

    def directions(self, k: int) -> Tensor:
        """No local directions: (0, D)."""
        check_component(k, self.n_components)
        return self.centroids.new_empty(0, self.n_features)

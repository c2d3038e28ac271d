"""A mixture as a featurizer: what interchange interventions swap between a base and a source activation.

A base x_b and a source x_s are taken apart into features and an error, the features that a mask names are taken from
the source, and the activation is put together again with the base's error. Features are the coefficients of the paper's
dictionary, r_k of mu_k and r_k z_k of the columns of W_k (arXiv 2602.02464, eq. 11-13), so that

    x' = x_b + sum_k m_k (r_k^s - r_k^b) mu_k + sum_kj m_kj ((r z)_kj^s - (r z)_kj^b) W_k,:,j

Only the active pairs of both enter: once their codes are known, `MFAFeaturizer.interchange` costs the same for 64
regions and for 32,768 (bench/bench_interchange.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.common.checks import check_activations, check_choice, check_floats, check_tensor
from mfa_kernels.mixture.codes import Code
from mfa_kernels.mixture.decomposition import check_decomposition

MODES = ("centroids", "regions", "columns")


class MFAFeaturizer:
    """Features of activations by a mixture, or another decomposition, and interchanges of them.

    Args:
        mfa: the mixture; or what meets the protocol of a `Decomposition`, such as the result of `kmeans`.
        mode: what a mask chooses among. "centroids": r_k, the K coefficients of centroids; what varies inside a region
            stays in the error. "regions": a gate for each mu_k and one for each W_k, which does not depend on how W_k
            is rotated. "columns": a gate for each mu_k and each column of W_k; choose a rotation first
            (`mfa.rotate`).

    Attributes:
        n_features: features of an activation: K, or K (1 + R) in the order [r_k, r_k z_k] for k = 0, 1, ...
        n_masked: entries of a mask: K; 2 K, the gates of all mu_k and then those of all W_k; or K (1 + R), as features.
    """

    def __init__(self, mfa: Any, mode: str = "regions") -> None:
        self.mfa, self.mode = check_decomposition(mfa), check_choice(mode, MODES, "mode")
        self.n_components, self.rank = mfa.n_components, len(mfa.directions(0))
        whole = self.n_components * (1 + self.rank)
        self.n_features = self.n_components if mode == "centroids" else whole
        self.n_masked = {"centroids": self.n_components, "regions": 2 * self.n_components, "columns": whole}[mode]

    def code(self, x: Any) -> Code:
        """The active pairs of x (..., D): what `interchange` takes in place of computing it again."""
        return self.mfa.code(x, top_k=None)

    def featurize(self, x: Any) -> tuple[Tensor, Tensor]:
        """Returns features (..., K) or (..., K (1 + R)), and the error x - inverse(features), (..., D).

        Dense; for many regions, `interchange` needs neither.
        """
        code = self.code(x)
        features = code.to_dense(self.n_components)
        if self.mode == "centroids":
            features = features[..., :: 1 + self.rank]
        return features, self._checked(x, "x").to(features) - self._decoded(features)

    def inverse(self, features: Any, error: Any) -> Tensor:
        """Returns the activations (..., D) of features and an error, as `featurize` returns them."""
        features = check_floats(features, "features")
        if features.shape[-1] != self.n_features:
            raise ValueError(f"features must have {self.n_features} entries, got shape {tuple(features.shape)}")
        return self._decoded(features) + self._checked(error, "error").to(features)

    def mixed(self, base: Tensor, source: Tensor, mask: Any) -> Tensor:
        """Returns the features of a base with those that a mask names from a source."""
        return base + self._by_feature(self._checked_mask(mask).to(base)) * (source - base)

    def interchange(
        self, base: Any, source: Any, mask: Any, *, base_code: Code | None = None, source_code: Code | None = None
    ) -> Tensor:
        """Returns base activations with the masked features of the sources: inverse(mixed(...)), by the active pairs.

        Args:
            base: (N, D).
            source: (N, D); may be None where `source_code` is given.
            mask: (`n_masked`,), bool, or float from 0, the base's, to 1, the source's. Differentiable; so are base and
                source.
            base_code, source_code: what `code` returned for them; computed here when None.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        base = self._checked(base, "base")
        if source_code is None:
            source = self._checked(source, "source")
            if source.shape != base.shape:
                raise ValueError(f"source must have the shape of base, {tuple(base.shape)}, got {tuple(source.shape)}")
            source_code = self.code(source)
        base_code = self.code(base) if base_code is None else base_code
        for name, code in (("base_code", base_code), ("source_code", source_code)):
            if not isinstance(code, Code) or code.dropped.shape != base.shape[:-1]:
                raise ValueError(f"{name} must be what `code` returns for {tuple(base.shape[:-1])} activations")

        centroids, columns = self._gates(self._checked_mask(mask).to(base_code.responsibilities))
        components = torch.cat([source_code.components, base_code.components], -1)
        signed = torch.cat([source_code.responsibilities, -base_code.responsibilities], -1)
        inside = signed.unsqueeze(-1) * torch.cat([source_code.latents, base_code.latents], -2)
        here, held = components.clamp_min(0), components >= 0
        change = self._combined(components, signed * centroids[here], inside * columns[here], held)
        return (base.to(change) + change).to(base.dtype)

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Returns two modules, x -> (features, error) and (features, error) -> x: the contract of localization
        libraries (CausalAbstraction's `Featurizer`, pyvene)."""
        return _Featurize(self), _Inverse(self)

    def _combined(self, components: Tensor, weights: Tensor, inside: Tensor, held: Tensor) -> Tensor:
        """sum_c w_c mu_c + W_c b_c for weights (..., C) and b (..., C, R): (..., D).

        A code's weight multiplies its latents too, so that these are decoded with weight 1, and the centroids that
        come along are taken away.
        """
        one = held.to(weights.dtype)
        dropped = torch.zeros_like(weights[..., 0])
        of_loadings = Code(components, one, inside, dropped)
        of_centroids = Code(components, torch.where(held, weights, 0) - one, torch.zeros_like(inside), dropped)
        return self.mfa.decode(of_loadings) + self.mfa.decode(of_centroids)

    def _decoded(self, features: Tensor) -> Tensor:
        """The activations of features, without an error."""
        every = torch.arange(self.n_components, device=features.device).expand(*features.shape[:-1], -1)
        if self.mode == "centroids":
            weights, inside = features, features.new_zeros(*features.shape, self.rank)
        else:
            blocks = features.unflatten(-1, (self.n_components, 1 + self.rank))
            weights, inside = blocks[..., 0], blocks[..., 1:]
        return self._combined(every, weights, inside, torch.ones_like(every, dtype=torch.bool))

    def _gates(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Those of centroids (K,) and of columns (K, R)."""
        if self.mode == "centroids":
            return mask, mask.new_zeros(self.n_components, self.rank)
        if self.mode == "regions":
            centroids, loadings = mask.split(self.n_components)
            return centroids, loadings.unsqueeze(-1).expand(-1, self.rank)
        blocks = mask.view(self.n_components, 1 + self.rank)
        return blocks[:, 0], blocks[:, 1:]

    def _by_feature(self, mask: Tensor) -> Tensor:
        centroids, columns = self._gates(mask)
        return centroids if self.mode == "centroids" else torch.cat([centroids.unsqueeze(-1), columns], -1).flatten()

    def _checked(self, x: Any, name: str) -> Tensor:
        return check_activations(x, self.mfa.n_features, self.mfa.directions(0).device, name)

    def _checked_mask(self, mask: Any) -> Tensor:
        mask = check_tensor(mask, "mask")
        if tuple(mask.shape) != (self.n_masked,):
            raise ValueError(
                f'mask must have shape ({self.n_masked},), as mode "{self.mode}" has it, got {tuple(mask.shape)}'
            )
        return mask


class _Featurize(nn.Module):
    def __init__(self, featurizer: MFAFeaturizer) -> None:
        super().__init__()
        self.featurizer = featurizer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.featurizer.featurize(x)


class _Inverse(nn.Module):
    def __init__(self, featurizer: MFAFeaturizer) -> None:
        super().__init__()
        self.featurizer = featurizer

    def forward(self, features: Tensor, error: Tensor) -> Tensor:
        return self.featurizer.inverse(features, error)

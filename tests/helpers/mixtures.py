"""Random mixtures for tests, and the oracles they are compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, LowRankMultivariateNormal, MixtureSameFamily

from mfa_kernels import MFA, ops
from mfa_kernels.ops.scan import reference
from mfa_kernels.ops.woodbury import op as woodbury_op
from mfa_kernels.ops.woodbury import portable as woodbury_portable


class Mixture(NamedTuple):
    means: Tensor
    loadings: Tensor
    noise_variance: Tensor
    log_weights: Tensor

    def to(self, target: torch.dtype | torch.device | str) -> Mixture:
        return Mixture(*(t.to(target) for t in self))

    def woodbury(self, center: Tensor | None = None) -> ops.Woodbury:
        center = torch.zeros_like(self.means[0]) if center is None else center
        return ops.factorize(self.means, self.loadings, self.noise_variance, center)

    def active(self, x: Tensor, slots: int = 16, center: Tensor | None = None) -> ops.ActivePairs:
        return ops.log_prob(x, *self, self.woodbury(center), slots)

    def log_prob_fp64(self, x: Tensor) -> Tensor:
        return reference.log_prob(x.double(), *self.to(torch.float64))

    def logits_fp64(self, x: Tensor) -> Tensor:
        wide = self.to(torch.float64)
        return wide.log_weights + reference.component_log_prob(x.double(), *wide[:3])

    def distribution(self) -> MixtureSameFamily:
        """The second oracle, independent of ours."""
        wide = self.to(torch.float64)
        noise = wide.noise_variance.expand_as(wide.means)
        parts = LowRankMultivariateNormal(wide.means, wide.loadings, noise)
        return MixtureSameFamily(Categorical(logits=wide.log_weights), parts)


def mixture(
    components: int,
    features: int,
    rank: int,
    *,
    per_component: bool = False,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Mixture:
    """Components whose centroids are `spread` apart: 3 makes responsibilities near one-hot, 0.1 makes them diffuse."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    noise = 0.5 + torch.rand((components, features) if per_component else (features,), generator=generator).double()
    return Mixture(
        spread * normal(components, features),
        normal(components, features, rank) * (3 / features**0.5),
        noise,
        normal(components).log_softmax(0),
    ).to(dtype)


def tokens(m: Mixture, count: int, seed: int = 1) -> Tensor:
    """Draws from the mixture, (count, D)."""
    generator = torch.Generator().manual_seed(seed)
    components, features, rank = m.loadings.shape
    k = torch.randint(components, (count,), generator=generator)
    z = torch.randn(count, rank, generator=generator).to(m.means)
    noise = torch.randn(count, features, generator=generator).to(m.means)
    scale = m.noise_variance.expand_as(m.means)[k].sqrt()
    return m.means[k] + torch.einsum("ndr,nr->nd", m.loadings[k], z) + scale * noise


def drawn(
    count: int, components: int, features: int, rank: int, *, device: str = "cpu", **options: Any
) -> tuple[Mixture, Tensor]:
    """A mixture and draws from it, on a device; options are those of `mixture`."""
    m = mixture(components, features, rank, **options)
    return m.to(device), tokens(m, count).to(device)


def portable_factors(m: Mixture) -> ops.Woodbury:
    """In the layout of the kernels of a GPU, whatever serves this device."""
    scale, per_component = woodbury_op.scale_of(m.noise_variance).contiguous(), m.noise_variance.dim() == 2
    return ops.Woodbury(*woodbury_portable.portable(*m[:3]), scale, m.means.mean(0), per_component)


def rounded_factors(m: Mixture) -> ops.Woodbury:
    """Factors of float64 in float32: their rounding alone separates them from the oracle's."""
    wide = portable_factors(m.to(torch.float64))
    return ops.Woodbury(*(t.float().contiguous() for t in wide.tensors()), wide.per_component)


def adversarial(
    case: str,
    components: int = 83,
    features: int = 144,
    rank: int = 6,
    *,
    spread: float = 1.0,
    count: int = 300,
    near: int = 50,
    scales: Tensor | None = None,
) -> tuple[Mixture, Tensor]:
    """Float32 parameters that are hard to bound, and `count` tokens: `near` means, far away, and drawn from them.

    The last tokens are multiplied by `scales`: 50 random factors up to 50 unless given.
    """
    m = mixture(components, features, rank, dtype=torch.float64, spread=spread)
    means, loadings, noise = m.means.clone(), m.loadings.clone(), m.noise_variance.clone()
    if case == "near_duplicates":
        means[1:] = means[0] + 1e-4 * means[1:]
        loadings[1:] = loadings[0] + 1e-4 * loadings[1:]
    elif case == "huge_norms":
        means *= 1e4
        loadings *= 1e3
    elif case == "rank_deficient":
        loadings[:, :, 1] = loadings[:, :, 0]
        loadings[:, :, 2] = 0
        column, copied = (3, 4) if rank > 4 else (2, 0)
        loadings[::2, :, column] = 1e3 * loadings[::2, :, copied]
        loadings[5] *= 1e7
    elif case == "small_noise":
        noise[:] = 1e-6
    elif case == "uneven_noise":
        noise = 10 ** (12 * torch.linspace(0, 1, features, dtype=torch.float64) - 6)
    elif case == "far_regions":
        means += 3000
        means[40:, :7] -= 1e5
    elif case == "outlier_dimensions":
        means[:, 7] += 3000
        loadings[:, 7] *= 1e3
    else:
        assert case == "plain"
    m = Mixture(means, loadings, noise, m.log_weights).to(torch.float32)
    x, generator = tokens(m, count), torch.Generator().manual_seed(3)
    offsets = 1e-3 * torch.randn(near, features, generator=generator)
    scales = 50 * torch.rand(50, generator=generator) if scales is None else scales
    x[-len(scales) - near : -len(scales)] = m.means[:near] + offsets
    x[-len(scales) :] *= scales.unsqueeze(1)
    return m, x


def random_mfa(components=5, features=12, rank=3, noise="shared", dtype=torch.float32, **kwargs: Any) -> MFA:
    """A module with the parameters of `mixture`; further arguments are those of `MFA`."""
    m = mixture(components, features, rank, per_component=noise == "per_component", dtype=dtype)
    mfa = MFA(components, features, rank, noise, dtype=dtype, **kwargs)
    with torch.no_grad():
        mfa.means.copy_(m.means)
        mfa.loadings.copy_(m.loadings)
        mfa.log_noise.copy_(m.noise_variance.log())
        mfa.weight_logits.copy_(m.log_weights)
        mfa.center.copy_(m.means.mean(0))
    return mfa

"""Baselines: the plain formula as the paper's code writes it, and the floor, the GEMM of its flops."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Categorical, LowRankMultivariateNormal, MixtureSameFamily

SHAPES = {
    "N1024_K1024_D768_R10": (1024, 1024, 768, 10),
    "N4096_K512_D384_R10": (4096, 512, 384, 10),
    "N2048_K4096_D768_R10": (2048, 4096, 768, 10),
    "N2048_K2048_D2304_R10": (2048, 2048, 2304, 10),
}


def problem(shape: tuple[int, int, int, int], seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Tokens x and parameters (means, loadings, noise_variance, log_weights) of a mixture that responds near one-hot.

    Returns x (N, D), drawn from the mixture, and float32 parameters.
    """
    n, k, d, r = shape
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(k, d, generator=generator)
    loadings = torch.randn(k, d, r, generator=generator) * (9 / d) ** 0.5
    noise_variance = 0.5 + torch.rand(d, generator=generator)
    log_weights = torch.full((k,), -math.log(k))
    index = torch.randint(k, (n,), generator=generator)
    z = torch.randn(n, r, generator=generator)
    x = means[index] + torch.einsum("ndr,nr->nd", loadings[index], z)
    x += noise_variance.sqrt() * torch.randn(n, d, generator=generator)
    return x, [means, loadings, noise_variance, log_weights]


def gemm(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """The two factors of [N, D] x [D, K (R + 1)]."""
    n, k, d, r = shape
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, d, generator=generator), torch.randn(d, k * (r + 1), generator=generator)


def plain_log_prob(x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor, log_weights: Tensor) -> Tensor:
    """log p(x) (N,) with the expanded distance and the N x K x R products in memory (arXiv 2602.02464's code)."""
    precision = noise_variance.reciprocal()
    scaled = loadings * precision.unsqueeze(-1)  # (K, D, R)
    gram = torch.eye(loadings.shape[2], device=loadings.device) + loadings.mT @ scaled
    cholesky = torch.linalg.cholesky(gram)
    distance = (x.square() @ precision).unsqueeze(1) - 2 * x @ (means * precision).T + means.square() @ precision
    v = torch.einsum("nd,kdr->nkr", x, scaled) - torch.einsum("kd,kdr->kr", means, scaled)
    t = torch.linalg.solve_triangular(cholesky, v.permute(1, 2, 0), upper=False)  # (K, R, N)
    log_det = noise_variance.log().sum() + 2 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    logits = log_weights - 0.5 * (x.shape[1] * math.log(2 * math.pi) + log_det + distance - t.square().sum(1).T)
    return torch.logsumexp(logits, -1)


def distributions_log_prob(
    x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor, log_weights: Tensor
) -> Tensor:
    """The same from torch.distributions, in slices of 16 tokens: it forms N x K x D."""
    parts = LowRankMultivariateNormal(means, loadings, noise_variance.expand_as(means), validate_args=False)
    mixture = MixtureSameFamily(Categorical(logits=log_weights), parts, validate_args=False)
    return torch.cat([mixture.log_prob(part) for part in x.split(16)])

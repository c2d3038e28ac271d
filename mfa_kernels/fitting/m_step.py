"""The M-step in closed form, and the prior that it weighs the likelihood against.

Means and loadings come together, as the coefficients of the augmented latents [z, 1], then the noise (Ghahramani and
Hinton, "The EM algorithm for mixtures of factor analyzers", 1996).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mfa_kernels.fitting.run import standard_deviation
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.ops.statistics.op import SufficientStatistics
from mfa_kernels.ops.woodbury.reference import woodbury as exact_factors

DEFAULT_STRENGTH = 10.0
"""Strength of the prior on covariances, in tokens per region, where nothing is held out to choose it by."""

_COVARIANCE_ROWS = 20_000  # rows that the pooled covariance reads, or 8 D if that is more
_COVARIANCE_CHUNK = 4096  # rows at once
_OUTLIER = 1000.0  # times the median squared distance, beyond which a row has no say in the pooled covariance
_CHUNK_ELEMENTS = 1 << 23  # numbers in the loadings of the components whose M-step runs at once


@dataclass(frozen=True)
class Prior:
    """A prior on the parameters, conjugate, so that the M-step stays in closed form.

    Every region has seen `strength` further tokens whose residuals have the covariance that regions have on average
    (an inverse Wishart prior on C_k = W_k W_k^T + Psi): a region that owns many tokens hardly notices, one that owns
    few takes over the directions and the noise that its neighbours agree on. On the weights, a Dirichlet prior of
    `tokens` further tokens.

    Attributes:
        covariance: S_0, (D, D) float64.
        strength: nu, tokens per region.
        tokens: of the weights, per region.
    """

    covariance: Tensor
    strength: float = DEFAULT_STRENGTH
    tokens: float = 1.0

    @torch.no_grad()
    def log_density(self, mfa: Mixture) -> Tensor:
        """log p(parameters) but for a constant, (): -nu/2 sum_k (log|C_k| + tr C_k^-1 S_0) + tokens sum_k log pi_k."""
        noise, total = mfa.noise_variance.double(), self.tokens * mfa.log_weights.double().sum()
        for k in _component_chunks(mfa):
            psi = noise if noise.dim() == 1 else noise[k]
            rows, _, log_det = exact_factors(mfa.loadings[k].double(), psi)
            rows = rows * psi.rsqrt().unsqueeze(-2)
            trace = (self.covariance.diagonal() / psi).sum(-1) - ((rows @ self.covariance) * rows).sum((1, 2))
            total = total - self.strength / 2 * (log_det + trace).sum()
        mfa.processes.sum_(total)
        return total


def _component_chunks(mfa: Mixture) -> tuple[Tensor, ...]:
    """Numbers of this process's components, in chunks whose M-step runs at once."""
    step = max(1, _CHUNK_ELEMENTS // (mfa.n_features * (mfa.rank + 1)))
    return torch.arange(len(mfa.means), device=mfa.means.device).split(step)


def covariance_rows(mfa: Mixture) -> int:
    """The number of rows that `pooled_covariance` reads of those it is given."""
    return max(_COVARIANCE_ROWS, 8 * mfa.n_features)


@torch.no_grad()
def pooled_covariance(mfa: Mixture, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Covariance of the residuals of finite rows x (n, D), which weigh (n,), in the regions that own them, (D, D)
    float64."""
    scale = standard_deviation(mfa)
    x = x[: covariance_rows(mfa)].to(mfa.means)
    weight = None if weights is None else weights[: len(x)].to(x.device)
    owner = mfa.assign(x)
    here = (owner >= mfa.first_component) & (owner < mfa.first_component + len(mfa.means))
    x, owner, weight = x[here], owner[here] - mfa.first_component, None if weight is None else weight[here]
    distance = ((x - mfa.means[owner]) / scale).square().sum(1)
    every = mfa.processes.concatenated(distance)
    near = distance <= (_OUTLIER * every.median() if len(every) else math.inf)
    x, owner, weight = x[near], owner[near], None if weight is None else weight[near]
    roots = None if weight is None else weight.sqrt().to(x).split(_COVARIANCE_CHUNK)
    total = torch.zeros(mfa.n_features, mfa.n_features, dtype=torch.float64, device=x.device)
    for i, (part, k) in enumerate(zip(x.split(_COVARIANCE_CHUNK), owner.split(_COVARIANCE_CHUNK))):
        y = (part - mfa.means[k]) / scale
        if roots is not None:
            y *= roots[i].unsqueeze(1)
        total += y.mT @ y
    mfa.processes.sum_(total)
    scale = scale.double()
    mass = mfa.processes.totals(len(x) if weight is None else float(weight.sum()))[0]
    return total / (mass or 1) * scale * scale.unsqueeze(1)


@torch.no_grad()
def maximize(mfa: Mixture, s: SufficientStatistics, prior: Prior) -> Tensor:
    """The M-step: sets the mixture's parameters to those that maximise the expected log posterior.

    With the mean moved by delta, W and delta minimise sum E|y - W z - delta|^2 / Psi over the tokens and those of the
    prior: [W delta] = [cross shift] [[second latent] [latent^T mass]]^-1. The noise is what they leave, but for the
    mixture's noise floor. A region without tokens stays as it is.

    Args:
        mfa: what the statistics were collected under.
        s: the statistics, of this process's components.
        prior: its strengths in the units of `s.mass`.

    Returns:
        How far the means moved, (K, D) float64; of this process's components.
    """
    rank, nu = mfa.rank, prior.strength
    noise = mfa.noise_variance.double()
    shared = noise.dim() == 1
    total = s.mass.sum()
    mfa.processes.sum_(total)
    owned = s.mass > 1e-9 * total
    unexplained = s.squares.clone()
    change = torch.empty_like(s.shift)
    loadings = torch.empty_like(mfa.loadings)
    identity = torch.eye(rank, dtype=torch.float64, device=noise.device)
    for k in _component_chunks(mfa):
        old = mfa.loadings[k].double()
        scaled = old / (noise if shared else noise[k]).unsqueeze(-1)
        posterior = torch.linalg.inv(identity + old.mT @ scaled)  # M^-1
        gain = posterior @ scaled.mT  # E[z | y] = gain y
        spread = gain @ prior.covariance
        products = torch.cat([s.cross[k] + nu * spread, s.shift[k].unsqueeze(1)], 1)  # (k, R+1, D)
        gram = torch.empty(len(k), rank + 1, rank + 1, dtype=torch.float64, device=noise.device)
        gram[:, :rank, :rank] = s.second[k] + nu * (spread @ gain.mT + posterior)
        gram[:, :rank, rank] = gram[:, rank, :rank] = s.latent[k]
        gram[:, rank, rank] = s.mass[k]
        own = owned[k]
        if own.all():  # as a rule; the copies of the other case cost as much as the solution
            fitted = torch.cholesky_solve(products, torch.linalg.cholesky(gram))
        else:
            fitted = torch.cat([old.mT, torch.zeros_like(products[:, :1])], 1)
            fitted[own] = torch.cholesky_solve(products[own], torch.linalg.cholesky(gram[own]))
        left = -(fitted * (2 * products - gram @ fitted)).sum(1)
        if shared:
            unexplained += left.sum(0)
        else:
            unexplained[k] += left
        change[k] = fitted[:, rank]
        loadings[k] = fitted[:, :rank].mT.to(loadings)
    if shared:
        mfa.processes.sum_(unexplained)
    regions = mfa.n_components if shared else 1
    unexplained += regions * nu * prior.covariance.diagonal()
    weight = (total if shared else s.mass.unsqueeze(1)) + regions * nu
    least = 2 * mfa.noise_floor or torch.finfo(mfa.means.dtype).tiny
    psi = torch.where(weight > 0, unexplained / weight, noise).clamp_min(least)
    means = (mfa.means.double() + change).to(mfa.means)
    change = means.double() - mfa.means.double()
    mfa.means.copy_(means)
    mfa.loadings.copy_(loadings)
    mfa.log_noise.copy_((psi - mfa.noise_floor).log())
    mfa.weight_logits.copy_(((s.mass + prior.tokens) / (total + mfa.n_components * prior.tokens)).log())
    return change

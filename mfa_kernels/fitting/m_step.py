"""The M-step in closed form, and the prior that it weighs the likelihood against.

Means and loadings come together, as the coefficients of the augmented latents [z, 1], then the noise (Ghahramani and
Hinton, "The EM algorithm for mixtures of factor analyzers", 1996).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mfa_kernels.fitting.guard import Look
from mfa_kernels.fitting.run import standard_deviation
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.ops.m_step.op import solve, traces
from mfa_kernels.ops.statistics.op import SufficientStatistics

DEFAULT_STRENGTH = 10.0
"""Strength of the prior on covariances, in tokens per region, where nothing is held out to choose it by."""

_COVARIANCE_ROWS = 20_000  # rows that the pooled covariance reads, or 8 D if that is more
_COVARIANCE_CHUNK = 4096  # rows at once
_OUTLIER = 1000.0  # times the median squared distance, beyond which a row has no say in the pooled covariance
_OWNED = 1e-9  # share of all tokens, up to which a region is without any


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
        parameters, woodbury = mfa.prepared()
        of_covariances = (woodbury.log_det.double() + traces(parameters, woodbury, self.covariance)).sum()
        total = self.tokens * mfa.log_weights.double().sum() - self.strength / 2 * of_covariances
        mfa.processes.sum_(total)
        return total


def covariance_rows(mfa: Mixture) -> int:
    """The number of rows that `pooled_covariance` reads of those it is given."""
    return max(_COVARIANCE_ROWS, 8 * mfa.n_features)


@torch.no_grad()
def pooled_covariance(mfa: Mixture, x: Tensor, weights: Tensor | None = None, look: Look | None = None) -> Tensor:
    """Covariance of the residuals of finite rows x (n, D), which weigh (n,), in the regions that own them, (D, D)
    float64; `look`, where it is given, finds these instead of a scan of all."""
    scale = standard_deviation(mfa)
    x = x[: covariance_rows(mfa)].to(mfa.means)
    weight = None if weights is None else weights[: len(x)].to(x.device)
    owner = mfa.assign(x) if look is None else look(x).components[:, 0].long()
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
    nu, noise = prior.strength, mfa.noise_variance.double()
    shared = noise.dim() == 1
    total = s.mass.sum()
    mfa.processes.sum_(total)
    parameters, woodbury = mfa.prepared()
    change, loadings, left = solve(s, parameters, woodbury, prior.covariance, nu, _OWNED * float(total))
    unexplained = s.squares + left
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

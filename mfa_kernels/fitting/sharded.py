"""EM of a mixture whose components are spread over the ranks: every rank reads all tokens, for its own components."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mfa_kernels.fitting.maximization import Prior, maximize
from mfa_kernels.ops.statistics.op import Statistics, collect
from mfa_kernels.sharded import ShardedMFA


@torch.no_grad()
def em_step(mfa: ShardedMFA, batches: Iterable[Tensor], prior: Prior | None = None) -> float:
    """One step of EM in place: a pass over the tokens, then the M-step of each rank's components.

    Responsibilities are those among the components of all ranks; statistics stay where the components are, and only
    the sums that make a shared noise and the weights travel.

    Args:
        mfa: the mixture; the call is collective.
        batches: (..., D) each, the same on every rank. Tokens that are not finite add nothing.
        prior: see `mfa_kernels.fitting.em.Prior`; None: maximum likelihood, for regions that all own many tokens.

    Returns:
        The mean negative log-likelihood before the step, in nats per finite token.
    """
    means = mfa.local.means
    s = Statistics.zeros(means, mfa.rank, mfa.noise == "per_component")
    tokens = 0.0
    for x in batches:
        tokens += expectation(mfa, x.to(means.device).reshape(-1, mfa.n_features), s)
    if not tokens:
        raise ValueError("batches hold no token of a finite density")
    if prior is None:
        nothing = torch.zeros(mfa.n_features, mfa.n_features, dtype=torch.float64, device=means.device)
        prior = Prior(nothing, strength=0.0, tokens=0.0)
    maximize(mfa.local, s, prior, mfa.ranks)
    return -float(s.log_likelihood) / tokens


@torch.no_grad()
def expectation(mfa: ShardedMFA, x: Tensor, out: Statistics) -> float:
    """Adds the statistics of this rank's components to `out`, and log p(x) of the whole mixture.

    Args:
        mfa: the mixture; the call is collective.
        x: (N, D), the same on every rank.
        out: of this rank's components.

    Returns:
        Tokens that are finite.
    """
    parameters, factors = mfa.parameters_in_compute_dtype(), mfa.local.factors()
    x = x.to(factors.rows.dtype).contiguous()
    active = mfa.scan(x)
    every = mfa.ranks.stacked(active.log_prob)
    log_prob = every.logsumexp(0)
    finite = log_prob.isfinite()
    share = every.softmax(0)[mfa.ranks.rank].masked_fill(~finite, 0)  # of the responsibility, on this rank
    collect(x, active, *parameters, factors, out, share, least=math.exp(-mfa._threshold))
    out.log_likelihood.add_(log_prob.double().masked_fill(~finite, 0).sum())
    return float(finite.sum())

"""EM of a mixture whose components are spread over processes, each of which reads all tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.fitting import preparation
from mfa_kernels.fitting.em import BatchEM
from mfa_kernels.fitting.em_base import EM
from mfa_kernels.fitting.m_step import Prior, maximize
from mfa_kernels.fitting.online_em import OnlineEM
from mfa_kernels.fitting.row_weights import Weighed
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.sharded import ShardedMFA
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.statistics.op import SufficientStatistics, collect


class _ShardedEM(EM):
    """EM in which a process reads all rows, scans them for its own components, and keeps the sums of these.

    Likelihoods, and whatever else is decided by, are the same on every process.

    Args:
        sample: numbers of the rows that the start was made of.
    """

    def __init__(self, mfa: ShardedMFA, *args: Any, sample: Tensor, **kwargs: Any) -> None:
        self.whole, self.sample = mfa, sample
        super().__init__(mfa, *args, **kwargs)

    def _own(self) -> MFA:
        return self.whole.local

    def _scan_own(self, x: Tensor) -> ActivePairs:
        """Active pairs among this process's components; the weights are those of the whole."""
        active = self.screening.scan(x)
        share = self.whole.log_weights.logsumexp(0).to(active.logits)
        return active._replace(log_prob=active.log_prob + share, logits=active.logits + share)

    @torch.no_grad()
    def _scan_held_out(self, index: Tensor) -> ActivePairs:
        return self.whole.merged(self._scan_own(self.held_out[index]))

    @torch.no_grad()
    def expect(self, batch: Weighed, out: SufficientStatistics, unit: float | None = None) -> tuple[Any, Tensor]:
        """Adds the statistics of a batch; returns the two most responsible components of all, where regions overlap."""
        x, processes = batch.rows, self.whole.processes
        active, weights = expectation(self.whole, x, out, self._scan_own(x), 1.0 if unit is None else unit)
        numbers = torch.where(active.components >= 0, active.components + self.whole.first_component, -1)
        every, places = processes.stacked(weights[:, :2]).transpose(0, 1).flatten(1).topk(2)
        numbers = processes.stacked(numbers[:, :2]).transpose(0, 1).flatten(1).gather(1, places)
        return active._replace(components=numbers), every

    def _search(self) -> None:
        """Components of other processes are candidates too, and are not here."""

    @torch.no_grad()
    def expect_alone(self, x: Tensor, out: SufficientStatistics, weights: Tensor) -> ActivePairs:
        return expectation(self.whole, x, out, self.whole.scan(x.to(self.whole.means)), weights)[0]

    def _look_at_held_out(self) -> dict[str, Any]:
        found = super()._look_at_held_out()
        return self.whole.processes.agree(lambda: found)


class ShardedBatchEM(_ShardedEM, BatchEM):
    """`BatchEM` of spread components."""

    def _pool(self, s: SufficientStatistics, overlap: Any) -> None:
        self.whole.processes.broadcast_(s.log_likelihood)


class ShardedOnlineEM(_ShardedEM, OnlineEM):
    """`OnlineEM` of spread components."""

    def _start_batches(self, start_rows: Tensor) -> Iterator[Weighed]:
        """Reads the sample again, as no process holds it."""
        for index in self.sample.split(self.rows_at_once()):
            yield Weighed(preparation.finite(self.source, index, self.whole.means.device, self.whole.means.dtype))


@torch.no_grad()
def em_step(mfa: ShardedMFA, batches: Iterable[Tensor], prior: Prior | None = None) -> float:
    """One step of EM in place: a pass over the tokens, then the M-step of each process's components.

    Responsibilities are those among the components of all processes; statistics stay where the components are, and only
    the sums that make a shared noise and the weights travel.

    Args:
        mfa: the mixture; the call is collective.
        batches: (..., D) each, the same on every process. Tokens that are not finite add nothing.
        prior: see `mfa_kernels.fitting.em.Prior`; None: maximum likelihood, for regions that all own many tokens.

    Returns:
        The mean negative log-likelihood before the step, in nats per finite token.
    """
    means = mfa.means
    s = SufficientStatistics.zeros(means, mfa.rank, mfa.noise == "per_component")
    tokens = 0
    for x in batches:
        x = x.to(means.device).reshape(-1, mfa.n_features)
        tokens += int(expectation(mfa, x, s, mfa.scan(x))[0].log_prob.isfinite().sum())
    if not tokens:
        raise ValueError("batches hold no token of a finite density")
    if prior is None:
        nothing = torch.zeros(mfa.n_features, mfa.n_features, dtype=torch.float64, device=means.device)
        prior = Prior(nothing, strength=0.0, tokens=0.0)
    maximize(mfa, s, prior)
    return -float(s.log_likelihood) / tokens


@torch.no_grad()
def expectation(
    mfa: ShardedMFA, x: Tensor, out: SufficientStatistics, own: ActivePairs, token_weight: float | Tensor = 1.0
) -> tuple[ActivePairs, Tensor]:
    """Adds the statistics of this process's components to `out`, and log p(x) of the whole mixture.

    Args:
        mfa: the mixture; the call is collective.
        x: (N, D), the same on every process.
        out: of this process's components.
        own: what this process's scan of x has found (`ShardedMFA.scan`).
        token_weight: of each token, or one for all, (N,).

    Returns:
        `own` with log p(x) of the whole mixture, and the responsibilities of its slots (N, S), times the weight.
    """
    parameters, woodbury = mfa.parameters_in_compute_dtype(), mfa.local.woodbury()
    x = x.to(woodbury.rows.dtype).contiguous()
    every = mfa.processes.stacked(own.log_prob)
    log_prob = every.logsumexp(0)
    finite = log_prob.isfinite()
    share = token_weight * every.softmax(0)[mfa.processes.index].masked_fill(~finite, 0)  # this process's
    every_weight = torch.as_tensor(token_weight)
    least = float(every_weight.min()) * math.exp(-mfa.threshold) if every_weight.numel() else 0.0
    weights = collect(x, own, parameters, woodbury, out, share, least=least)
    out.log_likelihood.add_((token_weight * log_prob.double().masked_fill(~finite, 0)).sum())
    return own._replace(log_prob=log_prob), weights

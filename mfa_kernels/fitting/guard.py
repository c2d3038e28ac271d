"""A sample of the rows trained on, which no state that is kept makes less likely than the start.

Held-out rows choose among the states of a fit, and do not see what happens to a row of which there is but one. So the
sample is stratified: the rows that stick out most in some dimension are all in it, each for itself; of the others
some, each for many, and where possible such as the start was not made of, which it would favour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.ops.scan.types import ActivePairs

Look = Callable[[Tensor], ActivePairs]
"""Of rows (n, D): their active pairs."""

Scan = Callable[[Tensor, Tensor], ActivePairs]
"""Of rows (n, D) and their numbers (n,)."""

_OUT = 6.0  # standard deviations of a dimension, beyond which a row sticks out
_OUTLYING = 1024  # rows that stick out, at most
OTHERS = 4096  # rows that do not, at most
ROWS = _OUTLYING + OTHERS
_CHUNK = 4096  # rows that are read, or scanned, at once


class Guard:
    """The sample, of all processes, which every one of them holds.

    Args:
        rows: (n, D), finite, in random order: a process's share of those that the start was made of.
        others: (m, D), finite, its share of further rows of the same data; None: there are none.
        device: of the mixture.
        processes: that share them.
        weights, other_weights: of rows and others, (n,) and (m,) float64; None: all 1.

    Attributes:
        rows: of the sample, (m, D).
        weights: how many rows each stands for, or what these weigh, (m,) float64.
    """

    @torch.no_grad()
    def __init__(
        self, rows: Tensor, device: torch.device, others: Tensor | None = None, processes: Processes = ALONE,
        weights: Tensor | None = None, other_weights: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.processes = processes
        own = _ones(rows, device) if weights is None else weights.to(device)
        deviation, outlying = _deviations(rows, processes).topk(min(len(rows), -(-_OUTLYING // processes.count)))
        outlying = outlying[deviation > _OUT]
        share = -(-OTHERS // processes.count)
        others = rows[:0].to(device) if others is None else others[:share].to(device, rows.dtype)
        theirs = _ones(others, device) if other_weights is None else other_weights[:share].to(device)
        if len(others) < share:  # a few would stand for too many
            ordinary = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            ordinary[outlying] = False
            more = ordinary.nonzero().squeeze(1)[: share - len(others)]
            others, theirs = torch.cat([others, rows[more].to(device)]), torch.cat([theirs, own[more.to(device)]])
        alone = own[outlying.to(device)]
        stand_for, are = processes.totals(float(own.sum() - alone.sum()), float(theirs.sum()))
        weights = torch.cat([alone, theirs * (stand_for / (are or 1.0))])
        self.rows = processes.concatenated(torch.cat([rows[outlying].to(device), others]))
        self.weights = processes.concatenated(weights)

    @torch.no_grad()
    def look(self, mfa: Mixture, scan: Scan | None = None) -> tuple[Tensor, Tensor]:
        """The region that owns each row of this process's share, -1 where none does, and log p: int64, float64.

        `scan`, where it is given, finds the active pairs of rows by their numbers, instead of the mixture.
        """
        numbers = self.processes.share(torch.arange(len(self.rows), device=self.rows.device)).split(_CHUNK)
        found = [mfa.active_pairs(self.rows[part]) if scan is None else scan(self.rows[part], part) for part in numbers]
        owners = torch.cat([active.components[:, 0] for active in found]).long()
        return owners, torch.cat([active.log_prob for active in found]).double()

    def settle(self, mfa: Mixture) -> None:
        """Leaves out rows that have no density under the start: nothing can be worse for them, and nothing compared."""
        has_density = self.processes.concatenated(self.look(mfa)[1].isfinite())
        self.weights = torch.where(has_density, self.weights, 0)

    def log_likelihood(self, mfa: Mixture, scan: Scan | None = None) -> float:
        """Mean of log p over the rows that the sample stands for, in nats; `scan` as `look` takes it."""
        weights = self.processes.share(self.weights)
        total = float(torch.where(weights > 0, self.look(mfa, scan)[1] * weights, 0).sum())
        return self.processes.totals(total)[0] / max(1.0, float(self.weights.sum()))

    def lost(self, mfa: Mixture, regions: Tensor, owners: Tensor, before: Tensor) -> Tensor:
        """The loss since `look` gave owners and log p before of the rows that some regions owned, by region: (K,)
        nats."""
        weights, numbers = self.processes.share(self.weights), self.processes.share(torch.arange(len(self.rows)))
        here = (torch.isin(owners, regions) & (weights > 0)).nonzero().squeeze(1)
        rows = self.rows[numbers.to(here.device)[here]]
        after = [mfa.active_pairs(part).log_prob.double() for part in rows.split(_CHUNK)]
        change = weights[here] * (before[here] - torch.cat([*after, before[:0]]))
        out = torch.zeros(mfa.n_components, dtype=torch.float64, device=change.device)
        out.index_put_((owners[here],), change, accumulate=True)
        self.processes.sum_(out)
        return out

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"guard.rows": self.rows, "guard.weights": self.weights}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        rows, weights = tensors["guard.rows"], tensors["guard.weights"]
        found: Any = rows.dtype, rows.shape[1:], weights.dtype, weights.shape
        expected = self.rows.dtype, self.rows.shape[1:], torch.float64, rows.shape[:1]
        if found != expected:
            raise ValueError(f"guard: rows and weights have dtypes and shapes {found}, expected {expected}")
        self.rows, self.weights = (own.to(self.rows.device, copy=True) for own in (rows, weights))


def _ones(rows: Tensor, device: torch.device) -> Tensor:
    return torch.ones(len(rows), dtype=torch.float64, device=device)


def _deviations(rows: Tensor, processes: Processes) -> Tensor:
    """The largest deviation of each row (n, D) in any dimension, in standard deviations over all processes: (n,)."""
    count = max(1.0, processes.totals(len(rows))[0])
    mean = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    variance = torch.zeros_like(mean)
    parts = rows.split(_CHUNK)
    for part in parts:
        mean += part.double().sum(0)
    processes.sum_(mean)
    mean /= count
    for part in parts:
        variance += (part.double() - mean).square().sum(0)
    processes.sum_(variance)
    scale = (variance / count).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.cat([((part.double() - mean) / scale).abs().amax(1) for part in parts])

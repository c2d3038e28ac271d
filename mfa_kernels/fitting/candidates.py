"""Candidate sets: the components that a truncated E-step looks at for each row, carried from pass to pass.

Truncated variational EM (Salwig et al., arXiv 2501.12299): of each row, the components that were best for it are kept,
and a few more are tried: neighbors of the best one in a graph of components, and one at random. The rest counts as
having no responsibility, so log p(x) is bounded from below. The bound rises in every step: the E-step keeps the best of
what it kept before and what it tries, and the M-step holds what is kept. A row without candidates takes those that
`mfa_kernels.fitting.candidate_search` finds, or a scan of all; in one pass of eight every row tries what it finds.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor
from torch.nn.functional import pad

from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.fitting.candidate_search import CandidateSearch
from mfa_kernels.fitting.kmeans.two_levels import closest
from mfa_kernels.fitting.run import standard_deviation
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.screening import Screening
from mfa_kernels.ops.scan.candidates import scan_candidates
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs, activity_threshold

KEPT = 8
"""Components kept of a row at most."""

NEIGHBORS = 16
"""Neighbors of a component in the graph."""

TRIED = 4
"""Neighbors that a row tries in a pass; in so many passes as make up all, it has tried them all."""

OTHERS = 2
"""Next best components of a row that say what neighbors are, however far below the best."""

BYTES = 4 * (KEPT + OTHERS) + 1
"""What the candidates of a row take."""

WITHIN = 200.0
"""Nats below the best logit, beyond which a component is not kept: it had to gain as many in a pass to matter."""

_SEARCH_EVERY = 8
"""Passes, in one of which rows try what the search finds: where regions have moved away from under a row, and others
have come, neighbors of the old ones do not lead to these."""

_SPREAD = 2654435761, 40503  # multipliers that scatter row numbers and passes over the components


class Graph:
    """The neighbors of every component: what rows of one have as their second choice.

    Attributes:
        neighbors: (K, G) int32, likeliest first; -1 is none.
        turn: passes done, which say what neighbors rows try.
    """

    def __init__(self, mfa: MFA) -> None:
        self.components = mfa.n_components
        self.turn = 0
        self.neighbors = _closest(mfa, min(NEIGHBORS, self.components - 1))

    def tried(self, best: Tensor, rows: Tensor) -> Tensor:
        """Returns what rows with these numbers (n,) and best components (n,) try in this pass, (n, T) int32."""
        size = self.neighbors.shape[1]
        columns = torch.arange(min(TRIED, size), device=best.device)
        columns = (columns + self.turn * TRIED) % max(1, size)
        near = self.neighbors[best.long()][:, columns]
        any_one = (rows * _SPREAD[0] + self.turn * _SPREAD[1]) % self.components
        return torch.cat([near, any_one.int().unsqueeze(1)], 1)

    def refresh(self, sets: CandidateSets) -> None:
        """Ends a pass: brings to the front what rows keep beside their best component, the most frequent first."""
        self.turn += 1
        (count, size), device = self.neighbors.shape, self.neighbors.device
        code, counts = (sets.processes.concatenated(part) for part in sets.pairs())
        is_old = self.neighbors >= 0
        old = (torch.arange(count, device=device).unsqueeze(1) * count + self.neighbors)[is_old]
        place = torch.arange(size, 0, -1, device=device).expand(count, -1)[is_old]
        # A pair's score: the rows that have it, then the place it had.
        pairs, where = torch.cat([code, old]).unique(return_inverse=True)
        score = torch.zeros_like(pairs).index_add_(0, where, torch.cat([counts * (size + 1), place]))
        order = score.argsort(descending=True, stable=True)
        order = order[(pairs[order] // count).argsort(stable=True)]
        owner, neighbor = pairs[order] // count, (pairs[order] % count).int()
        rank = torch.arange(len(order), device=device) - torch.searchsorted(owner, owner)
        here = rank < size
        self.neighbors.fill_(-1)[owner[here], rank[here]] = neighbor[here]

    def link(self, moved: int, donor: int) -> None:
        """Makes a component that took half of another one a neighbor of it, which its rows try next."""
        column = (self.turn * TRIED) % max(1, self.neighbors.shape[1])
        self.neighbors[moved] = self.neighbors[donor]
        self.neighbors[donor, column] = moved
        self.neighbors[moved, -1] = donor


@torch.no_grad()
def _closest(mfa: MFA, count: int) -> Tensor:
    """The components with the closest means, in standard deviations within components: (K, count) int32."""
    return closest(((mfa.means.detach() - mfa.center) / standard_deviation(mfa)).float(), count)


class CandidateSets:
    """The candidates of some rows, by their numbers.

    Args:
        rows: N, of all processes.
        graph: what rows try.
        processes: each of which scans rows of its own.
        search: finds the candidates of rows that have none; None: a scan of all components does.

    Attributes:
        kept: (N, KEPT) int32, best first; -1 is none.
    """

    def __init__(
        self, rows: int, graph: Graph, processes: Processes = ALONE, search: CandidateSearch | None = None
    ) -> None:
        self.graph, self.processes, self.search = graph, processes, search
        device = graph.neighbors.device
        self.kept = torch.full((rows, KEPT), -1, dtype=torch.int32, device=device)
        self.others = torch.full((rows, OTHERS), -1, dtype=torch.int32, device=device)  # next best when last looked
        self.own = torch.zeros(rows, dtype=torch.bool, device=device)  # that this process has scanned

    def pairs(self) -> tuple[Tensor, Tensor]:
        """What is next best for rows of this process: codes best K + other (P,), and how many rows have each."""
        best, others = self.kept[self.own, :1].expand(-1, OTHERS), self.others[self.own]
        is_pair = (best >= 0) & (others >= 0)
        return (best[is_pair].long() * self.graph.components + others[is_pair]).unique(return_counts=True)

    def state(self) -> Tensor:
        """What all processes know of the rows, (N, KEPT + OTHERS) int32, on each of them; for a checkpoint."""
        found = torch.cat([self.kept, self.others], 1)
        if self.processes.count > 1:
            numbers = self.own.nonzero().squeeze(1)
            every, rows = self.processes.concatenated(numbers), self.processes.concatenated(found[numbers])
            found[every] = rows
            self.kept.copy_(found[:, :KEPT])
        return found

    def load(self, state: Tensor) -> None:
        """Takes over what `state` gave."""
        self.kept.copy_(state[:, :KEPT])
        self.others.copy_(state[:, KEPT:])
        if self.processes.count == 1:  # several do not remember which rows of a pass that was cut in two were whose
            self.own = self.kept[:, 0] >= 0

    def scan(self, x: Tensor, rows: Tensor, screening: Screening) -> ActivePairs:
        """Returns the active pairs of rows x (n, D) with these numbers (n,), among their candidates."""
        rows = rows.to(self.kept.device)
        self.own[rows] = True
        known = self.kept[rows, 0] >= 0
        if known.all():
            return self._truncated(x, rows, screening)
        if not known.any():
            return self._first(x, rows, screening)
        parts = [self._truncated(x[known], rows[known], screening), self._first(x[~known], rows[~known], screening)]
        order = torch.cat([known.nonzero(), (~known).nonzero()]).squeeze(1).argsort()
        return ActivePairs(*(torch.cat(columns)[order] for columns in zip(*parts)))

    def _first(self, x: Tensor, rows: Tensor, screening: Screening) -> ActivePairs:
        if self.search is None:
            return self._full(x, rows, screening)
        active = self._among(x, rows, self.search.candidates(x), screening)
        lost = active.components[:, 0] < 0  # too far out for the dtype along the coordinates
        if lost.any():
            for own, full in zip(active, self._full(x[lost], rows[lost], screening)):
                own[lost] = full
        return active

    def _full(self, x: Tensor, rows: Tensor, screening: Screening) -> ActivePairs:
        near = screening.scan(x, beyond=WITHIN)
        self.kept[rows] = near.components[:, :KEPT]
        self.others[rows] = near.components[:, 1 : 1 + OTHERS]
        return active_of(near, self.graph.components)

    def _truncated(self, x: Tensor, rows: Tensor, screening: Screening) -> ActivePairs:
        before = self.kept[rows]
        if self.search is not None and self.graph.turn % _SEARCH_EVERY == _SEARCH_EVERY // 2:
            tried = self.search.candidates(x)[:, : TRIED + 1]
        else:
            tried = self.graph.tried(before[:, 0], rows)
        return self._among(x, rows, torch.cat([before, tried], 1), screening)

    def _among(self, x: Tensor, rows: Tensor, candidates: Tensor, screening: Screening) -> ActivePairs:
        parameters, woodbury = screening.mfa.prepared()
        active, logits = scan_candidates(x, candidates, woodbury, parameters.log_weights, KEPT)
        best, columns = logits.topk(KEPT, dim=1)
        found = torch.where(best > -torch.inf, candidates.gather(1, columns), -1)
        self.kept[rows] = torch.where(best >= best[:, :1] - WITHIN, found, -1)
        self.others[rows] = found[:, 1 : 1 + OTHERS]
        over = active.counts > KEPT
        if over.any():  # what is not kept has no responsibility
            active.log_prob[over] = active.logits[over].logsumexp(1)
            active.counts[over] = KEPT
        empty = SLOTS - KEPT  # as a scan of all components has them
        components, logits = pad(active.components, (0, empty), value=-1), pad(active.logits, (0, empty), value=-inf)
        return active._replace(components=components, logits=logits)


def active_of(near: ActivePairs, count: int) -> ActivePairs:
    """The active pairs among those that a scan with a larger threshold found."""
    threshold = activity_threshold(count, near.logits.dtype)
    is_active = near.logits >= near.logits[:, :1] - threshold
    counts = torch.where(is_active[:, -1], near.counts, is_active.sum(1, dtype=torch.int32))
    components, logits = torch.where(is_active, near.components, -1), torch.where(is_active, near.logits, -torch.inf)
    return ActivePairs(near.log_prob, components, logits, counts)

"""EM in batches whose passes do not grow with K: truncated E-steps on `mfa_kernels.fitting.candidates`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.fitting.candidate_search import CandidateSearch
from mfa_kernels.fitting.candidates import KEPT, OTHERS, CandidateSets, Graph
from mfa_kernels.fitting.dead_regions import Overlap, Revival
from mfa_kernels.fitting.em import BatchEM
from mfa_kernels.fitting.guard import Scan
from mfa_kernels.fitting.m_step import Prior
from mfa_kernels.fitting.row_weights import Weighed
from mfa_kernels.fitting.run import EVALUATION_ROWS
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.statistics.op import SufficientStatistics

_ROWS_PER_COMPONENT = 4  # that an E-step reads at once at least: they share one visit to a component
_CHECKED = 4096  # rows trained on that are scanned in full at the end


class TruncatedEM(BatchEM):
    """`BatchEM` with truncated E-steps: only a last look at some rows, and where there is no search for candidates the
    first pass, scan all components.

    On the way, the log posterior and the likelihoods of rows held out and of the guard are lower bounds.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.graph = Graph(self.mfa)
        count = self.processes.count
        sizes = {
            "rows": len(self.source),
            "held_out": count * int(max(self.processes.objects(len(self.held_out)))),
            "guard": len(self.guard.rows),
        }
        self.sets = {name: CandidateSets(size, self.graph, self.processes, self.search) for name, size in sizes.items()}
        self.scan_guard = partial(self.sets["guard"].scan, screening=self.screening)

    def rows_at_once(self) -> int:
        return max(super().rows_at_once(), _ROWS_PER_COMPONENT * self.mfa.n_components)

    def e_step(self, bar: Any) -> tuple[SufficientStatistics, Overlap]:
        found = super().e_step(bar)
        self.graph.refresh(self.sets["rows"])
        return found

    truncates = True
    expected_gap = 0.1

    def _search(self) -> CandidateSearch | None:
        return CandidateSearch.where_it_pays(self.mfa, self.rows_at_once())

    @torch.no_grad()
    def _missed(self) -> float:
        """The mean of log p less its bound, over some of the rows trained on, in nats."""
        every = self.rows[:: -(-len(self.rows) // _CHECKED)]
        own = self.sets["rows"].own.to(every.device)
        missed = rows = 0.0
        for index in every[own[every]].split(EVALUATION_ROWS):
            x, _, numbers = self._finite(Weighed(self.source.rows(index), None, index), count_skipped=False)
            assert numbers is not None
            gap = self.mfa.log_prob(x).double() - self.scan_rows(x, numbers).log_prob.double()
            gap = gap[gap.isfinite()]
            missed, rows = missed + float(gap.sum()), rows + len(gap)
        missed, rows = self.processes.totals(missed, rows)
        return missed / max(1.0, rows)

    def _scan(self, batch: Weighed) -> ActivePairs:
        assert batch.numbers is not None
        return self.sets["rows"].scan(batch.rows, batch.numbers, self.screening)

    def _scan_held_out(self, index: Tensor) -> ActivePairs:
        numbers = index * self.processes.count + self.processes.index
        return self.sets["held_out"].scan(self.held_out[index], numbers, self.screening)

    def _try_held_out(self, index: Tensor) -> ActivePairs:
        return self._scan_held_out(index)

    def _guarded(self) -> float:
        return self.guard.log_likelihood(self.mfa, self.scan_guard)

    @property
    def scan_rows(self) -> Scan:
        return partial(self.sets["rows"].scan, screening=self.screening)

    def choose_prior(self, s: SufficientStatistics) -> Prior:
        sets = self.sets["held_out"]
        kept, others = sets.kept.clone(), sets.others.clone()
        found = super().choose_prior(s)
        sets.kept, sets.others = kept, others  # not those of states that were only tried
        return found

    def _moved(self, revival: Revival) -> None:
        for moved, donor in revival.moves:
            self.graph.link(moved, donor)

    def _prepare_scans(self, passes: int) -> None:
        """Decides how to scan the rows that have no candidates yet."""
        if self.search is not None:
            return
        rows = 0
        if self.graph.turn == 0:  # later ones are few: what is not finite, or too far out for the dtype
            rows = int((self.sets["rows"].kept[self.rows, 0] < 0).sum()) // self.processes.count
        if not self.report.history:
            rows += len(self.held_out) + len(self.guard.rows)
        self.screening.prepare(rows, rows)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        for name, sets in self.sets.items():
            tensors[f"candidates.{name}"] = sets.state()
        tensors["candidates.graph"] = self.graph.neighbors
        return tensors, values | {"turn": self.graph.turn, "sets_of": self.processes.count}

    def _like(self) -> dict[str, Tensor]:
        like: dict[str, Any] = {"dtype": torch.int32, "device": "meta"}
        of_rows = {
            f"candidates.{name}": torch.empty(len(sets.kept), KEPT + OTHERS, **like)
            for name, sets in self.sets.items()
            if name != "held_out"
        }
        return super()._like() | of_rows | {"candidates.graph": self.graph.neighbors}

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.graph.neighbors.copy_(tensors["candidates.graph"])
        self.graph.turn = values["turn"]
        for name, sets in self.sets.items():
            sets.search = self.search
            if name != "held_out" or values["sets_of"] == self.processes.count:
                sets.load(tensors[f"candidates.{name}"])

"""The base of EM in batches and online: the E-step of a batch, and how strong the prior is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.fitting.candidate_search import CandidateSearch, groups_of
from mfa_kernels.fitting.dead_regions import Overlap
from mfa_kernels.fitting.guard import Look, Scan
from mfa_kernels.fitting.m_step import Prior, covariance_rows, maximize, pooled_covariance
from mfa_kernels.fitting.notices import warn
from mfa_kernels.fitting.row_weights import Weighed
from mfa_kernels.fitting.run import EVALUATION_ROWS, Run, mean_nll, nll_of
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.screening import SAMPLE, Screening
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.statistics.op import SufficientStatistics, expectation

STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Strengths of the prior on covariances, in tokens per region: the best on held-out rows is taken."""

_CHOICE_ROWS = 4096  # held-out rows that choose between the strengths
_BATCH_ELEMENTS = 1 << 22  # numbers that an E-step reads at once
_SEARCHED = 0.5  # nats per row that a search may miss
_CHECKED = 1024  # rows that decide whether there is one
_LEAST_BATCH = 4096  # rows that it reads at once at least: they share one visit to the statistics


class EM(Run):
    """EM on the active pairs, for a maximum a posteriori; see `Run` for the other arguments.

    Args:
        start_rows: (n, D), finite, on any device: this process's share of the rows that the start was made of.
        start_weights: of these, (n,) float64 on their device, where the source's rows have weights.
    """

    def __init__(self, *args: Any, start_rows: Tensor, start_weights: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        first = slice(covariance_rows(self.mfa))
        weights = None if start_weights is None else self.processes.gathered(start_weights[first])
        self.search = search = self._search()
        if search is not None:
            few = (self.held_out if len(self.held_out) else start_rows)[:_CHECKED].to(self.mfa.means)
            if self.processes.agree(lambda: search.missed(few)) > _SEARCHED:
                self.search = None
        gathered = self.processes.gathered(start_rows[first])
        self.covariance = pooled_covariance(self.mfa, gathered, weights, self.look)
        self.processes.broadcast_(self.covariance)
        # clone(): a view would keep the whole sample in memory for the length of the fit.
        self.screening = Screening(self._own(), start_rows[:SAMPLE].clone(), self.processes)
        self._known: tuple[Prior, list[Any], float] | None = None  # a prior, a state, and its log-density
        self.prior: Prior | None = None  # until the first statistics are there to choose it by
        self.step = self.batch = 0  # M-steps done, and batches done in this pass

    def _search(self) -> CandidateSearch | None:
        """What may find the candidates of rows; None: they are scanned in full."""
        return None

    @property
    def look(self) -> Look | None:
        return None if self.search is None else self.search.scan

    @property
    def scan_rows(self) -> Scan | None:
        search = self.search
        return None if search is None else lambda rows, numbers: search.scan(rows)

    expected_gap = _SEARCHED
    """Nats per row that candidates may miss: of a row that comes once no more than a search does."""

    @property
    def truncates(self) -> bool:
        """True where E-steps are truncated, so that likelihoods on the way are lower bounds."""
        return self.search is not None

    def leave(self) -> None:
        """Ends the stage; where E-steps were truncated, by scans of all components: of the held-out rows, and of a few
        others for what candidates miss."""
        super().leave()
        if not (self.truncates and self.report.history):
            return
        if self.selects:
            self.report.held_out_nll = mean_nll(self.mfa, self.held_out, self.processes, self.held_out_weights)
        self.report.candidate_gap = gap = self._missed()
        if gap > self.expected_gap and self.processes.first:
            warn(
                f"fit: candidates missed {gap:.2f} nats of each row trained on (at most {self.expected_gap} were "
                "expected): method='em' scans all components in every pass"
            )

    @torch.no_grad()
    def _missed(self) -> float:
        """The mean of log p less its bound over rows trained on, in nats: of the guard's rows."""
        exact = self.guard.log_likelihood(self.mfa)
        return exact - self.guard.log_likelihood(self.mfa, self.scan_rows)

    # The E-step

    def expect(self, batch: Weighed, out: SufficientStatistics, unit: float | None = None) -> tuple[Any, Tensor]:
        """Adds the statistics of a batch, in whose weights 1 is `unit`.

        Returns:
            The active pairs of the rows, and the responsibilities of their slots times the weights, (n, S).
        """
        with torch.no_grad():
            x, weights, _ = batch
            parameters = self.mfa.parameters_in_compute_dtype()
            if weights is not None:
                weights = weights * (1.0 if unit is None else unit)
            elif unit is not None:
                weights = torch.full_like(x[:, 0], unit, dtype=parameters.means.dtype)
            active = self._scan(batch)
            return expectation(x, parameters, self.mfa.woodbury(), out, weights, active)

    def expect_alone(self, x: Tensor, out: SufficientStatistics, weights: Tensor) -> ActivePairs:
        """Adds the statistics of a few tokens that weigh (n,), by a scan that goes through no bounds."""
        parameters = self.mfa.parameters_in_compute_dtype()
        return expectation(x, parameters, self.mfa.woodbury(), out, weights)[0]

    def _scan(self, batch: Weighed) -> ActivePairs:
        return self.screening.scan(batch.rows)

    def _scan_held_out(self, index: Tensor) -> ActivePairs:
        return self.screening.scan(self.held_out[index])

    def _try_held_out(self, index: Tensor) -> ActivePairs:
        """The active pairs of some held-out rows under parameters that are only tried."""
        look = self.mfa.active_pairs if self.look is None else self.look
        return look(self.held_out[index])

    def _guarded(self) -> float:
        return self.guard.log_likelihood(self.mfa, self.scan_rows)

    def _own(self) -> MFA:
        """The components that this process scans."""
        return self.mfa

    def rows_at_once(self) -> int:
        """Rows that an E-step reads at once."""
        return max(_LEAST_BATCH, _BATCH_ELEMENTS // self.mfa.n_features)

    def zeros(self) -> SufficientStatistics:
        """The statistics of no token."""
        return SufficientStatistics.zeros(self.mfa.means, self.mfa.rank, self.mfa.log_noise.dim() == 2)

    def mass_of(self, s: SufficientStatistics) -> float:
        """Tokens behind the statistics."""
        return self.mfa.processes.totals(float(s.mass.sum()))[0]

    # The prior

    def choose_prior(self, s: SufficientStatistics) -> Prior:
        """Chooses the prior by the first statistics; the parameters are still those of the start."""
        if not self.mass_of(s) > 0:
            raise RuntimeError("fit: no row has a finite density; look at the scale of the activations")
        few = torch.arange(min(len(self.held_out), -(-_CHOICE_ROWS // self.processes.count)))
        weights = None if self.held_out_weights is None else self.held_out_weights[: len(few)]
        chooses = self.processes.totals(len(few))[0] > 0

        def nll() -> float:
            parts = [self._try_held_out(part).log_prob for part in few.split(EVALUATION_ROWS)]
            return nll_of(torch.cat(parts).double(), self.processes, weights)

        self.prior = choose_prior(self.mfa, s, self.covariance, nll if chooses else None)
        self.report.prior_strength = self.prior.strength
        assert self.objective_of_start is not None
        self.objective_of_start = self.objective_of_start[0], self._log_prior()
        return self.prior

    def _log_prior(self) -> float:
        """Computed once for each state: a pass asks for it at its end, and the next at its beginning."""
        if self.prior is None:
            return 0.0
        state = self.prior, [(p.data_ptr(), p._version) for p in self.mfa.parameters()]
        if self._known is None or self._known[0] is not state[0] or self._known[1] != state[1]:
            self._known = (*state, float(self.prior.log_density(self.mfa)))
        return self._known[2]

    # Checkpoints

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        basis, screening = self.screening.state()
        tensors |= {"covariance": self.covariance} | basis
        strengths = None if self.prior is None else [self.prior.strength, self.prior.tokens]
        searches = {"searches": self.search is not None}
        if self.search is not None and self.search.middles is not None:
            tensors["search.middles"] = self.search.middles
        return tensors, values | {"prior": strengths, "step": self.step, "batch": self.batch} | screening | searches

    def _like(self) -> dict[str, Tensor]:
        nowhere = self.mfa.means.detach().to("meta")
        statistics = SufficientStatistics.zeros(nowhere, self.mfa.rank, self.mfa.log_noise.dim() == 2)
        middles = nowhere.new_empty(groups_of(self.mfa.n_components), self.mfa.n_features)
        others = {"covariance": self.covariance, "search.middles": middles}
        return super()._like() | statistics_state(statistics) | others

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.covariance = tensors["covariance"].to(self.covariance, copy=True)
        self.prior = None if values["prior"] is None else Prior(self.covariance, *values["prior"])
        self.step, self.batch = values["step"], values["batch"]
        self.screening.load(tensors, values)
        self.search = self._search() if values.get("searches") else None  # of what the mixture was when it began
        if self.search is not None and "search.middles" in tensors:
            self.search.middles = tensors["search.middles"].to(self.mfa.means, copy=True)

    def _saved_statistics(self, tensors: Mapping[str, Tensor]) -> SufficientStatistics:
        device = self.mfa.means.device
        return SufficientStatistics(
            *(tensors[f"statistics.{f.name}"].to(device, copy=True) for f in fields(SufficientStatistics))
        )

    def _saved_overlap(self, tensors: Mapping[str, Tensor]) -> Overlap:
        overlap = Overlap(self.mfa.n_components)
        overlap.load(tensors, self.mfa.means.device)
        return overlap


@torch.no_grad()
def choose_prior(mfa: Mixture, s: SufficientStatistics, covariance: Tensor, nll: Callable[[], float] | None) -> Prior:
    """The prior whose M-step is best for held-out rows; the mixture is left as it was.

    Args:
        mfa: what the statistics were collected under.
        s: of the first pass.
        covariance: of the prior.
        nll: that of held-out rows under the mixture as it is; None: nothing is held out.
    """
    if nll is None:
        return Prior(covariance)
    before = [p.detach().clone() for p in mfa.parameters()]
    scores = {}
    for strength in STRENGTHS:
        maximize(mfa, s, Prior(covariance, strength))
        found = nll()
        scores[strength] = found if math.isfinite(found) else math.inf
        for parameter, kept in zip(mfa.parameters(), before):
            parameter.copy_(kept)
    return Prior(covariance, mfa.processes.agree(lambda: min(scores, key=scores.__getitem__)))


def statistics_state(s: SufficientStatistics) -> dict[str, Tensor]:
    """Statistics by the names they have in a checkpoint."""
    return {f"statistics.{field.name}": getattr(s, field.name) for field in fields(SufficientStatistics)}

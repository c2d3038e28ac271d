"""EM in batches: passes over all the rows, each followed by an M-step, for a maximum a posteriori.

The E-step is one scan (`mfa_kernels.mixture.screening`) and the statistics of its active pairs
(`mfa_kernels.ops.statistics`), the M-step is in closed form (`mfa_kernels.fitting.m_step`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.fitting.dead_regions import Overlap, Revival, find, hand_on, move
from mfa_kernels.fitting.em_base import EM, statistics_state
from mfa_kernels.fitting.guard import Scan
from mfa_kernels.fitting.m_step import Prior, maximize
from mfa_kernels.ops.statistics.op import SufficientStatistics

_TOLERANCE = 1e-5  # nats per token and feature that a pass has to gain
_OVERRELAXED = 1.9  # times EM's own step
_REVIVALS = 3  # passes that may move regions


class BatchEM(EM):
    """EM with one M-step per pass over all the rows; steps are nearly twice as long as EM's own: half the passes.

    Near convergence, a step scaled by a factor below 2 still shrinks the remaining error, most of which lies in
    directions that EM's own step shortens only a little (Salakhutdinov and Roweis, "Adaptive overrelaxed bound
    optimization methods", 2003). If a lengthened step lowers the log posterior, EM's own step is taken instead, so that
    the posterior does not fall between the steps that are kept, except where a region is moved.
    """

    scan_guard: Scan | None = None  # as `Guard.look` takes it
    revivals = 0  # passes that moved regions
    moved = 0  # regions that the last pass moved
    # Parameters after EM's own step, to return to if the step that went further lowers the posterior.
    plain_step: list[Tensor] | None = None
    may_lengthen = False  # true where the next step may go further than EM's, as the last one lowered no posterior
    partial: tuple[SufficientStatistics, Overlap] | None = None  # sums over the rows done in this pass
    rows_done = 0  # in this pass, of all processes

    def run(self) -> None:
        """Ends when a pass gains too little to matter, when patience runs out, or after `epochs` passes."""
        passes, every = self.settings.epochs, self.settings.eval_every or 1
        done, rows = self.step * len(self.rows) + self.rows_done, passes * len(self.rows)
        with self._bar("EM", rows, done) as bar:
            if not self.report.history:
                self._prepare_scans(passes)
                self._evaluate(0, 0, bar)
            for step in range(self.step + 1, passes + 1):
                statistics, overlap = self.e_step(bar)
                log_posterior = self.log_posterior(statistics)
                jumped = self.m_step(statistics, overlap, log_posterior, last=step == passes)
                self.report.settled = step < passes and not jumped and self._has_settled()
                ends = step == passes or self.report.settled
                self._prepare_scans(0 if ends else passes - step)
                if step % every == 0 or ends:
                    self._evaluate(step, step, bar)
                if ends or self._out_of_patience(finished=step == passes):
                    return
                self.step, self.rows_done, self.partial = step, 0, None
                self._save_if_due()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows = self.rows.sort().values  # the order does not matter, and a disk reads this one fastest
        self.log_posteriors: list[float] = []  # per token, before each M-step

    def e_step(self, bar: Any) -> tuple[SufficientStatistics, Overlap]:
        """Finishes the pass over the rows; returns the statistics of all its rows, and how far regions overlap."""
        # Bounds are gone if a checkpoint or a callback came since the last pass.
        self._prepare_scans(self.settings.epochs - self.step)
        s, overlap = self.partial = self.partial or (self.zeros(), Overlap(self.mfa.n_components))
        left = self.rows[self.rows_done :]
        batches = left.split(self.rows_at_once() * self.processes.count) if len(left) else ()
        for batch, read in zip(batches, self._read(iter(batches))):
            bar.update(len(batch))
            found = self._finite(read, count_skipped=self.step == 0)
            active, responsibilities = self.expect(found, s)
            overlap.add(active.components, responsibilities)
            self.tokens += len(found.rows)
            self.rows_done += len(batch)
            self._save_if_due()
        self._pool(s, overlap)
        return s, overlap

    def log_posterior(self, s: SufficientStatistics) -> float:
        """The log posterior of the parameters that the statistics were collected under, in nats per token."""
        if self.prior is None:
            self.choose_prior(s)
        tokens = self.mass_of(s)
        self.losses.append(-float(s.log_likelihood) / tokens)
        return (float(s.log_likelihood) + self._log_prior()) / tokens

    def m_step(self, s: SufficientStatistics, overlap: Overlap, log_posterior: float, last: bool) -> bool:
        """Updates the parameters. True if it moved regions, or went back to the parameters after EM's own step."""
        self.screening.parameters_moved()
        if self.plain_step is not None and not log_posterior >= self.log_posteriors[-1]:
            self._put(self.plain_step)
            self.plain_step, self.may_lengthen = None, False
            if self.moved:  # moving regions lowered the posterior, and would again: no more moves
                self.revivals = _REVIVALS
                self.report.revived_components -= self.moved
                self.moved = 0
            return True
        assert self.prior is not None
        self.moved = 0
        self.log_posteriors.append(log_posterior)
        before = self._copy()
        maximize(self.mfa, s, self.prior)
        own = None if last else self._copy()
        if own is not None and self.revivals < _REVIVALS and self._revive(s, overlap, self.prior, before):
            self.plain_step, self.may_lengthen = own, False
            return True
        self.plain_step = own if self.may_lengthen else None
        if self.plain_step is not None:
            with torch.no_grad():
                for parameter, old in zip(self.mfa.parameters(), before):
                    parameter.add_(parameter - old, alpha=_OVERRELAXED - 1)
        self.may_lengthen = True
        return False

    def _revive(self, s: SufficientStatistics, overlap: Overlap, prior: Prior, before: list[Tensor]) -> bool:
        """Moves dead regions after an M-step from the parameters `before`; false where there are none."""
        revival = find(self.mfa, s.mass, overlap, self.guard, scan=self.scan_guard)
        if not revival.moves:
            return False
        if revival.lost:  # their tokens are handed on to the other regions, and the M-step is repeated with them
            own = self._copy()
            self._put(before)
            if not hand_on(self.mfa, revival, s, self.expect_alone):
                self._put(own)
                return False
            maximize(self.mfa, s, prior)
        move(self.mfa, revival, self.covariance)
        self._moved(revival)
        self.revivals += 1
        self.moved = len(revival.moves)
        self.report.revived_components += self.moved
        return True

    def _moved(self, revival: Revival) -> None:
        """Regions were moved."""

    def _has_settled(self) -> bool:
        before, now = self.log_posteriors[-2:] if len(self.log_posteriors) > 1 else (-math.inf, math.inf)
        return abs(now - before) < _TOLERANCE * self.mfa.n_features

    def _parameters_changed(self) -> None:
        self.plain_step, self.may_lengthen = None, False

    def _prepare_scans(self, passes: int) -> None:
        """Decides how to scan the held-out rows and, where passes are to come, those of the next one."""
        rows = len(self.rows) // self.processes.count + len(self.held_out)
        self.screening.prepare(rows if passes else len(self.held_out), passes * rows)

    def _pool(self, s: SufficientStatistics, overlap: Overlap) -> None:
        """Adds up the sums of all processes, on each of them."""
        self.processes.sum_(*s.tensors())
        overlap.pool(self.processes)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        tensors["log_posteriors"] = torch.tensor(self.log_posteriors, dtype=torch.float64)
        if self.partial is not None:
            s, overlap = self.partial
            self._pool(s, overlap)
            # Process 0 now holds the sums of all; the others restart from zero, as after loading: nothing counts twice.
            if not self.processes.first:
                s.scale_(0)
                overlap.clear()
            tensors |= statistics_state(s) | overlap.state()
        tensors |= {f"plain.{i}": p for i, p in enumerate(self.plain_step or ())}
        return tensors, values | {
            "revivals": self.revivals, "moved": self.moved, "calm": self.may_lengthen, "seen": self.rows_done,
        }  # fmt: skip

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.log_posteriors, self.revivals = tensors["log_posteriors"].tolist(), values["revivals"]
        self.may_lengthen, self.rows_done, self.moved = values["calm"], values["seen"], values["moved"]
        self.plain_step = self._saved_parameters(tensors, "plain")
        if self.rows_done and self.processes.first:
            self.partial = self._saved_statistics(tensors), self._saved_overlap(tensors)

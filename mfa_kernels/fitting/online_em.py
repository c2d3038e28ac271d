"""EM online: an M-step every few rows, from statistics that forget, as for streams."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.fitting.candidate_search import CandidateSearch
from mfa_kernels.fitting.dead_regions import Overlap, Revival, find, hand_on, move
from mfa_kernels.fitting.em_base import EM, statistics_state
from mfa_kernels.fitting.m_step import Prior, maximize
from mfa_kernels.fitting.row_weights import Weighed
from mfa_kernels.fitting.run import shuffled
from mfa_kernels.fitting.streaming import RowQueue
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.statistics.op import SufficientStatistics

_ONLINE_ROWS = 16  # rows per component and step at least: fewer would cost more in M-steps than in the scan
_KAPPA = 0.6  # the step sizes are (t + t0)^-kappa, which converges above 0.5
_STREAM_EVALUATION = 20  # steps between evaluations on a stream, whose length is not known
_REVIVAL_ROWS = 64  # rows per component between two searches for dead regions


def online_rows(components: int, batch_size: int) -> int:
    """Rows of an online step."""
    return max(batch_size, _ONLINE_ROWS * components)


class OnlineEM(EM):
    """EM with an M-step after every batch of rows.

    The statistics s of a token are averaged by s <- (1 - eta) s + eta s_batch with eta = (t + t0)^-kappa (stochastic
    approximation EM: Cappe and Moulines, "On-line expectation-maximization", 2009), from those of the rows that the
    start was made of, which count as t0 batches.
    """

    statistics: SufficientStatistics  # running average per token over past batches, about the means `about`
    about: Tensor  # the means as they are, (K, D)
    epoch = 1  # the present pass
    start_batches = 1.0  # batches that the start rows are worth, t0

    def run(self) -> None:
        """Ends after `epochs` passes over the rows, or when patience runs out."""
        with self._bar("online EM", self.settings.epochs * len(self.rows), self._done()) as bar:
            self.begin(bar)
            for epoch in range(self.epoch, self.settings.epochs + 1):
                self.epoch, self.order = epoch, self.generator.get_state()
                order = shuffled(self.rows, self.batch_rows, self.generator)
                for batch in self._read(islice(order, self.batch, None), bar):
                    if self.do_step(batch, bar):
                        return
                self.batch = 0
            self.end(bar)

    def __init__(self, *args: Any, start_rows: Tensor, start_weights: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, start_rows=start_rows, start_weights=start_weights, **kwargs)
        self.start_rows: Tensor | None = start_rows  # until the first M-step
        self.start_weights = start_weights
        self.batch_rows = online_rows(self.mfa.n_components, self.settings.batch_size)
        self.every = self.settings.eval_every or self._default_every()
        self.overlap = Overlap(self.mfa.n_components)  # between regions, of the tokens in `counted`
        # Tokens of each region of this process since dead regions were looked for, (K,).
        self.counted = torch.zeros(len(self.mfa.means), dtype=torch.float64, device=self.mfa.means.device)
        self.order = self.generator.get_state()  # that the order of this pass is drawn from

    def _search(self) -> CandidateSearch | None:
        return CandidateSearch.where_it_pays(self.mfa, online_rows(self.mfa.n_components, self.settings.batch_size))

    def _prepare(self, rows: int, total: float) -> None:
        """Decides how to scan so many rows, where all components are."""
        if self.search is None:
            self.screening.prepare(rows, total)

    def _scan(self, batch: Weighed) -> ActivePairs:
        return super()._scan(batch) if self.look is None else self.look(batch.rows)

    def _scan_held_out(self, index: Tensor) -> ActivePairs:
        return super()._scan_held_out(index) if self.look is None else self.look(self.held_out[index])

    def begin(self, bar: Any) -> None:
        """Evaluates the start, and takes the first M-step, from the rows of the start."""
        if not self.report.history:
            rows = 0 if self.start_rows is None else len(self.start_rows)
            self._prepare(rows + len(self.held_out), self._to_come())
            self._evaluate(0, 0, bar)
        if self.start_rows is not None and self.settings.epochs:
            self._first_step(self.start_rows)
            self._save_if_due()

    def do_step(self, read: Weighed, bar: Any) -> bool:
        """One step on this process's share of a batch; true where patience has run out."""
        batch = self._finite(read, count_skipped=self.epoch == 1)
        self.batch += 1
        rows = int(self.processes.totals(len(batch.rows))[0])
        if not rows:
            return False
        self.step += 1
        self.e_step(batch, rows, (self.step + self.start_batches) ** -_KAPPA)
        self.m_step()
        if self.step % self.every == 0:
            self._prepare(len(batch.rows) + len(self.held_out), self._to_come())
            self._evaluate(self.step, self.epoch, bar)
            if self._out_of_patience(finished=False):
                return True
        self._save_if_due()
        return False

    def end(self, bar: Any) -> None:
        """Evaluates the last state, unless that was done."""
        if self.settings.epochs and (self.step % self.every or not self.step):
            self._prepare(len(self.held_out), 0)
            self._evaluate(self.step, self.epoch, bar)

    def _default_every(self) -> int:
        return -(-len(self.rows) // self.batch_rows)

    def _done(self) -> int:
        """Rows that this run was trained on before."""
        return (self.epoch - 1) * len(self.rows) + min(len(self.rows), self.batch * self.batch_rows)

    def _to_come(self) -> float:
        """Rows of the rest of the run."""
        return (self.settings.epochs + 1 - self.epoch) * len(self.rows) - self.batch * self.batch_rows

    def _rows_behind(self) -> float:
        return min((self.start_batches + self.step) * self.batch_rows, len(self.rows)) * self.mean_weight

    def _first_step(self, start_rows: Tensor) -> None:
        """Collects the statistics of the start rows, and takes the first M-step."""
        s, before, mass = self.zeros(), self.tokens, 0.0
        self._prepare(len(start_rows), self._to_come())  # again, where a checkpoint or a callback came between
        for batch in self._start_batches(start_rows):
            self.expect(batch, s)
            self.tokens += len(batch.rows)
            mass += batch.mass
        self.processes.sum_(*s.tensors())
        rows, mass = self.processes.totals(self.tokens - before, mass)
        self.start_rows = self.start_weights = None
        self._maximize(s, self.choose_prior(s))
        self.statistics.scale_(1 / mass)
        self.start_batches = max(1.0, rows / self.batch_rows)

    def _start_batches(self, start_rows: Tensor) -> Iterable[Weighed]:
        device, weights = self.mfa.means.device, self.start_weights
        parts = start_rows.split(self.rows_at_once())
        theirs = [None] * len(parts) if weights is None else weights.split(self.rows_at_once())
        for part, own in zip(parts, theirs):
            yield Weighed(part.to(device), None if own is None else own.to(device))

    def e_step(self, batch: Weighed, rows: int, eta: float) -> None:
        """Averages the statistics with those of a batch: this process's share of so many `rows`.

        They weigh as much as that many rows do on average: of batches of heavy rows, the statistics take up more.
        """
        x, weights, _ = batch
        s = self.statistics
        self._prepare(len(x), self._to_come())
        s.scale_(1 - eta if self.processes.first else 0)  # the past counts once
        unit, remembered = eta / (rows * self.mean_weight), s.mass.clone()
        active, responsibilities = self.expect(batch, s, unit)
        fresh = (s.mass - remembered) / unit
        self.processes.sum_(*s.tensors(), fresh)
        self.counted += fresh
        self.overlap.add(active.components, responsibilities / unit)
        has_density = active.components[:, 0] >= 0
        found = Weighed(active.log_prob[has_density].double(), None if weights is None else weights[has_density])
        total = float((found.rows if found.weights is None else found.rows * found.weights).sum())
        total, mass = self.processes.totals(total, found.mass)
        if mass:
            self.losses.append(-total / mass)
        self.tokens += len(x)

    def m_step(self) -> None:
        """Changes the parameters by the averaged statistics, and moves dead regions where that is due."""
        assert self.prior is not None
        # The prior is worth its tokens among all the rows there are, not among those that the statistics remember:
        # fewer of a long stream, and more where the same few rows come again and again.
        rows = self._rows_behind()
        prior = replace(self.prior, strength=self.prior.strength / rows, tokens=self.prior.tokens / rows)
        self._maximize(self.statistics, prior)
        due = _REVIVAL_ROWS * self.mfa.n_components
        tokens = self.mfa.processes.totals(float(self.counted.sum()))[0]
        if tokens >= due:
            if self._to_come() * self.mean_weight > due:
                self.overlap.pool(self.processes)
                self.revive(prior, tokens)
            self.counted.zero_()
            self.overlap = Overlap(self.mfa.n_components)

    def revive(self, prior: Prior, tokens: float) -> None:
        """Moves regions that own nothing of `tokens`, and makes the statistics agree with them.

        The M-step of the changed statistics leaves the regions where they were moved to.
        """
        mfa = self.mfa
        mass = self.statistics.mass  # remembers more steps than were counted
        owned = torch.maximum(self.counted, mass / self.mass_of(self.statistics) * tokens)
        found = find(mfa, self.counted, self.overlap, self.guard, owned, self.scan_rows)
        if not found.moves:
            return
        if found.lost:
            if not hand_on(mfa, found, self.statistics, self.expect_alone):
                return
            self._maximize(self.statistics, prior)
        touched = torch.tensor(found.touched, device=mfa.means.device) - mfa.first_component
        touched = touched[(touched >= 0) & (touched < len(mfa.means))]
        loadings = mfa.loadings.detach()[touched].double().mT
        explained = (loadings * self.statistics.cross[touched]).sum(1)  # the part of the squares that loadings explain
        move(mfa, found, self.covariance)
        self.report.revived_components += len(found.moves)
        self._reset_statistics(found, touched, explained)
        self.screening.parameters_moved()
        self.about = mfa.means.detach().clone()

    def _reset_statistics(self, found: Revival, k: Tensor, explained: Tensor) -> None:
        """Replaces the statistics of this process's regions `k` (n,), which were touched, by those that have the M-step
        at their parameters; `explained` (n, D) is what loadings explained of the squares before."""
        mfa, s = self.mfa, self.statistics
        mass = found.mass[k + mfa.first_component] / found.mass.sum() * self.mass_of(s)
        loadings = mfa.loadings.detach()[k].double().mT
        s.mass[k], s.shift[k], s.latent[k] = mass, 0.0, 0.0
        s.second[k] = mass[:, None, None] * torch.eye(mfa.rank, dtype=mass.dtype, device=mass.device)
        s.cross[k] = mass[:, None, None] * loadings
        spread = mass.unsqueeze(1) * loadings.square().sum(1)
        if s.squares.dim() == 2:
            s.squares[k] = spread + mass.unsqueeze(1) * mfa.noise_variance.detach()[k].double()
        else:  # the loadings explain another part of the squares; the noise is what it was
            s.squares.add_((spread - explained).sum(0)).clamp_(min=0)

    def _maximize(self, s: SufficientStatistics, prior: Prior) -> None:
        """The M-step; the statistics kept are about the new means."""
        s.move_(maximize(self.mfa, s, prior))
        self.statistics = s
        self.screening.parameters_moved()
        self.about = self.mfa.means.detach().clone()

    def _parameters_changed(self) -> None:
        if hasattr(self, "statistics"):
            self.statistics.move_(self.mfa.means.detach().double() - self.about)
            self.about = self.mfa.means.detach().clone()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        self.overlap.pool(self.processes)
        if not self.processes.first:  # process 0 now holds what all have counted, as after loading
            self.overlap.clear()
        tensors |= {"order": self.order, "counted": self.counted} | self.overlap.state()
        if self.start_rows is None:
            tensors |= {**statistics_state(self.statistics), "about": self.about}
        return tensors, values | {"known": self.start_batches, "epoch": self.epoch}

    def _like(self) -> dict[str, Tensor]:
        return super()._like() | {"order": self.order, "counted": self.counted, "about": self.mfa.means}

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.order = tensors["order"].clone()
        self.generator.set_state(self.order)
        self.start_batches, self.epoch = values["known"], values["epoch"]
        self.counted = tensors["counted"].to(self.counted, copy=True)
        if self.processes.first:
            self.overlap = self._saved_overlap(tensors)
        if "about" in tensors:
            self.start_rows = None
            self.about = tensors["about"].to(self.mfa.means, copy=True)
            self.statistics = self._saved_statistics(tensors)


class StreamedEM(OnlineEM):
    """Online EM of one pass over rows that come one after the other: `work` is called whenever more of them are there.

    Args:
        queue: the rows after those of the start, of this process.
    """

    bar: Any = None
    to_skip = 0  # batches that were used before the checkpoint

    def __init__(self, *args: Any, queue: RowQueue, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue = queue

    def work(self) -> bool:
        """Trains on the batches that are there; true where nothing is left to do."""
        if self.bar is None:
            self.bar, self.to_skip = self._bar("online EM", None, self._done()), self.batch
            self.begin(self.bar)
        rows = -(-self.batch_rows // self.processes.count)
        while self.settings.epochs and self.queue.holds(rows):
            x = self.queue.take(rows)  # none, where the stream of this process has ended before another's
            if self.to_skip:
                self.to_skip -= 1
                continue
            found = int(self.processes.totals(len(x))[0])
            if not found:
                self.end(self.bar)
                return True
            self.bar.update(found)
            if self.do_step(Weighed(x), self.bar):
                return True
        return not self.settings.epochs

    def leave(self) -> None:
        self.close()
        super().leave()

    def close(self) -> None:
        """Closes the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def _default_every(self) -> int:
        return _STREAM_EVALUATION

    def _to_come(self) -> float:
        return math.inf

    def _rows_behind(self) -> float:
        return (self.start_batches + self.step) * self.batch_rows

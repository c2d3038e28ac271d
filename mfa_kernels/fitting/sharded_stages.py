"""The stages of a fit whose processes share the components, where they differ from `Stages`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.data.source import picked
from mfa_kernels.fitting import preparation
from mfa_kernels.fitting.guard import OTHERS, Guard
from mfa_kernels.fitting.guard import ROWS as GUARD_ROWS
from mfa_kernels.fitting.m_step import covariance_rows
from mfa_kernels.fitting.run import Run
from mfa_kernels.fitting.sharded_checkpoint import ShardedCheckpoints
from mfa_kernels.fitting.sharded_em import ShardedBatchEM, ShardedOnlineEM
from mfa_kernels.fitting.stages import Stages
from mfa_kernels.fitting.start_from_mixture import start_from_mixture
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.sharded import ShardedMFA
from mfa_kernels.ops.common.finite import finite_rows

_OF_ROWS = ("init", "row_weights", "lr", "schedule", "polish", "ranks")  # facts that such a fit does not have


class ShardedStages(Stages):
    """A fit whose processes each hold some of the components, and read all rows: none of them holds the sample."""

    begun: ShardedMFA | None = None  # what it begins with, where a mixture is given

    def run(self, guard: Guard) -> Run:
        kind = ShardedBatchEM if self.method == "em" else ShardedOnlineEM
        start_rows, self.start_rows = self.start_rows, None
        assert start_rows is not None
        return kind(*self._arguments(guard, self.options), start_rows=start_rows, sample=self.sample)

    def guard(self) -> Guard:
        device, dtype = self.mfa.means.device, self.mfa.means.dtype
        self.start_rows = preparation.finite(self.source, self.sample[: covariance_rows(self.mfa)], device, dtype)
        unseen = preparation.finite(self.source, self.rows[self.n_start : self.n_start + OTHERS], device, dtype)
        return Guard(self.start_rows, device, unseen)

    def _check_start(self) -> None:
        """Spreads the mixture that is given, if it is not spread yet; the work is done where its components are."""
        asked, start = self.options, self.options.start
        if isinstance(start, MFA):
            start = start_from_mixture(start, asked.precision, asked.dtype, self.device)
            start = ShardedMFA.from_mfa(start, asked.process_group)
        if start is None:
            return
        found = (start.n_components, start.n_features, start.rank, start.noise, start.processes.count)
        expected = (asked.n_components, self.source.n_features, asked.rank, asked.noise, asked.group.count)
        if found != expected:
            raise ValueError(
                f"start must have (n_components, n_features, rank, noise, processes) = {expected}, got {found}"
            )
        self.begun, self.device = start, start.means.device

    def _facts(self) -> dict[str, Any]:
        facts = {name: fact for name, fact in super()._facts().items() if name not in _OF_ROWS}
        return facts if isinstance(self.options.start, MFA) else {**facts, "start": self.options.start is not None}

    def _open_checkpoints(self, folder: Path, facts: dict[str, Any]) -> None:
        asked = self.options
        checkpoints = ShardedCheckpoints(
            folder, asked.checkpoint_seconds, facts, asked.n_components, asked.noise, asked.group
        )
        self.checkpoints = checkpoints
        if asked.resume is not None:
            self.saved = checkpoints.load(asked.resume)

    def _read_start(self, index: Tensor, all_held: int) -> int:
        """Finds the rows of the start, which are read in each pass over them."""
        source, dtype, components = self.source, self.options.dtype, self.options.n_components
        if len(self.rows) < components:
            raise ValueError(
                f"n_components = {components} needs at least as many rows to train on, got {len(self.rows)}"
            )
        self.sample = index
        if source.dtype != dtype:  # K-means, in that of the source, would take rows that have no density in this one
            parts = [finite_rows(source.rows(part), dtype).cpu() for part in index.split(preparation.CHUNK_ROWS)]
            self.sample = index[torch.cat(parts)]
        return min(GUARD_ROWS, len(self.sample))

    def _first(self) -> ShardedMFA:
        if self.begun is not None:
            return self.begun
        return self._spread(self._of_clusters(picked(self.source, self.sample), processes=self.options.group))

    def _spread(self, own: MFA) -> ShardedMFA:
        return ShardedMFA(own, self.options.process_group)

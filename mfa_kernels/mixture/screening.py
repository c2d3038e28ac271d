"""Scans of many rows under parameters that stand still, through certified bounds where these pay (`ops.screen`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.ops.scan.op import log_prob
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs, activity_threshold
from mfa_kernels.ops.screen import neighbors as lists
from mfa_kernels.ops.screen import op
from mfa_kernels.ops.screen.cost import modelled_cost
from mfa_kernels.ops.screen.types import AnyScreen, Screen, ScreenedPairs
from mfa_kernels.ops.woodbury.types import Woodbury

SAMPLE = 512
"""Rows that `choose` looks at."""

_STAGE_0 = 5  # what stage 0 costs at most per coordinate, in rows of the dense scan
_APART = 1 << 16  # rows between two choices, each of which costs as much as a dense scan of some thousands
_DRIFT = 0.25  # of what a scan cost when its screen was chosen, from which on another choice is due


class Screening:
    """Scans rows for EM, whose parameters stand still for a pass or a large batch.

    Stage 0 of screening runs whenever the parameters change, if the rows to come under the new ones pay for it. Which
    coordinates the bounds use is chosen on a sample, and kept until the counts of what they leave have changed. Counts
    decide, not times, and `state` holds them: a run that goes on from there takes the same scans. Results are those of
    the dense scan, to rounding, which noise per component and a GPU always take.

    Args:
        mfa: whose parameters they are.
        sample: rows (n, D) like those to come, on its device; those of process 0 count.
        processes: who else scans; all of them call `prepare` and `state` together.
    """

    def __init__(self, mfa: MFA, sample: Tensor, processes: Processes = ALONE) -> None:
        self.mfa, self.processes = mfa, processes
        dtype, device = mfa.woodbury().scale.dtype, mfa.means.device
        self.sample = processes.agree(lambda: sample[:SAMPLE].to("cpu", dtype)).to(device).contiguous()
        self.basis: Tensor | None = None  # (D, p), where a choice was for screening
        self.cost = 1.0  # of a scan when it was chosen, in units of the dense scan
        self.since: float = _APART  # rows since the last choice
        self.decided = self.used = False  # for the parameters as they are
        self.rows, self.work = 0.0, 0.0  # scanned through bounds since they changed; in dense ones
        self._screen: tuple[Woodbury, AnyScreen] | None = None

    def parameters_moved(self) -> None:
        """Parameters are others now: what was decided for the old ones is over."""
        self.decided = self.used = False
        self._screen = None

    @torch.no_grad()  # with gradients, a mixture gives new factors at every call
    def prepare(self, rows: int, total: float) -> None:
        """Decides how rows are scanned until the parameters move; at most once for each state of them.

        Args:
            rows: to be scanned under these parameters.
            total: to be scanned in the rest of the run.
        """
        woodbury, count = self.mfa.woodbury(), self.mfa.n_components
        listed = count >= lists.LEAST_COMPONENTS and rows >= lists.ROWS_PER_COMPONENT * count
        if not self.decided:
            self.decided = True
            self._level()
            # Only the C++ kernels know bounds; those of noise per component are not used here.
            exact = self.mfa.precision != "reference"
            if woodbury.rows.dim() == 4 and not woodbury.per_component and exact and rows:
                if total >= _APART <= self.since and (self.basis is None or self._drifted()):
                    self._choose(woodbury, lists.FEATURES if listed else 16)
                saved = rows * (1 - self.cost)
                self.used = self.basis is not None and saved > _STAGE_0 * self.basis.shape[1]
            self.rows, self.work = 0.0, 0.0
        if not self.used:
            self._screen = None
        elif self._screen is None or self._screen[0] is not woodbury:
            parameters = self._parameters()
            screen = op.screen(*parameters, woodbury, basis=self.basis)
            if listed and isinstance(screen, Screen):
                screen = op.with_neighbors(screen, *parameters, woodbury)
            self._screen = woodbury, screen

    @torch.no_grad()
    def ready(self) -> bool:
        """Whether `scan` goes through bounds."""
        return self._screen is not None and self._screen[0] is self.mfa.woodbury()

    @torch.no_grad()
    def scan(self, x: Tensor) -> ActivePairs:
        """log p(x) and the active pairs of rows x (n, D)."""
        woodbury = self.mfa.woodbury()
        x = x.to(woodbury.scale.dtype).contiguous()
        self.since += len(x)
        if self._screen is None or not self.ready():
            return log_prob(x, *self._parameters(), woodbury)
        screened = self._scan(x, woodbury, self._screen[1])
        if len(x):
            self.rows += len(x)
            self.work += self._cost(screened) * len(x)
        return screened.active

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What later decisions depend on, for a checkpoint."""
        self._level()
        names = ("cost", "since", "decided", "used", "rows", "work")
        tensors = {} if self.basis is None else {"screening.basis": self.basis}
        return tensors, {"screening": {name: getattr(self, name) for name in names}}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Takes over what `state` gave; nothing, where that was of another number of processes."""
        for name, value in (values["screening"] or {}).items():
            setattr(self, name, value)
        self.basis = tensors["screening.basis"].clone() if "screening.basis" in tensors else None
        if self.basis is not None:
            features, dtype = self.mfa.n_features, self.sample.dtype
            if self.basis.dim() != 2 or len(self.basis) != features or self.basis.dtype != dtype:
                raise ValueError(f"screening.basis must be {dtype} of shape ({features}, p), got {self.basis.shape}")
        self._screen = None

    def _level(self) -> None:
        """Gives all processes the average of what they have counted: they decide alike, as after a checkpoint."""
        if self.processes.count > 1:
            counts = self.processes.totals(self.since, self.rows, self.work)
            self.since, self.rows, self.work = (count / self.processes.count for count in counts)

    def _parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        means, loadings, noise, log_weights = (p.detach() for p in self.mfa.parameters_in_compute_dtype())
        return means, loadings, noise, log_weights

    def _scan(self, x: Tensor, woodbury: Woodbury, screen: AnyScreen) -> ScreenedPairs:
        constants = woodbury.constants(self._parameters()[3])
        return op.scan(x, woodbury, constants, screen, activity_threshold(self.mfa.n_components, x.dtype), SLOTS)

    def _cost(self, screened: ScreenedPairs) -> float:
        assert self.basis is not None
        shape = self.mfa.n_components, self.mfa.n_features, self.mfa.rank, self.basis.shape[1]
        return modelled_cost(screened.evaluated, *shape)

    def _drifted(self) -> bool:
        """Whether the bounds left much more, or much less, under the parameters before these than when chosen."""
        return self.rows > 0 and abs(self.work / self.rows - self.cost) > _DRIFT * self.cost

    def _choose(self, woodbury: Woodbury, least: int) -> None:
        chosen = op.choose(self.sample, *self._parameters(), woodbury, least)
        self.since, self.cost = 0, 1.0
        self.basis = None if chosen is None else chosen.basis.contiguous()
        if chosen is not None:  # it is not kept: a run that goes on from a checkpoint can only prepare it anew
            self.cost = self._cost(self._scan(self.sample, woodbury, chosen))

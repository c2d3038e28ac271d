"""When screening is used instead of the dense scan: for models, EM, steering and interpretation.

`mfa_kernels.ops.screen` makes the bounds; this file decides whether they pay. Counts decide, never times: the same
tokens and parameters give the same decision on any machine whose dense scan begins in int8, and on any other.

    model      `MFA.screen` tunes the bounds once; a batch under parameters that have moved prepares them again, where
               `modelled_cost` of the last batch, stage 0 included, is below that of the dense scan
    EM         `Screening` knows how many rows are to come under the same parameters, and tunes again after a drift
    steering   a mixture too large for a cache is screened without being asked, because tokens come one by one
    interpret  a store of many rows is screened without being asked
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.ops.scan.op import log_prob, pairs_within
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs, activity_threshold
from mfa_kernels.ops.screen import op
from mfa_kernels.ops.screen.cost import dense_cost, modelled_cost
from mfa_kernels.ops.screen.types import AnyScreen, Screen, ScreenedPairs
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury

DRAWS = 256
"""Samples of the mixture that `MFA.screen` tunes itself on when no tokens are given."""

SAMPLE = 512
"""Rows that EM tunes the bounds on."""

_LONE_TOKEN_VALUES = 1 << 22  # 16 MB of component rows in float32 are more than a cache holds
_MANY_ROWS = 1 << 17  # stage 0 and tuning cost as much as the dense scan of some ten thousand
_STAGE_0 = 100  # the most that stage 0 costs EM: so many rows of the dense scan per coordinate of the bounds
_APART = 1 << 20  # EM tunes at most once per this many rows: tuning and stage 0 cost a dense scan of ten thousands
_DRIFT = 0.25  # EM tunes again when the measured cost differs from the cost at tuning time by this fraction


def pays_for_lone_tokens(woodbury: Woodbury) -> bool:
    """True where tokens that come one by one are worth screening unasked."""
    return woodbury.is_cpp and woodbury.rows.numel() >= _LONE_TOKEN_VALUES


def pays_for_rows(woodbury: Woodbury, rows: int) -> bool:
    """True where so many rows under the same parameters are worth screening unasked."""
    return woodbury.is_cpp and rows >= _MANY_ROWS


def cost(mfa: Mixture, evaluated: Tensor, screen: AnyScreen, tokens: int | None = None) -> float:
    """Cost of a token through the bounds, in units of its dense scan in float32; below `dense_cost`, bounds pay.

    Args:
        mfa: the mixture.
        evaluated: components computed per token, for a sample of tokens, (N,) int32.
        screen: the bounds, or any with as many coordinates.
        tokens: how many tokens share the cost of stage 0; None leaves it out.
    """
    kept, on_cpu = screen.basis.shape[1], isinstance(screen, Screen)
    return modelled_cost(evaluated, mfa.n_components, mfa.n_features, mfa.rank, kept, tokens, on_cpu=on_cpu)


class ModelScreen(NamedTuple):
    """The bounds of a mixture after `MFA.screen`.

    Attributes:
        woodbury: terms of the parameters that they were made from.
        screen: the bounds; None where the dense scan costs less.
        evaluated: components computed per token of the last batch, (N,) int32; None without bounds.
    """

    woodbury: Woodbury
    screen: AnyScreen | None = None
    evaluated: Tensor | None = None

    def following(self, mfa: Mixture, parameters: Parameters, woodbury: Woodbury, tokens: int) -> AnyScreen | None:
        """Returns the bounds of these parameters of `mfa`; None where the dense scan of so many tokens costs less."""
        if self.screen is None or self.evaluated is None:
            return self.screen
        limit, known = dense_cost(woodbury, tokens), self.woodbury is woodbury
        if known and limit == 1:
            return self.screen  # what was found to be below the dense scan
        if not tokens or cost(mfa, self.evaluated, self.screen, None if known else tokens) >= limit:
            return None
        return self.screen if known else op.refresh(self.screen, parameters, woodbury)


def tuned(mfa: Mixture, x: Tensor) -> ModelScreen:
    """Returns the bounds that cost least on tokens x (N, D).

    Args:
        mfa: the mixture; the call is made under `torch.no_grad`.
        x: (N, D), a few hundred tokens like those to come.
    """
    parameters, woodbury = mfa.prepared()
    x = x.to(parameters[0].dtype).contiguous()
    chosen = op.choose(x, parameters, woodbury) if len(x) else None
    return ModelScreen(woodbury) if chosen is None else ModelScreen(woodbury, chosen, _scan(mfa, x, chosen).evaluated)


def _scan(mfa: Mixture, x: Tensor, screen: AnyScreen, beyond: float = 0.0) -> ScreenedPairs:
    parameters, woodbury = mfa.prepared()
    constants = woodbury.constants(parameters[3])
    return op.scan(x, woodbury, constants, screen, activity_threshold(mfa.n_components, x.dtype) + beyond, SLOTS)


class Screening:
    """Scans rows for EM, whose parameters stand still for a pass or a large batch.

    Stage 0 of screening runs whenever the parameters change, if the rows to come under the new ones pay for it. Which
    coordinates the bounds use is chosen on a sample, and kept until the counts of what they leave have changed. Counts
    decide, not times, and `state` holds them: a run that resumes from there takes the same scans. Results are those of
    the dense scan, to rounding. Noise per component always takes the dense scan.

    Args:
        mfa: the mixture, or this process's components.
        sample: rows (n, D) like those to come, on its device; those of process 0 count.
        processes: the processes that scan; all of them call `prepare` and `state` together.
    """

    def __init__(self, mfa: Mixture, sample: Tensor, processes: Processes = ALONE) -> None:
        self.mfa, self.processes = mfa, processes
        dtype, device = mfa.woodbury().scale.dtype, mfa.means.device
        self.sample = processes.agree(lambda: sample[:SAMPLE].to("cpu", dtype)).to(device).contiguous()
        self.basis: Tensor | None = None  # (D, p); None where the dense scan costs less
        self.cost = 1.0  # per row at tuning time, in units of the dense scan
        self.since: float = _APART  # rows scanned since the bounds were tuned
        self.decided = self.used = False  # for the current parameters: has `prepare` decided, and for bounds?
        self.rows, self.work = 0.0, 0.0  # rows through bounds since the last decision, and their cost
        self._screen: tuple[Woodbury, AnyScreen] | None = None

    def parameters_moved(self) -> None:
        """Discards the bounds, and the decision made for the parameters before the change."""
        self.decided = self.used = False
        self._screen = None

    @torch.no_grad()  # with gradients, a mixture computes its Woodbury terms anew at every call
    def prepare(self, rows: int, total: float) -> None:
        """Decides how rows are scanned until the parameters move; at most once for each state of them.

        Args:
            rows: to be scanned under these parameters.
            total: to be scanned in the rest of the run.
        """
        woodbury = self.mfa.woodbury()
        if not self.decided:
            self.decided = True
            self._level()
            if op.serves(woodbury) and self.mfa.precision != "reference" and rows:  # not noise per component
                if total >= _APART <= self.since and (self.basis is None or self._drifted()):
                    self._choose()
                saved = rows * (dense_cost(woodbury, rows) - self.cost)
                self.used = self.basis is not None and saved > _STAGE_0 * self.basis.shape[1]
            self.rows, self.work = 0.0, 0.0
        if not self.used:
            self._screen = None
        elif self._screen is None or self._screen[0] is not woodbury:
            self._screen = woodbury, op.screen(self.mfa.prepared()[0], woodbury, basis=self.basis)

    @torch.no_grad()
    def ready(self) -> bool:
        """True where `scan` goes through bounds."""
        return self._screen is not None and self._screen[0] is self.mfa.woodbury()

    @torch.no_grad()
    def scan(self, x: Tensor, beyond: float = 0.0) -> ActivePairs:
        """Returns log p(x) and the active pairs of rows x (n, D), and those up to so many nats `beyond` the active
        ones."""
        parameters, woodbury = self.mfa.prepared()
        x = x.to(woodbury.scale.dtype).contiguous()
        self.since += len(x)
        if self._screen is None or not self.ready():
            if not beyond:
                return log_prob(x, *parameters, woodbury)
            return pairs_within(x, parameters, woodbury, activity_threshold(self.mfa.n_components, x.dtype) + beyond)
        screened = _scan(self.mfa, x, self._screen[1], beyond)
        if len(x):
            self.rows += len(x)
            self.work += cost(self.mfa, screened.evaluated, self._screen[1]) * len(x)
        return screened.active

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what later decisions depend on, for a checkpoint."""
        self._level()
        names = ("cost", "since", "decided", "used", "rows", "work")
        tensors = {} if self.basis is None else {"screening.basis": self.basis}
        return tensors, {"screening": {name: getattr(self, name) for name in names}}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Restores what `state` returned; the decisions of another number of processes are not restored."""
        for name, value in (values["screening"] or {}).items():
            setattr(self, name, value)
        basis = tensors.get("screening.basis")
        self.basis = None if basis is None else basis.to(self.sample.device, torch.float32)
        if self.basis is not None and (self.basis.dim() != 2 or len(self.basis) != self.mfa.n_features):
            shape = tuple(self.basis.shape)
            raise ValueError(f"screening.basis must have shape ({self.mfa.n_features}, p), got {shape}")
        self._screen = None

    def _level(self) -> None:
        """Gives all processes the average of what they have counted: they decide alike, as after a checkpoint."""
        if self.processes.count > 1:
            counts = self.processes.totals(self.since, self.rows, self.work)
            self.since, self.rows, self.work = (count / self.processes.count for count in counts)

    def _drifted(self) -> bool:
        """True where the measured cost per row differs from that at tuning time by more than `_DRIFT` of it."""
        return self.rows > 0 and abs(self.work / self.rows - self.cost) > _DRIFT * self.cost

    def _choose(self) -> None:
        parameters, woodbury = self.mfa.prepared()
        chosen = op.choose(self.sample, parameters, woodbury)
        self.since, self.cost = 0, 1.0
        self.basis = None if chosen is None else chosen.basis.contiguous()
        if chosen is not None:  # a run that resumes from a checkpoint can only prepare the bounds anew, so all do
            self.cost = cost(self.mfa, _scan(self.mfa, self.sample, chosen).evaluated, chosen)

"""Parts of fits on their own: settings, a stage, and the statistics of EM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.fitting import FitReport, as_source
from mfa_kernels.fitting.dead_regions import Overlap
from mfa_kernels.fitting.guard import Guard
from mfa_kernels.fitting.run import Settings
from mfa_kernels.ops.statistics.op import SufficientStatistics, expectation


def settings(**changes: Any) -> Settings:
    shown = {"callbacks": (), "log": None, "progress": False}
    plain = {"epochs": 1, "batch_size": 64, "lr": 1e-2, "schedule": "cosine", "eval_every": None, "patience": None}
    return Settings(**{**plain, **shown, **changes})


def stage(kind: type, mfa: MFA, x: Tensor, trained: int | None = None, **more: Any) -> Any:
    """A stage of this kind, on all rows of x: the first `trained` to train on, what is left held out."""
    rows, held_out = torch.arange(len(x))[:trained], x[len(x) if trained is None else trained :]
    generator = torch.Generator().manual_seed(0)
    return kind(mfa, as_source(x), rows, held_out, settings(), generator, FitReport(), Guard(x, x.device), **more)


def collect(mfa: MFA, x: Tensor, overlap: Overlap | None = None) -> SufficientStatistics:
    """Statistics of the tokens x; what regions share of them is added to `overlap`."""
    s = SufficientStatistics.zeros(mfa.means, mfa.rank, mfa.log_noise.dim() == 2)
    with torch.no_grad():
        active, r = expectation(x, mfa.parameters_in_compute_dtype(), mfa.woodbury(), s)
    if overlap is not None:
        overlap.add(active.components, r)
    return s

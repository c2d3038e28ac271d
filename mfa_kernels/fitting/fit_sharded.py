"""`fit_sharded`: the name that `fit(..., split="components")` had."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.files import StrPath
from mfa_kernels.fitting.fit import fit
from mfa_kernels.fitting.kmeans import KMeansResult
from mfa_kernels.fitting.sharded_em import em_step as em_step
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.sharded import ShardedMFA


def fit_sharded(
    activations: Any, n_components: int, rank: int = 10, *, method: str = "auto", noise: str = "shared",
    clusters: KMeansResult | Tensor | None = None, start: MFA | ShardedMFA | None = None, epochs: int = 10,
    batch_size: int = 1024, held_out: float = 0.05, eval_every: int | None = None, patience: int | None = 5,
    seed: int = 0, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
    precision: str = "exact", callbacks: Sequence[Callable[[Any, dict[str, Any]], Any]] = (),
    log: StrPath | None = None, checkpoint: StrPath | None = None, checkpoint_seconds: float = 60.0,
    resume: StrPath | bool = False, progress: bool = True, group: Any = None,
) -> ShardedMFA:  # fmt: skip
    """Calls `fit` with `split="components"`, which documents the arguments and the errors."""
    given: Any = dict(locals())
    warnings.warn("fit_sharded is fit(..., split='components') now", FutureWarning, stacklevel=2)
    spread: Any = fit(**given, split="components")
    return spread

"""The arguments of `fit`, checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common import checks
from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.fitting.adam import SCHEDULES
from mfa_kernels.fitting.initialization import INITS
from mfa_kernels.fitting.kmeans import KMeansResult
from mfa_kernels.fitting.preparation import checkpoint_folders
from mfa_kernels.fitting.run import Settings
from mfa_kernels.fitting.start_from_mixture import shape_given
from mfa_kernels.mixture.functional import PRECISIONS
from mfa_kernels.mixture.mfa import MFA, NOISES
from mfa_kernels.mixture.sharded import ShardedMFA, part_of

METHODS = ("sgd", "em", "truncated", "online", "auto")
SPREAD_METHODS = ("em", "online", "auto")
"""Those of a split into components."""
SPLITS = ("rows", "components")

_LEAST = {
    "n_components": 1, "rank": 0, "epochs": 0, "batch_size": 1, "polish": 0, "eval_every": 1, "patience": 1, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The arguments of a fit, checked; `fit` documents the fields.

    Attributes:
        group: the processes that fit together; `processes` are those of them that share the rows.
        checkpoint: the folder to write to; None: there is none.
        resume: the folder that holds a checkpoint to resume from; None: the fit begins anew.
    """

    split: str
    group: Processes
    n_components: int
    rank: int
    method: str
    noise: str
    init: str
    clusters: KMeansResult | Tensor | None
    start: MFA | ShardedMFA | None
    row_weights: Tensor | None
    polish: int
    held_out: float
    seed: int
    device: torch.device | None
    dtype: torch.dtype
    precision: str
    checkpoint: Path | None
    checkpoint_seconds: float
    resume: Path | None

    @property
    def process_group(self) -> Any:
        """The processes that fit together, as `fit` takes them."""
        return self.group.group if self.group.count > 1 else False

    @property
    def n_own(self) -> int:
        """Components that this process holds."""
        first, stop = part_of(self.n_components, self.group) if self.split == "components" else (0, self.n_components)
        return stop - first


def checked(given: Mapping[str, Any], streamed: bool = False) -> Options:
    """The arguments of `fit`, by name, as the work takes them.

    Args:
        given: all of them, but for the activations.
        streamed: true where the activations are an iterator that is fitted online.

    Raises:
        TypeError, ValueError, OSError: naming the argument that a fit cannot be given.
    """
    options = {name: value for name, value in given.items() if name != "activations"}
    spread = checks.check_choice(given["split"], SPLITS, "split") == "components"
    checks.check_choice(given["method"], SPREAD_METHODS if spread else METHODS, "method")
    checks.check_choice(given["init"], INITS, "init")
    checks.check_choice(given["schedule"], SCHEDULES, "schedule")
    options |= _shape(given, spread)
    checks.check_choice(options["noise"], NOISES, "noise")
    checks.check_choice(given["precision"], PRECISIONS, "precision")
    if checks.check_dtype(given["dtype"]) not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {given['dtype']}")
    options["held_out"] = checks.check_number(given["held_out"], "held_out")
    if not 0 <= options["held_out"] < 1:
        raise ValueError(f"held_out must be a share in [0, 1), got {given['held_out']!r}")
    for name, least in _LEAST.items():
        left_out = options[name] is None and name in ("eval_every", "patience")
        options[name] = None if left_out else checks.check_integer(options[name], name, least)
    # Absolute: the process may change folders meanwhile.
    log = None if given["log"] is None else checks.check_path(given["log"], "log").absolute()
    if log is not None and log.is_dir():
        raise IsADirectoryError(f"log must name a file, {given['log']} is a folder")
    options["lr"] = checks.check_positive(given["lr"], "lr")
    options["callbacks"] = checks.check_callables(given["callbacks"], "callbacks")
    progress = given["progress"]
    if not isinstance(progress, str):
        checks.check_flag(progress, "progress")
    options["device"] = device = None if given["device"] is None else checks.check_device(given["device"])
    if device is not None and device.type == "meta":
        raise ValueError("device must be one that holds values, got the meta device")
    group = Processes(given["group"])
    if spread:
        part_of(options["n_components"], group)
    places = given["checkpoint"], given["checkpoint_seconds"], given["resume"]
    options["checkpoint"], options["resume"] = group.agree(lambda: checkpoint_folders(*places))
    _check_possible(given, options["polish"], streamed, spread)
    options |= {
        "group": group, "processes": ALONE if spread else group, "log": log if group.first else None,
        "progress": bool(progress) and group.first, "label": f"{progress}, " if isinstance(progress, str) else "",
    }  # fmt: skip
    return Options(**options)


def _shape(given: Mapping[str, Any], spread: bool) -> dict[str, Any]:
    """K, R and the kind of noise, which may be those of the start."""
    names, start = ("n_components", "rank", "noise"), given["start"]
    if spread and isinstance(start, ShardedMFA):
        return {name: getattr(start, name) if given[name] is None else given[name] for name in names}
    others = {"init": given["init"] != "pca", "clusters": given["clusters"] is not None}
    shape = shape_given(start, given["n_components"], given["rank"], given["noise"], others)
    return dict(zip(names, shape))


def _check_possible(given: Mapping[str, Any], polish: int, streamed: bool, spread: bool) -> None:
    """Raises for what a stream, a method or a split has no room for."""
    if polish and (streamed or given["method"] == "sgd"):
        raise ValueError(f"polish must be 0 {'for an iterator' if streamed else 'with method sgd'}, got {polish}")
    if given["row_weights"] is not None and streamed:
        raise ValueError(
            "row_weights must be None for an iterator that is fitted online: give weighted rows as a whole"
        )
    if not spread:
        return
    if streamed:
        raise ValueError("split must be 'rows' for an iterator that is fitted online, got 'components'")
    refused = {"init": given["init"] != "pca", "polish": polish, "row_weights": given["row_weights"] is not None}
    for name in (name for name, is_given in refused.items() if is_given):
        raise ValueError(f"{name} must be left out with split = 'components', got {checks.shown(given[name])}")

"""The record of a fit: its settings, data, versions and machine, for `FitReport.run`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from mfa_kernels.common.processes import Processes
from mfa_kernels.common.sharing import shareable
from mfa_kernels.common.version import __version__
from mfa_kernels.data.source import Source
from mfa_kernels.fitting.checkpoint import plain

_OF_DATA = {"rows": "rows", "n_features": "n_features", "data": "fingerprint"}  # among the facts, and their names here
_NAMES = ("model", "tokenizer")
_KEPT = ("layer", "model_fingerprint", "weights_fingerprint")


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def run_of(
    facts: Mapping[str, Any],
    source: Source,
    device: torch.device,
    processes: Processes,
    *,
    began: str,
    asked: str,
    streamed: bool = False,
    spread: bool = False,
) -> dict[str, Any]:
    """The record of a fit, as JSON can hold it.

    Args:
        facts: what checkpoints compare, so that there is one list of settings; the number of processes in it is of
            streams.
        source: the data; what it says of itself is kept if it is a name, and no path (`mfa_kernels.common.sharing`).
        device: of the work.
        processes: that fit together.
        began: see `now`.
        asked: the method as it was asked for.
        streamed: whether the data is read once, as it comes.
        spread: whether the processes hold different components.
    """
    settings = {name: fact for name, fact in facts.items() if name not in (*_OF_DATA, "ranks")}
    data = {name: facts[fact] for fact, name in _OF_DATA.items()} | {"streamed": streamed}
    said = {name: source.meta[name] for name in (*_NAMES, *_KEPT) if isinstance(source.meta.get(name), str | int)}
    data |= {name: shareable(value) if name in _NAMES else value for name, value in said.items() if value != ""}
    machine = {
        "device": device.type, "name": _name(device), "processes": processes.count, "threads": torch.get_num_threads(),
    }  # fmt: skip
    settings = {"method_asked": asked, "spread": spread, **settings}
    return plain({"began": began, "settings": settings, "data": data, "versions": versions(), "machine": machine})


def versions() -> dict[str, str]:
    """The versions of what computes: this package, Python, PyTorch, NumPy, and Triton where it is installed."""
    found = {
        "mfa_kernels": __version__, "python": platform.python_version(), "torch": str(torch.__version__),
        "numpy": np.__version__,
    }  # fmt: skip
    try:
        return {**found, "triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        return found


def _name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = (line.partition(":") for line in file)
            found = next((value.strip() for name, _, value in lines if name.strip() == "model name"), "")
    except OSError:  # not on Linux
        found = ""
    return found or platform.processor() or platform.machine()

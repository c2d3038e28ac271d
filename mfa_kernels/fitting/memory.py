"""The memory that a fit needs, as planned before it starts and as measured while it runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

_LARGE = 1 << 30  # bytes of a plan that is worth a line


def plan(
    components: int, features: int, rank: int, noise: str, method: str, dtype: torch.dtype, rows: int,
    of_candidates: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Bytes of what a fit holds at once, by name; temporaries of its kernels, and the data itself, not included.

    Args:
        components, features, rank: K, D and R.
        noise: "shared" or "per_component".
        method: "sgd", "em", "truncated" or "online".
        dtype: of the parameters.
        rows: of the samples that the start is made of and that guard it, and of those held out, which are held for the
            length of the fit.
        of_candidates: bytes of the candidates of all rows.
    """
    of_noise = features if noise == "shared" else components * features
    parameters = (components * features * (rank + 1) + of_noise + components) * dtype.itemsize
    per_component = features * (rank + 1 + (noise != "shared")) + rank * rank
    found = {"parameters": parameters, "factors": components * per_component * dtype.itemsize}
    found["best parameters"] = parameters
    if method == "sgd":
        found |= {"gradients": parameters, "Adam": 2 * parameters}
    else:
        sums = 1 + features + rank + rank * rank + rank * features
        found["statistics"] = (components * sums + of_noise) * 8
        # Online, what moves the statistics to the new means; in batches, the steps before and beside it.
        found["steps"] = 2 * parameters if method in ("em", "truncated") else components * features * 8
    if of_candidates:
        found["candidates"] = of_candidates
    found["rows of the start, and held out"] = rows * features * dtype.itemsize
    return found


def line(planned: dict[str, int], what: str) -> str | None:
    """The plan in one line; None where it is small."""
    total = sum(planned.values())
    if total < _LARGE:
        return None
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in planned.items())
    return f"fit: {what} needs about {total / 1e9:.1f} GB: {parts}"


def tell(planned: dict[str, int], what: str) -> None:
    """Prints the line of a large plan on standard error."""
    told = line(planned, what)
    if told:
        print(told, file=sys.stderr)


def peak(device: torch.device) -> int | None:
    """The most bytes that this process has had so far: on a GPU those of its tensors there, else resident ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource  # on Linux, what it knows may be that of the process that started this one
    except ImportError:  # not a Unix
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024

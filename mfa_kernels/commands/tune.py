"""`mfa-kernels tune`: measures launch configurations of the kernels on one GPU, and keeps the faster.

One field of a configuration is varied at a time, from the default on: a dozen measurements per kernel and shape
instead of hundreds. A candidate that does not compile, does not fit the chip, or computes something else is left out.
The result is a JSON file that `mfa_kernels.ops.common.configs` prefers; nothing is ever tuned while a mixture is used.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels import ops
from mfa_kernels.common.checks import check_choice
from mfa_kernels.common.files import atomic_write_json
from mfa_kernels.common.locks import alone
from mfa_kernels.ops.common import backends, configs
from mfa_kernels.ops.kmeans.op import nearest
from mfa_kernels.ops.statistics.op import SufficientStatistics, accumulate

SHAPES = ((16384, 8192, 4096, 10), (16384, 1024, 2304, 10))
"""Shapes (N, K, D, R) that are measured by default."""

# Values to try, by kind and field. The scan's rows are padded to 64 features: no larger step.
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "scan": {
        "tokens": (64, 128), "width": (1, 2, 4), "features": (32, 64), "warps": (4, 8), "stages": (2, 3, 4),
        "swizzle": (4, 8, 16), "descriptors": (False, True),
    },
    "pairs": {"pairs": (2, 4, 8, 16), "features": (128, 256, 512), "warps": (2, 4, 8), "stages": (1, 2, 3, 4)},
    "gradient": {"pairs": (2, 4, 8, 16), "features": (128, 256, 512), "warps": (2, 4, 8), "stages": (1, 2, 3)},
    "dense": {
        "tokens": (4, 8, 16, 32), "components": (4, 8, 16), "features": (64, 128, 256), "warps": (4, 8),
        "stages": (1, 2),
    },
    "statistics": {"pairs": (2, 4, 8), "features": (128, 256, 512), "warps": (2, 4, 8), "stages": (1, 2, 3)},
    "nearest": {
        "tokens": (64, 128, 256), "centroids": (64, 128, 256), "features": (32, 64), "warps": (4, 8),
        "stages": (2, 3, 4), "swizzle": (4, 8, 16), "descriptors": (False, True),
    },
}  # fmt: skip
KINDS = configs.KINDS

_CACHE_BYTES = 1 << 28  # written between two calls: larger than any second-level cache
_SECONDS = 0.3  # of calls per candidate
_GAIN = 0.98  # of the best time so far: less than 2% faster is noise
_SAME = 1e-5  # relative difference to the default's result, by norm


class Trial(NamedTuple):
    """One candidate: its median time in seconds, or why there is none."""

    config: Any
    seconds: float
    error: str


def tune(
    kinds: Iterable[str] = tuple(KINDS),
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    device: torch.device | str = "cuda",
    *,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measures configurations on `device` and writes those that beat the default to the user's file.

    Args:
        kinds: of kernels: "scan", "pairs", "gradient", "dense", "statistics", "nearest".
        shapes: (N, K, D, R) of the mixtures; a result serves every shape in the same buckets of N and K.
        device: a CUDA device; the CPU rehearses, under Triton's interpreter.
        report: gets one line per candidate.

    Returns:
        The JSON file, in `mfa_kernels.ops.common.configs.tuned_folder()`. Entries for other shapes are kept.

    Raises:
        ValueError: an unknown kind, or a device that the Triton kernels do not serve.
    """
    device, kinds = torch.device(device), [check_choice(kind, tuple(KINDS), "kind") for kind in kinds]
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("tuning measures a GPU, and torch finds no CUDA device")
    if backends.serving(torch.empty(1, device=device), 1) != "triton":
        raise ValueError(f"tuning measures the Triton kernels, and they do not serve {device} here")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = configs.tuned_folder() / configs.file_name(name)
    _entries(path)  # raises now where they cannot be read
    for shape in shapes:
        problem = workloads(shape, device)
        for kind in kinds:
            start = configs.default(KINDS[kind], configs.architecture(device), *shape[:2])
            report(f"{kind}, (N, K, D, R) = {tuple(shape)}")
            best = search(start, problem[kind], device, report)
            key = configs.key(KINDS[kind], *shape[:2])
            with alone(path.parent):  # after every kernel: what is measured is not lost, here and by another process
                entries = _entries(path)
                entries.pop(key, None)
                if best != start:
                    entries[key] = dataclasses.asdict(best)
                atomic_write_json(path, entries)
    configs.tuned_entries.cache_clear()
    return path


def _entries(path: Path) -> dict[str, Any]:
    return configs.read(path) if path.exists() else {}


def search(
    start: Any, workload: Callable[[], list[Tensor]], device: torch.device, report: Callable[[str], None]
) -> Any:
    """Returns the fastest configuration when one field varies at a time; `start` where nothing beats it clearly."""
    with configs.override(start):
        expected = [t.clone() for t in workload()]
    best = measure(start, workload, expected, device)
    if best.error:
        raise RuntimeError(f"the default configuration {start} does not run: {best.error}")
    report(f"  {1e3 * best.seconds:.3f} ms, the default {start}")
    for field, values in CHOICES[configs.name_of(type(start))].items():
        if not hasattr(start, field):
            continue
        for value in values:
            if value == getattr(best.config, field):
                continue
            trial = measure(dataclasses.replace(best.config, **{field: value}), workload, expected, device)
            took = trial.error or f"{1e3 * trial.seconds:.3f} ms"
            report(f"  {took}, with {field}={value}")
            if trial.seconds < _GAIN * best.seconds:
                best = trial
    return best.config


def measure(config: Any, workload: Callable[[], list[Tensor]], expected: list[Tensor], device: torch.device) -> Trial:
    """Returns the time of a workload with a cold second-level cache, if it computes what it should."""
    with configs.override(config):
        try:
            found = workload()
            wrong = next((i for i, (a, b) in enumerate(zip(found, expected)) if not _same(a, b)), None)
        except Exception as error:  # whatever the compiler or the driver refuses
            return Trial(config, math.inf, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        if wrong is not None:
            return Trial(config, math.inf, f"wrong: output {wrong} differs from the default's")
        return Trial(config, median_seconds(workload, device), "")


def _same(found: Tensor, expected: Tensor) -> bool:
    difference, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return bool(difference <= _SAME * size)  # NaN is not


def median_seconds(workload: Callable[[], Any], device: torch.device) -> float:
    """Returns the median seconds of a call, by CUDA events on a GPU; on a CPU, those of one call."""
    if device.type != "cuda":
        before = time.perf_counter()
        workload()
        return time.perf_counter() - before
    flush = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)
    times: list[float] = []
    with torch.cuda.device(device):
        while len(times) < 5 or (sum(times) < _SECONDS and len(times) < 30):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.fill_(len(times))
            start.record()
            workload()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


@torch.no_grad()
def workloads(shape: tuple[int, int, int, int], device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    """Returns calls that launch each kind of kernel, on a mixture that responds near one-hot: kind -> call."""
    n, k, d, r = shape
    generator = torch.Generator(device).manual_seed(0)
    like: dict[str, Any] = {"device": device, "generator": generator}
    means = torch.randn(k, d, **like) * math.sqrt(200 / d)  # neighbours about 200 nats apart
    loadings = torch.randn(k, d, r, **like) * d**-0.5
    noise, log_weights = 0.5 + torch.rand(d, **like), torch.full((k,), -math.log(k), device=device)
    owner = torch.randint(k, (n,), **like)
    x = (means[owner] + noise.sqrt() * torch.randn(n, d, **like)).bfloat16()
    parameters = means, loadings, noise
    woodbury = ops.factorize(*parameters, means.mean(0))
    active = ops.log_prob(x, *parameters, log_weights, woodbury)
    every, needs = torch.arange(n, device=device), [False, True, True, True, True]
    upstream = torch.full_like(active.log_prob, 1 / n), torch.zeros_like(active.logits)
    saved = *woodbury.tensors(), *active

    def gradient() -> list[Tensor]:
        backward = torch.ops.mfa_kernels.log_prob_backward
        return list(backward(*upstream, x, *parameters, log_weights, *saved, needs))[1:]

    def statistics() -> list[Tensor]:
        out = SufficientStatistics.zeros(means, r, False)
        accumulate(x, owner.int().unsqueeze(1), torch.ones(n, 1, device=device), woodbury, out)
        return out.tensors()[:6]

    return {
        "scan": lambda: [ops.log_prob(x, *parameters, log_weights, woodbury, exact=False).log_prob],
        "pairs": lambda: [ops.latents(x, every, owner.int(), *parameters, woodbury)],
        "gradient": gradient,
        "dense": lambda: [ops.component_log_prob(x, *parameters, woodbury)],
        "statistics": statistics,
        "nearest": lambda: list(nearest(x, means - woodbury.center, woodbury.center)),
    }


def add_arguments(parser: Any) -> None:
    """Adds the options of `mfa-kernels tune` to an argparse parser."""
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), help="kernels to measure")
    parser.add_argument(
        "--shape", nargs=4, type=int, action="append", metavar=("N", "K", "D", "R"),
        help="tokens, components, features and rank; can be given several times",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda")


def main(arguments: Any) -> None:
    """Runs `mfa-kernels tune` with the options of `add_arguments`."""
    shapes = [tuple(shape) for shape in arguments.shape] if arguments.shape else SHAPES
    path = tune(arguments.kinds, shapes, arguments.device, report=lambda line: print(line, flush=True))
    print(f"written: {path}")

"""How fast the scan is here, beside matrix products: what `mfa-kernels doctor` prints, in about a second."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mfa_kernels import ops
from mfa_kernels.ops.common.products import yardsticks
from mfa_kernels.ops.woodbury.types import Parameters

_SHAPE = 1024, 512, 512, 10  # N, K, D, R: 6 GFLOP as one product
_SECONDS = 0.6  # of all rounds; two at least


def processor() -> str:
    """The processor's name for itself, with its number of cores."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def _problem() -> tuple[Tensor, Parameters]:
    """Tokens and the parameters of a mixture that responds near one-hot."""
    tokens, components, features, rank = _SHAPE
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(components, features, generator=generator)
    loadings = torch.randn(components, features, rank, generator=generator) * (9 / features) ** 0.5
    x = means[torch.arange(tokens) % components] + torch.randn(tokens, features, generator=generator)
    log_weights = torch.full((components,), -math.log(components))
    return x, Parameters(means, loadings, torch.ones(features), log_weights)


def least_times(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds, the least of as many rounds as there is time for, everything in turn."""
    times, begin, rounds = dict.fromkeys(functions, math.inf), time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - begin < _SECONDS:
        for name, function in functions.items():
            since = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - since)
        rounds += 1
    return times


@torch.no_grad()
def rates() -> list[tuple[str, str]]:
    """Rows (what, rate) of the scan of the C++ kernels on a CPU; the kernels have to be built."""
    tokens, components, features, rank = _SHAPE
    x, parameters = _problem()
    woodbury = ops.factorize(*parameters[:3], parameters.means.mean(0))
    in_float = dataclasses.replace(woodbury, int8=())
    functions: dict[str, Callable[[], object]] = {
        **yardsticks(tokens, components * (rank + 1), features),
        "float32": lambda: ops.log_prob(x, *parameters, in_float),
    }
    if woodbury.int8 and woodbury.int8[0].numel():
        functions["int8"] = lambda: ops.log_prob(x, *parameters, woodbury)
    times = least_times(functions)
    yardstick = min(("torch.mm", "oneDNN"), key=times.__getitem__)
    flops = 2 * tokens * components * (rank + 1) * features

    def of(name: str) -> str:
        return f"{times[name] / times[yardstick]:.2f} of the yardstick's time"

    product = f"{flops / times[yardstick] / 1e9:.0f} GFLOP/s by {yardstick}, a product of the scan's size (yardstick)"
    slower = next(name for name in ("torch.mm", "oneDNN") if name != yardstick)
    return [
        ("matrix products", f"{product}; {slower} takes {times[slower] / times[yardstick]:.2f} of its time"),
        ("scan in float32", of("float32")),
        ("scan, int8 first", of("int8") if "int8" in times else "not here: the processor multiplies no int8"),
    ]

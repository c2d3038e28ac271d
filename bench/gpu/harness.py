"""The clock: CUDA events, medians, rotating inputs, peak memory; and wall time where there is no GPU to rehearse on."""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SETS = 3
"""Input sets that calls rotate through; each is larger than the second-level cache."""
_LEAST, _MOST = 5, 50

Results = dict[str, dict[str, Any]]
"""What the cases found, by name."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the range it was found in."""

    median: float
    fastest: float
    slowest: float
    repeats: int


class Bench:
    """The device that is measured and the time that is left.

    Args:
        device: "cuda", or "cpu" to rehearse.
        minutes: for everything.
    """

    def __init__(self, device: str, minutes: float) -> None:
        self.device = torch.device(device)
        self.rehearsal = self.device.type != "cuda"
        self.building: subprocess.Popen[bytes] | None = None  # the CUDA library, beside what runs
        self._start = time.monotonic()
        self._seconds = 60 * minutes

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def remaining(self) -> float:
        """Seconds that are left."""
        return self._seconds - self.elapsed

    @property
    def cache_bytes(self) -> int:
        """Returns the size of the second-level cache; 0 where it is not known."""
        return 0 if self.rehearsal else getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)

    def median(self, call: Callable[[int], Any], seconds: float = 1.5) -> Timing:
        """The median time of call(0), call(1), ...: after a warm-up, at least five calls, for about `seconds`."""
        for i in range(SETS):  # compiles, allocates
            call(i)
        self.synchronize()
        before = time.perf_counter()
        call(0)
        self.synchronize()
        once = time.perf_counter() - before
        repeats = _LEAST if self.rehearsal else min(_MOST, max(_LEAST, int(seconds / max(once, 1e-6))))
        if self.rehearsal:
            times = [self._wall(call, i) for i in range(repeats)]
        else:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
            for i, (start, stop) in enumerate(events):
                start.record()
                call(i % SETS)
                stop.record()
            self.synchronize()
            times = [start.elapsed_time(stop) / 1e3 for start, stop in events]
        return Timing(statistics.median(times), min(times), max(times), repeats)

    def graph(self, call: Callable[[int], Any], seconds: float = 0.5) -> Timing:
        """The same as a replayed CUDA graph of one call, without the host's time between kernels."""
        if self.rehearsal:
            return self.median(call, seconds)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(SETS):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        graphs = []
        for i in range(SETS):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(i)
            graphs.append(graph)
        return self.median(lambda i: graphs[i].replay(), seconds)

    def peak(self, call: Callable[[int], Any]) -> int:
        """Bytes that a warm call allocates at its peak, above what was there before: outputs and temporaries."""
        call(0)
        if self.rehearsal:
            return 0
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(1)
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free_bytes(self) -> int:
        """Memory that a case may still take."""
        return 1 << 28 if self.rehearsal else torch.cuda.mem_get_info()[0]

    def synchronize(self) -> None:
        """Waits for the device."""
        if not self.rehearsal:
            torch.cuda.synchronize()

    def clean(self) -> None:
        """Gives unused memory back, so that one case does not starve the next."""
        if not self.rehearsal:  # where there is little to give, and to look for it takes longer than the case
            gc.collect()
            torch.cuda.empty_cache()

    def _wall(self, call: Callable[[int], Any], i: int) -> float:
        before = time.perf_counter()
        call(i % SETS)
        return time.perf_counter() - before


@dataclass(frozen=True)
class Case:
    """A measurement.

    Attributes:
        estimate: seconds it takes, about: it is skipped where fewer are left.
        run: (bench, results so far, folder for logs) -> what was found.
    """

    name: str
    estimate: float
    run: Callable[[Bench, Results, Path], dict[str, Any]]

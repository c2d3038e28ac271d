"""What a timing does not say: where a call's time goes, kernel by kernel, and what the chip does meanwhile."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.harness import Bench

_KERNELS = 12  # of a call, that are listed
FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
COMMAND = ("nvidia-smi", "-i", "0", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", "-lms", "200")


def profiled(bench: Bench, call: Callable[[int], Any]) -> dict[str, Any]:
    """Device time of a warm call, in microseconds by kernel, the longest first; launches, and the host's time.

    In a rehearsal it is the host's time by operator.
    """
    activities = [ProfilerActivity.CPU] if bench.rehearsal else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    for i in range(2):  # the first start of the profiler takes long
        bench.synchronize()
        with profile(activities=activities) as found:
            began = time.perf_counter()
            call(i)
            host = time.perf_counter() - began
            bench.synchronize()
    attribute = "self_cpu_time_total" if bench.rehearsal else "self_device_time_total"
    kind = torch.autograd.DeviceType.CPU if bench.rehearsal else torch.autograd.DeviceType.CUDA
    events = [event for event in found.key_averages() if event.device_type == kind]
    events.sort(key=lambda event: -getattr(event, attribute))
    kernels = {event.key[:80]: float(getattr(event, attribute)) for event in events[:_KERNELS]}
    total = sum(float(getattr(event, attribute)) for event in events)
    return {
        "kernels_us": kernels, "kernels_total_us": total, "launches": sum(event.count for event in events),
        "host_us": 1e6 * host,
    }  # fmt: skip


class Sampler:
    """Clocks, power and temperature, five times a second, by nvidia-smi; nothing where there is none.

    Products at 700 W and a kernel at 60% of them do not share a clock: a percentage means little without these.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._lines: list[tuple[float, str]] = []
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self._process = None
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process is not None
        for line in self._process.stdout or ():
            self._lines.append((time.monotonic(), line.strip()))

    def since(self, began: float) -> dict[str, Any]:
        """What was seen since a time of `time.monotonic`: medians, the most, and every reason for a lower clock."""
        seen = [line.split(", ") for when, line in list(self._lines) if when >= began]
        seen = [values for values in seen if len(values) == len(FIELDS)]
        columns: list[list[float]] = [[_number(values[i]) for values in seen] for i in range(4)]
        if not seen:
            return {}
        clock, memory, power, temperature = ([v for v in column if v == v] or [float("nan")] for column in columns)
        return {
            "samples": len(seen), "sm_mhz": statistics.median(clock), "memory_mhz": statistics.median(memory),
            "watts": statistics.median(power), "watts_most": max(power), "celsius_most": max(temperature),
            "reasons": sorted({values[4] for values in seen}),
        }  # fmt: skip

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return float("nan")

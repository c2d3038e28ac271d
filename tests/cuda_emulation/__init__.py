"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against `cuda_on_cpu.h`, with the real library's functions.

A launch walks its blocks one after the other, and a block's threads are fibers: slow and deterministic. What it cannot
show is what only a GPU has: its own rounding of tensor sums, weak memory, speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Chip(NamedTuple):
    """What launches are planned by."""

    processors: int
    shared_per_block: int
    shared_per_processor: int


H100 = Chip(132, 232_448, 233_472)
A100 = Chip(108, 166_912, 167_936)


class Plan(NamedTuple):
    """ScanPlan of csrc/cuda/few_tokens.cuh."""

    group: int
    token_groups: int
    blocks: int
    splits: int
    shared: int


def build() -> ctypes.CDLL:
    """Compiles the kernels for the CPU, once for these sources."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or "g++"
    kernels = cpp.source_folder("cuda")
    files = [
        *sorted(kernels.glob("*.cuh")),
        *sorted(kernels.glob("*.h")),
        *sorted(HERE.glob("*.h")),
        HERE / "kernels.cpp",
    ]
    digest = hashlib.sha256(b"\0".join([" ".join([compiler, *FLAGS]).encode(), *(f.read_bytes() for f in files)]))
    target = cpp.cache_folder() / "cuda_emulation" / f"{digest.hexdigest()[:16]}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS, f"-I{HERE}", f"-I{kernels}", str(HERE / "kernels.cpp"), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.replace(target)
    return ctypes.CDLL(str(target))


def _pointers(*values: Tensor | int | float | Chip) -> list[object]:
    """ctypes arguments; 64-bit integers have to be said."""
    out: list[object] = []
    for value in values:
        if isinstance(value, Chip):
            out.append((ctypes.c_int * 3)(*value))
        elif isinstance(value, Tensor):
            assert value.is_contiguous()
            out.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, float):
            out.append(ctypes.c_float(value))
        else:
            out.append(ctypes.c_int(value))
    return out


class Emulation:
    """The functions that csrc/cuda/bindings.cpp binds, for CPU tensors, as if on a GPU like `chip`.

    With `descending`, threads and blocks run in the opposite order: results must not change by a bit.
    """

    def __init__(self, chip: Chip = H100, descending: bool = False) -> None:
        self.kernels, self.chip, self.descending = build(), chip, descending

    def _run(self, name: str, *values: Tensor | int | float | Chip) -> None:
        self.kernels.emulate_descending(int(self.descending))
        status = getattr(self.kernels, name)(*_pointers(*values))
        assert status == 0, f"{name}: cudaError {status}"

    def woodbury(self, means: Tensor, loadings: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        components, features, rank = loadings.shape
        rows = means.new_empty(components, rank + noise_variance.dim(), features)
        out = rows, means.new_empty(components, rank, rank), means.new_empty(components)
        self._run(
            "emulate_woodbury", self.chip, means, loadings, noise_variance, *out, components, features, rank,
            int(noise_variance.dim() == 2),
        )  # fmt: skip
        return out

    def woodbury_tile(self, features: int, rank: int) -> int:
        """Features in shared memory at a time."""
        return self.kernels.woodbury_tile_of(*_pointers(self.chip, features, rank))

    def scan(
        self, x: Tensor, scale: Tensor, center: Tensor, scan_rows: Tensor, scan_scales: Tensor, offsets: Tensor,
        squares: Tensor, bounds: Tensor, constants: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (tokens, features), components, rank = x.shape, constants.shape[0], offsets.shape[1]
        logits = constants.new_empty(tokens, components)
        out = logits, torch.empty_like(logits), constants.new_empty(tokens, dtype=torch.int32)
        self._run(
            "emulate_scan", self.chip, DTYPES[x.dtype], x, scale, center, scan_rows, scan_scales, offsets, squares,
            bounds, constants, *out, tokens, components, features, scan_rows.shape[-1], rank,
        )  # fmt: skip
        return out

    def scan_plan(self, tokens: int, components: int, padded: int, rank: int) -> Plan:
        plan = torch.empty(5, dtype=torch.int64)
        self.kernels.scan_plan_of(*_pointers(self.chip, tokens, components, padded, rank, plan))
        return Plan(*plan.tolist())

    def few_tokens(
        self, x: Tensor, rows: Tensor, scale: Tensor, center: Tensor, scan_rows: Tensor, scan_scales: Tensor,
        offsets: Tensor, squares: Tensor, bounds: Tensor, constants: Tensor, threshold: float, slots: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        scanned = self.scan(x, scale, center, scan_rows, scan_scales, offsets, squares, bounds, constants)
        return self.finish(x, scale, rows, constants, *scanned, threshold, slots)

    def finish(
        self, x: Tensor, scale: Tensor, rows: Tensor, constants: Tensor, logits: Tensor, bounds: Tensor,
        arrivals: Tensor, threshold: float, slots: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        tokens, components = logits.shape
        out = (
            constants.new_empty(tokens),
            constants.new_empty(tokens, slots, dtype=torch.int32),
            constants.new_empty(tokens, slots),
            constants.new_empty(tokens, dtype=torch.int32),
        )
        exact = constants.new_empty(tokens, 16)
        self._run(
            "emulate_finish", DTYPES[x.dtype], x, scale, rows, constants, logits, bounds, exact, arrivals, *out,
            tokens, components, x.shape[1], rows.shape[1] - 1, slots, float(threshold),
        )  # fmt: skip
        return out

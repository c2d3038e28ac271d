"""python -m bench.memory: peak growth of the resident set over one training step at N=K=4096, D=384, R=10 (Linux)."""

from __future__ import annotations

from pathlib import Path

import torch

from bench import baselines
from mfa_kernels import MFA


def peak_growth(shape: tuple[int, int, int, int]) -> float:
    """MB by which a training step raises the resident set at its peak: factors, gradients and all temporaries."""
    x, (means, loadings, noise_variance, log_weights) = baselines.problem(shape)
    mfa = MFA.from_parameters(means, loadings, noise_variance, log_weights.exp())
    MFA(2, 4, 1)(torch.zeros(3, 4)).backward()  # libraries and thread pools
    reset_peak()
    before = status("VmRSS")
    mfa(x).backward()
    return (status("VmHWM") - before) / 1024


def reset_peak() -> None:
    """Lets the high-water mark start again from here."""
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """kB of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    shape = (4096, 4096, 384, 10)
    n, k, d, r = shape
    print(f"N={n} K={k} D={d} R={r}: the step grows the resident set by {peak_growth(shape):.0f} MB at its peak")
    print(f"  (gradients alone {4 * (k * d * (r + 1)) / 1e6:.0f} MB, N x K x R floats {4 * n * k * r / 1e6:.0f} MB)")

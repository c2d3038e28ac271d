"""Screening against the dense fused scan and the GEMM [N, D] x [D, K (R + 1)] of the same run, on a CPU.

    python -m bench.bench_screen [--threads 2] [--repeats 3]

Ratios of the smallest of several times, taken in turns, so that what else the machine does weighs on all three alike.
Mixtures as in bench/screen_survivors.py: fitted to activations of the small language model; 32,768 components grown
from 4,096 by splitting; and, for what screening costs where it cannot help, one that was never trained.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.screen_survivors import fitted, split
from mfa_kernels import MFA
from mfa_kernels.demo import timed
from mfa_kernels.ops import native
from mfa_kernels.ops.screen import op
from mfa_kernels.ops.select.op import SLOTS, activity_threshold

GEMM_COLUMNS = 4096 * 11
"""Columns of the GEMM at a time: 32,768 components at once would need gigabytes."""


def smallest_times(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds, the least of `repeats`, the functions taking turns."""
    times = {name: float("inf") for name in functions}
    for _ in range(repeats + 1):  # the first round warms up, and counts when it is the fastest
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - begin)
    return times


def measure(name: str, mfa: MFA, x: Tensor, repeats: int) -> None:
    """Prints a line for each of three p."""
    count, features, rank = mfa.n_components, mfa.n_features, mfa.rank
    means, loadings, noise, log_weights = (p.detach() for p in mfa.parameters_in_compute_dtype())
    factors = mfa.factors()
    constants = factors.constants(log_weights)
    threshold = activity_threshold(count, x.dtype)
    columns = count * (rank + 1)
    chunks = -(-columns // GEMM_COLUMNS)
    right = torch.randn(features, columns // chunks)
    product = torch.empty(len(x), right.shape[1])

    def gemm() -> None:
        for _ in range(chunks):
            torch.mm(x, right, out=product)

    def dense() -> tuple[Tensor, ...]:
        return native.library().select(x, factors.rows, constants, factors.scale, False, threshold, SLOTS)

    log_prob, _, _, counts = dense()
    print(f"\n{name}: N={len(x)} K={count} D={features} R={rank}, {counts.double().mean():.2f} components active")
    for kept in sorted({op.default_features(features), -(-features // 192) * 16, -(-features // 64) * 16}):
        screen, seconds = timed(lambda: op.screen(means, loadings, noise, log_weights, factors, kept))  # noqa: B023
        basis = screen.basis
        _, again = timed(lambda: op.screen(means, loadings, noise, log_weights, factors, basis=basis))  # noqa: B023
        screened = partial(op.select, x, factors, constants, screen, threshold, SLOTS)
        found = screened()
        times = smallest_times({"gemm": gemm, "dense": dense, "screened": screened}, repeats)
        computed = found.evaluated[found.evaluated >= 0].double()
        facts = {
            "of the GEMM": f"{times['screened'] / times['gemm']:.3f}",
            "of the dense scan": f"{times['screened'] / times['dense']:.3f}",
            "dense of the GEMM": f"{times['dense'] / times['gemm']:.2f}",
            "GEMM ms": f"{1e3 * times['gemm']:.0f}",
            "computed, mean": f"{computed.mean():.2f}",
            "tokens by the dense scan": f"{(found.evaluated < 0).double().mean():.2%}",
            "largest certificate": f"{found.dropped.max():.1e}",
            "log p(x) off by": f"{(found.active.log_prob - log_prob).abs().max():.1e}",
            "stage 0 ms": f"{1e3 * seconds:.0f}, {1e3 * again:.0f} with its basis",
        }
        print(f"  p={kept:4d}  " + "   ".join(f"{key} {value}" for key, value in facts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["small", "large", "grown", "untrained"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mfa_kernels_screen")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        if "small" in options.only:
            mfa, x = fitted(512, 256, options.folder)
            measure("fitted", mfa, x, options.repeats)
        if {"large", "grown"} & set(options.only):
            mfa, x = fitted(4096, 768, options.folder)
            if "large" in options.only:
                measure("fitted", mfa, x[:2048].contiguous(), options.repeats)
            if "grown" in options.only:
                mfa = split(mfa, 8)
                x = mfa.sample(512, generator=torch.Generator().manual_seed(1))
                measure("grown by splitting", mfa, x, options.repeats)
        if "untrained" in options.only:
            mfa = MFA(1024, 768, 10)
            measure("untrained", mfa, torch.randn(2048, 768), options.repeats)


if __name__ == "__main__":
    main()

"""Passes of EM against K: scans of all components, and truncated E-steps.

    python -m bench.bench_truncated [--only 512 2048] [--methods em truncated] [--epochs 6] [--two-levels-from K]

SmolLM2, layer 18 (bench/real.py): 200,000 rows to fit, 20,000 of other documents to judge by. All fits of a K begin
with the same start. Seconds a pass are medians over the passes after the first, which finds the candidates; the first
is beside them, the choice of a prior included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import torch

from bench import activations
from bench.race import HELD_OUT, processor
from mfa_kernels import fit
from mfa_kernels.fitting import stages
from mfa_kernels.fitting.em import BatchEM
from mfa_kernels.fitting.kmeans.two_levels import FEWEST
from mfa_kernels.fitting.run import mean_nll
from mfa_kernels.fitting.truncated_em import TruncatedEM


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which notes how long each call takes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = function(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return found

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    activations.add_arguments(parser)
    parser.add_argument("--only", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--methods", nargs="+", default=["em", "truncated"], choices=["em", "truncated"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--two-levels-from", type=int, default=FEWEST, help="K from which K-means has two")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x, test = activations.chosen(options).split()
    x, test = x[: options.tokens].contiguous(), test[:HELD_OUT].contiguous()
    print(f"{processor()}, {options.threads} threads, {len(x):,} rows\n")
    columns = ["K", "E-steps", *(f"{what}, s" for what in ("first pass", "E-step", "M-step", "other", "a pass"))]
    print("| " + " | ".join([*columns, "held out, nats", "missed", "prior"]) + " |")
    print("|" + "---|" * 10)
    for components in options.only:
        began = time.perf_counter()
        with mock.patch.object(stages, "FEWEST", options.two_levels_from):
            start = fit(x, components, epochs=0, progress=False)
        spent = time.perf_counter() - began
        for method in options.methods:
            seconds: dict[str, list[float]] = defaultdict(list)
            kind = TruncatedEM if method == "truncated" else BatchEM
            with (
                mock.patch.object(kind, "e_step", timed(kind.e_step, seconds["e"])),
                mock.patch.object(kind, "m_step", timed(kind.m_step, seconds["m"])),
            ):
                mfa = fit(x, start=start, method=method, epochs=options.epochs, patience=None, progress=False)
            report = mfa.fit_report
            at = [record["seconds"] for record in report.history]
            passes = [b - a for a, b in pairwise(at)]
            each = statistics.median(passes[1:])
            e, m = (statistics.median(seconds[part][1:]) for part in ("e", "m"))
            gap = "" if report.candidate_gap is None else f"{report.candidate_gap:.3f}"
            row = [components, method, f"{passes[0]:.1f}", f"{e:.2f}", f"{m:.2f}", f"{each - e - m:.2f}", f"{each:.2f}"]
            row += [f"{mean_nll(mfa, test):.2f}", gap, f"{report.prior_strength:g}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
        parts = ", ".join(f"{name} {took:.1f} s" for name, took in start.fit_report.seconds.items())
        print(f"K = {components}: {spent:.1f} s before these fits: {parts}", flush=True)


if __name__ == "__main__":
    main()

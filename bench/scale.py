"""The paper's scale: one pass over millions of activations that nobody could keep, in one process.

    python -m bench.scale --tokens 10_000_000 --out bench/results/scale-8192.json

A row of the stream is the centroid of a real token's cluster plus what another real token of the same region differs
by from the centroid of its own: clusters are K of the rows of SmolLM2, layer 18 (bench/real.py), regions groups of
clusters that lie near each other. So the stream has the regions, the residuals and the weights of the real rows, and
next to no row twice. Making rows is not counted, in time or in memory: what they are made from is there before the fit.
Rows to judge by are activations of other documents, as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import activations
from bench.memory import reset_peak, status
from bench.race import HELD_OUT, processor
from mfa_kernels import MFA, fit, kmeans
from mfa_kernels.common.files import atomic_write_text
from mfa_kernels.data.source import as_source
from mfa_kernels.fitting.kmeans.two_levels import two_levels
from mfa_kernels.fitting.run import mean_nll

_BATCH = 1 << 14  # rows that come at once
_CLUSTERS_PER_REGION = 16


class Stream:
    """Batches of rows, for as long as is wanted.

    Args:
        x: (n, D), real rows.
        clusters: how many they are cut into.
        tokens: rows of the stream.

    Attributes:
        seconds: that making rows has taken.
        made: rows that were made.
    """

    def __init__(self, x: Tensor, clusters: int, tokens: int, seed: int = 0) -> None:
        found = two_levels(as_source(x), clusters, progress=False)
        regions = kmeans(found.centroids, max(1, clusters // _CLUSTERS_PER_REGION), progress=False).assignment
        self.centroids, self.cluster = found.centroids, found.assignment
        self.residuals = x.sub_(self.centroids[self.cluster])
        self.region = regions[self.cluster]
        self.order = self.region.argsort(stable=True)
        counts = self.region.bincount(minlength=int(regions.max()) + 1)
        self.first, self.counts = counts.cumsum(0) - counts, counts
        self.tokens, self.generator = tokens, torch.Generator().manual_seed(seed)
        self.seconds, self.made = 0.0, 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.made < self.tokens:
            began = time.perf_counter()
            count = min(_BATCH, self.tokens - self.made)
            token = torch.randint(len(self.cluster), (count,), generator=self.generator)
            region = self.region[token]
            place = (torch.rand(count, generator=self.generator, dtype=torch.float64) * self.counts[region]).long()
            other = self.order[self.first[region] + place]
            rows = self.centroids[self.cluster[token]] + self.residuals[other]
            self.made += count
            self.seconds += time.perf_counter() - began
            yield rows


def run(x: Tensor, test: Tensor, components: int, rank: int, tokens: int) -> dict[str, Any]:
    """Fits a mixture to the stream; returns what was measured."""
    stream = Stream(x, components, tokens)
    print(f"the stream is there: {status('VmRSS') / 1e6:.2f} GB resident", flush=True)
    reset_peak()
    before, began, curve = status("VmRSS"), time.perf_counter(), []

    def note(mfa: MFA, record: dict[str, Any]) -> None:
        point = {
            "tokens": stream.made, "seconds": time.perf_counter() - began - stream.seconds,
            "held_out_nll": record["held_out_nll"], "peak_gb": (status("VmHWM") - before) / 1e6,
        }  # fmt: skip
        curve.append(point)
        print("  " + ", ".join(f"{name} {value:,.6g}" for name, value in point.items()), flush=True)

    mfa = fit(iter(stream), components, rank, callbacks=[note], progress=False)
    seconds = time.perf_counter() - began - stream.seconds
    report = mfa.fit_report
    return {
        "tokens": stream.made, "seconds": seconds, "tokens_per_second": stream.made / seconds,
        "making_rows": stream.seconds, "stages": report.seconds, "method": report.method,
        "peak_gb": (status("VmHWM") - before) / 1e6, "resident_before_gb": before / 1e6,
        "candidate_gap": report.candidate_gap, "held_out_nll": report.held_out_nll,
        "nll_of_documents": mean_nll(mfa, test), "live": report.live_components, "curve": curve,
    }  # fmt: skip


def told(report: dict[str, Any]) -> str:
    """The lines that are printed; what 100 million tokens take is the pace of the tokens after the first tenth."""
    found, settings = report["found"], report["settings"]
    later = [point for point in found["curve"] if point["tokens"] >= found["tokens"] / 10]
    lines = [
        f"K={settings['components']} R={settings['rank']} D={settings['features']}, {found['tokens']:,} tokens, "
        f"{settings['processor']}, {settings['threads']} threads",
        f"{found['seconds']:.0f} s, {found['tokens_per_second']:,.0f} tokens/s "
        f"(making the rows took {found['making_rows']:.0f} s more), by stage: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["stages"].items()),
        f"{found['peak_gb']:.2f} GB at the peak, beyond what the rows are made from "
        f"({found['resident_before_gb']:.2f} GB)",
        f"candidates missed {found['candidate_gap']}, held out {found['held_out_nll']:.2f}, "
        f"other documents {found['nll_of_documents']:.2f} nats, {found['live']} regions live",
    ]
    if len(later) > 1:
        first, last = later[0], later[-1]
        pace = (last["seconds"] - first["seconds"]) / (last["tokens"] - first["tokens"])
        minutes = (found["seconds"] + pace * (1e8 - found["tokens"])) / 60
        lines.append(f"a token {pace * 1e6:.1f} us once it runs: 100 million take {minutes:.0f} minutes")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    activations.add_arguments(parser)
    parser.add_argument("-K", "--components", type=int, default=8192)
    parser.add_argument("-R", "--rank", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x, test = activations.chosen(arguments).split()
    test = test[:HELD_OUT].clone()
    settings = {
        "components": arguments.components, "rank": arguments.rank, "features": x.shape[1],
        "processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }  # fmt: skip
    report = {
        "settings": settings, "found": run(x, test, arguments.components, arguments.rank, arguments.tokens)
    }  # fmt: skip
    print(told(report))
    if arguments.out is not None:
        atomic_write_text(arguments.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Candidates by a search against scans of all components: time a row, and what candidates miss.

    python -m bench.bench_search [-K 512 2048 8192]

SmolLM2, layer 18 (bench/real.py): mixtures after one truncated pass over 200,000 rows, R=10, shared noise; rows of
other documents. Times are medians of interleaved rounds; the search's terms, which are made once for each state of the
parameters, are beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from bench import activations
from bench.race import processor
from mfa_kernels import fit
from mfa_kernels.fitting.candidate_search import CandidateSearch
from mfa_kernels.ops.common.products import yardsticks

_ROWS, _CHECKED, _ROUNDS = 1 << 14, 1 << 12, 5


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    activations.add_arguments(parser)
    parser.add_argument("-K", "--components", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x, test = activations.chosen(options).split()
    x, test = x[:200_000].contiguous(), test[:_ROWS].contiguous()
    print(f"{processor()}, {options.threads} threads\n")
    columns = "K", "scan of all, us a row", "of a product", "search and scan, us a row", "of it the search"
    print("| " + " | ".join([*columns, "terms, ms", "missed, nats"]) + " |\n|" + "---|" * 7, flush=True)
    for components in options.components:
        with torch.enable_grad():
            mfa = fit(x, components, 10, epochs=1, method="truncated", progress=False)
        search, few = CandidateSearch(mfa), test[:_CHECKED]
        missed = search.missed(few)  # makes the terms of these parameters, and of the scan
        works: dict[str, Callable[[], Any]] = {
            **yardsticks(_CHECKED // 8, components * 11, x.shape[1]),
            "all": lambda mfa=mfa, few=few: mfa.active_pairs(few),
            "both": lambda search=search: search.scan(test),
            "search": lambda search=search: search.candidates(test),
        }  # fmt: skip
        taken: dict[str, list[float]] = defaultdict(list)
        for _ in range(_ROUNDS):
            for name, work in works.items():
                taken[name].append(seconds(work))
        rows = {"all": _CHECKED, "both": _ROWS, "search": _ROWS}
        pace = {name: statistics.median(taken[name]) / rows.get(name, _CHECKED // 8) * 1e6 for name in works}
        product = min(pace["torch.mm"], pace["oneDNN"])
        again = CandidateSearch(mfa, search.middles)  # in the groups that there are, as after every M-step
        terms = seconds(lambda again=again, few=few: again.candidates(few[:1])) * 1e3
        row = components, pace["all"], pace["all"] / product, pace["both"], pace["search"], terms, missed
        print("| {} | {:.0f} | {:.2f} | **{:.0f}** | {:.0f} | {:.0f} | {:.3f} |".format(*row), flush=True)


if __name__ == "__main__":
    main()

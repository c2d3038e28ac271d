"""python -m bench.table FILE.json: ratios to the yardstick of each group, from pytest-benchmark's JSON, as Markdown."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def ratios(report: dict) -> str:
    """One row per benchmark, one column per shape: median time over that of the faster product in the same run."""
    groups: dict[str, dict[str, float]] = {}
    flops: dict[str, float] = {}
    for entry in report["benchmarks"]:
        name = entry["name"].split("[")[0].removeprefix("test_")
        seconds = entry["stats"]["median"] * entry["extra_info"].get("scale", 1)
        groups.setdefault(entry["group"], {})[name] = seconds
        flops[entry["group"]] = entry["extra_info"]["flops"]
    floor = {title: min(group[name] for name in ("gemm", "onednn") if name in group) for title, group in groups.items()}
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    lines = ["| median time / yardstick | " + " | ".join(groups) + " |", "|---|" + "---|" * len(groups)]
    for name in names:
        cells = [f"{group[name] / floor[title]:.2f}" if name in group else "" for title, group in groups.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rates = [f"{floor[g] * 1e3:.0f} ms, {flops[g] / floor[g] / 1e9:.0f} GFLOP/s" for g in groups]
    lines.append("| (the yardstick itself) | " + " | ".join(rates) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(ratios(json.loads(Path(sys.argv[1]).read_text())))

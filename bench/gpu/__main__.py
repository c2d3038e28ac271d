"""python3 -m bench.gpu: every measurement on a GPU in nine minutes; JSON, and a short table last.

python3 -m bench.gpu --stage 1     # 90 seconds: what is wrong, so that it can be mended
python3 -m bench.gpu --stage 2     # the measurements, within 7 minutes; goes on in the same file
python3 -m bench.gpu               # both, one after the other, where the first finds nothing wrong
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import STAGES
from bench.gpu.harness import Bench, Case, Results
from bench.gpu.watch import Sampler
from mfa_kernels.common.files import atomic_write_json
from mfa_kernels.ops.common import configs

_HIDDEN = (
    "ms_fastest",
    "ms_slowest",
    "repeats",
    "error_nats",
    "traceback",
    "profile",
    "kernels_us",
    "one_token",
    "chip",
)


def marks(results: Results) -> list[tuple[str, str, str]]:
    """(what, the mark, what was measured) for the figures that decide."""

    def at(case: str, key: str) -> Any:
        return results.get(case, {}).get(key)

    def shown(value: Any, pattern: str) -> str:
        return "not measured" if value is None else pattern.format(value)

    exact, fast = at("scan llama K=8192", "ms"), at("scan, fast llama K=8192", "ms")
    large = at("scan llama K=32768", "temporaries_mb")
    of_dense = results.get("screened scan over dense scan llama K=8192", {})
    screened = [value for key, value in of_dense.items() if key.endswith("_of_dense")]
    gated = at("steered decode step llama K=8192", "gated_graph_ms_percent")
    if gated is None:
        gated = at("steered decode step llama K=8192", "gated_ms_percent")
    passed, failed = at("gpu tests", "passed"), at("gpu tests", "failed")
    return [
        ("dense scan, N=16384 K=8192 D=4096 R=10, of the bf16 matmul rate", ">= 75%",
         shown(at("scan llama K=8192", "percent_of_bf16_matmul"), "{:.1f}%")),
        ("the same, precision=\"fast\"", "", shown(at("scan, fast llama K=8192", "percent_of_bf16_matmul"), "{:.1f}%")),
        ("exact / fast", "<= 1.08", shown(exact and fast and exact / fast, "{:.3f}")),
        ("screened scan / dense scan", "<= 0.25", shown(min(screened, default=None), "{:.2f}")),
        ("gated decode step / unsteered, of an 8B-shaped model", "<= 1.05",
         shown(None if gated is None else 1 + gated / 100, "{:.3f}")),
        ("training step / scan", "", shown(at("step llama K=8192", "ratio_to_scan"), "{:.2f}")),
        ("EM pass / scan", "", shown(at("EM pass llama K=8192", "ratio_to_scan"), "{:.2f}")),
        ("K-means iteration / fp16 matmul of its flops", "",
         shown(at("k-means iteration llama K=8192", "ratio_to_product"), "{:.2f}")),
        ("one token, K=8192 D=4096, of the copy bandwidth", ">= 75%",
         shown(at("few tokens llama K=8192", "n1_percent_of_copy"), "{:.1f}%")),
        ("temporaries, N=16384 K=32768 D=4096", "< 1 GB", shown(large and large / 1e3, "{:.2f} GB")),
        ("plain PyTorch / ours, log_prob", "", shown(at("plain llama K=8192", "times_our_scan"), "{:.1f}x")),
        ("plain PyTorch / ours, step", "", shown(at("plain llama K=8192", "times_our_step"), "{:.1f}x")),
        ("torch.compile of it / ours, log_prob", "",
         shown(at("plain, compiled llama K=8192", "times_our_scan"), "{:.1f}x")),
        ("torch.compile of it / ours, step", "",
         shown(at("plain, compiled llama K=8192", "times_our_step"), "{:.1f}x")),
        ("families of kernels refused at their first use", "0", shown(at("doctor --check", "refused"), "{}")),
        ("tests marked gpu", "all", shown(passed, f"{{}} passed, {failed} failed")),
    ]  # fmt: skip


def table(results: Results, device: str) -> str:
    """The marks, as Markdown."""
    lines = [f"| | mark | {device} |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {mark} | {value} |" for what, mark, value in marks(results))])


def one_line(found: dict[str, Any]) -> str:
    """Returns the findings of a case, short enough for a terminal."""
    few = {key: value for key, value in found.items() if key not in _HIDDEN and value not in (None, "")}
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {str(v).splitlines()[0]}" for k, v in few.items()
    )


def finite(value: Any) -> Any:
    """JSON has no NaN: None instead."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_bad(found: dict[str, Any]) -> bool:
    """True where a case failed, or a family of kernels or a test did."""
    return bool("error" in found or found.get("failed") or found.get("refused"))


class Report:
    """The JSON file: written after every case, so that a run that is cut off keeps what it has."""

    def __init__(self, path: Path, device: str, goes_on: bool) -> None:
        self.path, self.device = path, device
        self.results: Results = {}
        if goes_on and path.exists():  # of the first stage
            self.results = json.loads(path.read_text())["results"]

    def write(self) -> None:
        report = {"device": self.device, "results": self.results, "marks": marks(self.results)}
        atomic_write_json(self.path, finite(report))


def run(bench: Bench, cases: list[Case], report: Report, sampler: Sampler) -> None:
    """Runs cases; each failure is kept with its traceback, and the others run all the same."""
    results = report.results
    lost = ""  # what an illegal access leaves of a process: every later call on the device fails too
    for case in cases:
        before, began = bench.elapsed, time.monotonic()
        if bench.remaining < case.estimate + 5:
            results[case.name] = {"skipped": "out of time"}
        elif lost and case.name != "gpu tests":  # those have a process of their own
            results[case.name] = {"error": f"not run: the device was lost in {lost!r}"}
        else:
            try:
                results[case.name] = case.run(bench, results, report.path.parent)
            except Exception as error:  # the other cases are worth having all the same
                trace = traceback.format_exc()
                results[case.name] = {"error": f"{type(error).__name__}: {error}", "traceback": trace}
        found = results[case.name]
        if chip := sampler.since(began):
            found["chip"] = chip
        line = f"skipped: {found['skipped']}" if found.get("skipped") == "out of time" else one_line(found)
        print(f"[{bench.elapsed:5.0f} s] {case.name} ({bench.elapsed - before:.1f} s): {line}", flush=True)
        report.write()
        try:
            bench.clean()
        except Exception:
            lost = lost or case.name


def main(argv: list[str] | None = None) -> int:
    """Runs the cases; 1 where one failed."""
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "bench/results"))
    parser.add_argument("--stage", type=int, choices=sorted(STAGES), help="only this one")
    parser.add_argument("--anyway", action="store_true", help="the second stage, whatever the first finds")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--minutes", type=float, help="9, or 2 and 7 for a stage alone")
    parser.add_argument("--rehearse", action="store_true", help="every case at toy sizes on the CPU")
    given = parser.parse_args(argv)

    def is_wanted(case: Case) -> bool:  # ceilings are what percentages are of: they run whatever is chosen
        return not given.only or case.name == "ceilings" or any(text in case.name for text in given.only)

    stages = [list(filter(is_wanted, STAGES[n])) for n in sorted(STAGES) if given.stage in (None, n)]
    if given.list:
        print("\n".join(f"{case.name}  (about {case.estimate:.0f} s)" for cases in stages for case in cases))
        return 0
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device; --rehearse runs toy sizes on the CPU")
    minutes = {None: 9.0, 1: 2.0, 2: 7.0}[given.stage] if given.minutes is None else given.minutes
    bench = Bench("cpu" if given.rehearse else "cuda", minutes)
    device = "rehearsal of toy sizes" if bench.rehearsal else torch.cuda.get_device_name()
    given.out.mkdir(parents=True, exist_ok=True)
    name = ("rehearsal" if bench.rehearsal else device) + ("-some" if given.only else "")  # which replace no whole run
    path = given.out / f"gpu-{configs.file_name(name)}"
    report, sampler = Report(path, device, goes_on=given.stage == 2), Sampler()
    try:
        for number, cases in enumerate(stages):
            if number and any(map(is_bad, report.results.values())) and not given.anyway:
                print("\nSomething is wrong: mend it, or go on with --stage 2 (or --anyway).")
                break
            run(bench, cases, report, sampler)
    finally:
        sampler.stop()
    print(f"\n{path}\n\n{table(report.results, device)}")
    return 1 if any(map(is_bad, report.results.values())) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Held-out likelihood against time: `fit` and what else fits mixtures of Gaussians, on the same data and threads.

    python -m bench.race -K 512 --seconds 300 --out race512.json
    python -m bench.race -K 2048 --seconds 300 --methods ours vmfa paper --out race2048.json
    python -m bench.race --merge race512.json race2048.json --figure race.svg

ours      `fit` by its default method; its curve is of its evaluations, which are not counted
vmfa      v-MFA (arXiv 2501.12299) as bench/vmfa.py has it
paper     the trainer of the paper (arXiv 2602.02464), as bench/time_to_quality.py has it
sklearn   scikit-learn's GaussianMixture with diagonal covariances (pip install scikit-learn)

SmolLM2, layer 18 (bench/real.py), rank 10 and shared noise where there is any. A curve begins where a method has its
first state; K-means and the like count, and reading the data does not. Every state is judged by the exact likelihood
of the same rows of documents held out from all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import activations, curves
from bench.time_to_quality import Baseline, Curve, reached
from bench.vmfa import VMFA
from mfa_kernels import MFA, fit
from mfa_kernels.common.files import atomic_write_text
from mfa_kernels.fitting.run import mean_nll

HELD_OUT = 20_000  # rows
_SAME = ("components", "rank", "rows", "held_out", "processor", "threads")  # settings of runs put together


class Clock:
    """Seconds of work, without those of looking."""

    def __init__(self) -> None:
        self.began, self.looking = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began - self.looking

    def look(self, nll: Callable[[], float]) -> dict[str, float]:
        """Returns a point of a curve."""
        seconds, began = self.seconds, time.perf_counter()
        point = {"seconds": seconds, "nll": nll()}
        self.looking += time.perf_counter() - began
        print(f"  {point['seconds']:8.1f} s  {point['nll']:.2f} nats", flush=True)
        return point


def ours(x: Tensor, test: Tensor, components: int, rank: int, seconds: float, method: str) -> Curve:
    """The curve of `fit`."""
    curve, clock = [], Clock()

    def look(mfa: MFA, record: dict[str, Any]) -> None:
        curve.append(clock.look(lambda: mean_nll(mfa, test)))

    mfa = fit(x, components, rank, method=method, callbacks=[look], progress=False)
    curve.append(clock.look(lambda: mean_nll(mfa, test)))
    report = mfa.fit_report
    print(f"  {report.method}: {report.seconds}, candidates missed {report.candidate_gap}", flush=True)
    return curve


def stepped(begin: Callable[[], Any], step: Callable[[Any], Any], nll: Callable[[Any], float], seconds: float) -> Curve:
    """The curve of a model that goes on pass by pass, for so many seconds."""
    clock = Clock()
    model = begin()
    curve = [clock.look(lambda: nll(model))]
    while clock.seconds < seconds:
        step(model)
        curve.append(clock.look(lambda: nll(model)))
    return curve


def vmfa(x: Tensor, test: Tensor, components: int, rank: int, seconds: float) -> Curve:
    """The curve of bench/vmfa.py."""

    def nll(model: VMFA) -> float:
        return mean_nll(
            MFA.from_parameters(model.means + model.origin, model.loadings, model.noise, model.log_weights.exp()), test
        )

    return stepped(lambda: VMFA(x, components, rank), VMFA.step, nll, seconds)


def paper(x: Tensor, test: Tensor, components: int, rank: int, seconds: float) -> Curve:
    """The curve of the paper's trainer."""
    trainer = Baseline(x, test, components, rank, None)
    trainer.run(10**6, 0.0, seconds)
    return [{"seconds": point["seconds"], "nll": point["nll"]} for point in trainer.curve]


def sklearn(x: Tensor, test: Tensor, components: int, rank: int, seconds: float) -> Curve:
    """The curve of GaussianMixture, K-means included."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    warnings.simplefilter("ignore", ConvergenceWarning)
    rows, held = x.numpy(), test.numpy()
    model = GaussianMixture(components, covariance_type="diag", warm_start=True, max_iter=1, random_state=0)
    return stepped(
        lambda: model.fit(rows), lambda model: model.fit(rows), lambda model: -float(model.score(held)), seconds
    )


METHODS: dict[str, Callable[..., Curve]] = {"ours": ours, "vmfa": vmfa, "paper": paper, "sklearn": sklearn}


def processor() -> str:
    """The processor, as Linux names it, with family and model: clouds give different ones the same name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {name.strip(): value.strip() for name, value in facts.items()}
    name = found.get("model name", platform.machine())
    return f"{name} (family {found.get('cpu family')}, model {found.get('model')})"


def table(report: dict[str, Any]) -> str:
    """Markdown: the first state and the last of each, and when ours was there."""
    settings, runs = report["settings"], report["runs"]
    lines = [
        f"K={settings['components']} R={settings['rank']}, {settings['rows']:,} rows, {settings['processor']}, "
        f"{settings['threads']} threads",
        "",
        "| | first state, s | nats | last, s | nats | ours was there after, s | share |",
        "|" + "---|" * 7,
    ]
    for name, curve in runs.items():
        last = min(curve, key=lambda point: point["nll"])
        row = [name, *(f"{point[what]:.1f}" for point in (curve[0], last) for what in ("seconds", "nll"))]
        own = reached(runs["ours"], last["nll"], "seconds") if "ours" in runs and name != "ours" else None
        there = "" if name == "ours" else "never" if own is None else f"{own:.1f}"
        share = "" if own is None else f"1/{last['seconds'] / own:.0f}"
        lines.append("| " + " | ".join([*row, there, share]) + " |")
    own, others = runs.get("ours"), [name for name in runs if name != "ours"]
    if own and others:
        above = [name for name in others if not _below(own, runs[name])]
        lines += ["", f"ours first, and below all others from then on: {'no: ' + ', '.join(above) if above else 'yes'}"]
    return "\n".join(lines)


def _below(own: Curve, other: Curve) -> bool:
    """True where a curve begins before another one and stands at or below each of its points."""

    def at(seconds: float) -> float:
        return min((point["nll"] for point in own if point["seconds"] <= seconds), default=float("inf"))

    return all(at(point["seconds"]) <= point["nll"] for point in other)


def figure(reports: list[dict[str, Any]]) -> str:
    """A panel for each K, side by side."""
    return curves.side_by_side(
        [
            curves.svg(
                {name: [(p["seconds"], p["nll"]) for p in curve] for name, curve in report["runs"].items()},
                f"K={report['settings']['components']}, {report['settings']['rows']:,} activations of SmolLM2",
                above_lowest=True,
            )
            for report in sorted(reports, key=lambda report: report["settings"]["components"])
        ]
    )


def race(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the methods one after the other."""
    x, test = activations.chosen(arguments).split()
    x, test = x[: arguments.tokens].contiguous(), test[:HELD_OUT].contiguous()
    runs: dict[str, Curve] = {}
    settings = {
        "components": arguments.components, "rank": arguments.rank, "rows": len(x), "held_out": len(test),
        "seconds": arguments.seconds, "processor": processor(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "load": os.getloadavg()[0],
    }  # fmt: skip
    report = {"settings": settings, "runs": runs}
    for name in arguments.methods:
        print(name, flush=True)
        more = {"method": arguments.method} if name == "ours" else {}
        runs[name] = METHODS[name](x, test, arguments.components, arguments.rank, arguments.seconds, **more)
        if arguments.out is not None:  # so that what was measured stays, whatever the next one does
            atomic_write_text(arguments.out, json.dumps(report, indent=1) + "\n")
    return report


def merged(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One report for each K: runs of one processor and the same rows are put together."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for report in reports:
        key = tuple(report["settings"][name] for name in _SAME)
        found.setdefault(key, {"settings": report["settings"], "runs": {}})["runs"].update(report["runs"])
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    activations.add_arguments(parser)
    parser.add_argument("-K", "--components", type=int, default=512)
    parser.add_argument("-R", "--rank", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=200_000, help="to train on")
    parser.add_argument("--seconds", type=float, default=300, help="of each method, but for the pass that it is in")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--method", default="auto", help="of ours")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--merge", type=Path, nargs="+", help="reports to put together instead of running anything")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help="an SVG file to draw")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.merge:
        reports = merged([json.loads(path.read_text()) for path in arguments.merge])
    else:
        reports = [race(arguments)]
    for report in reports:
        print(table(report), end="\n\n")
    if arguments.figure is not None:
        atomic_write_text(arguments.figure, figure(reports))


if __name__ == "__main__":
    main()

"""python -m bench.time_to_quality: held-out likelihood against time, on the same activations and the same machine.

The baseline is the paper's procedure written plainly (arXiv 2602.02464): K-means centroids, random loadings, equal
weights, Adam with lr 1e-3 on batches of 128, the likelihood by bench.baselines in eager PyTorch, for at least
--least-epochs and until an epoch gains less than --flat nats. Against it, `fit` by its methods. The number: the time of
ours to the baseline's best held-out likelihood, as a share of the time that the baseline took to get there.

Time is that of K-means, the start and training. Ours is all of `fit` but this script's own evaluations; the baseline's
is without any. Passes over the data are printed beside it, which do not depend on what else the machine does.

The baseline takes long. In pieces, each under --most-seconds, on one machine:

    python -m bench.time_to_quality -K 512 --methods online em --out ours.json
    python -m bench.time_to_quality -K 512 --methods paper --baseline-state paper.pt \\
        --most-seconds 500 --out paper.json                    # again, until it says that the curve is flat
    python -m bench.time_to_quality --merge paper.json ours.json --out all.json --figure time_to_quality.svg
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bench import activations, curves
from bench.baselines import plain_log_prob
from mfa_kernels import MFA, fit, kmeans
from mfa_kernels.common.files import atomic_write_text
from mfa_kernels.fitting.checkpoint import fingerprint
from mfa_kernels.fitting.run import mean_nll

Curve = list[dict[str, float]]  # seconds, passes, nll

METHODS: dict[str, dict[str, Any]] = {
    "online": {"method": "online", "patience": None},
    "em": {"method": "em", "patience": None},
    "sgd": {"method": "sgd"},
}
AIM, MUST = 1 / 50, 1 / 15
"""Shares of the baseline's time."""

HELD_OUT = 20_000  # rows, at most
_EVALUATIONS = 4  # of the baseline an epoch
_SAME = ("tokens", "components", "rank", "layer", "toy", "texts")  # settings that runs have to share to be compared


class Paper(torch.nn.Module):
    """The paper's parameters: unit directions times a scale; softplus keeps it and the noise positive."""

    def __init__(self, centroids: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        components, features = centroids.shape
        one = math.log(math.expm1(1.0))  # softplus of it is 1
        self.means = torch.nn.Parameter(centroids.clone())
        self.directions = torch.nn.Parameter(
            torch.randn(components, features, rank, generator=generator) / features**0.5
        )
        self.scales = torch.nn.Parameter(torch.full((components, rank), one))
        self.noise = torch.nn.Parameter(torch.full((features,), one))
        self.weights = torch.nn.Parameter(torch.zeros(components))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """means, loadings, noise_variance, log_weights."""
        unit = self.directions / self.directions.norm(dim=1, keepdim=True)
        loadings = unit * softplus(self.scales).unsqueeze(1)
        return self.means, loadings, softplus(self.noise) + 1e-5, self.weights.log_softmax(0)

    def nll(self, x: Tensor) -> float:
        means, loadings, noise, log_weights = (t.detach() for t in self.parts())
        return mean_nll(MFA.from_parameters(means, loadings, noise, log_weights.exp()), x)


class Baseline:
    """The paper's training, which can be left and gone on with.

    Args:
        x, test: (N, D) to train on and held out.
        components, rank: K, R.
        state: file that keeps it, replaced at every evaluation; None: kept nowhere.
    """

    def __init__(self, x: Tensor, test: Tensor, components: int, rank: int, state: Path | None) -> None:
        self.path = state
        self.center = x.mean(0)  # a common offset, as the plain formula expands the square
        self.x, self.test = x - self.center, test - self.center
        self.facts = f"{fingerprint(x[:: max(1, len(x) // 256)])} K={components} R={rank}"
        saved: dict[str, Any] = {}
        if state is not None and state.exists():
            saved = torch.load(state, weights_only=True)
            if saved["facts"] != self.facts:
                raise ValueError(f"baseline-state: {state} is of other activations, K or R")
        self.generator = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        centroids = saved["centroids"] if saved else kmeans(x, components, progress=False).centroids
        self.kmeans_seconds: float = saved["kmeans_seconds"] if saved else time.perf_counter() - began
        self.centroids = centroids
        self.model = Paper(centroids - self.center, rank, self.generator)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.epoch = self.step = 0
        self.seconds = self.kmeans_seconds
        self.order = self.generator.get_state()  # that the epoch's is drawn from
        self.curve: Curve = []
        if saved:
            self.model.load_state_dict(saved["model"])
            self.adam.load_state_dict(saved["adam"])
            self.epoch, self.step, self.seconds = saved["epoch"], saved["step"], saved["seconds"]
            self.order, self.curve = saved["order"], saved["curve"]

    def run(self, least_epochs: int, flat: float, most_seconds: float) -> bool:
        """Trains until the curve is flat, or for so long; whether it is flat."""
        steps = -(-len(self.x) // 128)
        every, began = max(1, steps // _EVALUATIONS), time.perf_counter()
        if not self.curve:
            self._look(steps)
        while not self.flat(least_epochs, flat):
            self.generator.set_state(self.order)
            order = torch.randperm(len(self.x), generator=self.generator).split(128)
            while self.step < steps:
                if time.perf_counter() - began > most_seconds:
                    return False
                stop, since = min(steps, self.step + every), time.perf_counter()
                for batch in order[self.step : stop]:
                    self.adam.zero_grad()
                    (-plain_log_prob(self.x[batch], *self.model.parts()).mean()).backward()
                    self.adam.step()
                self.seconds += time.perf_counter() - since
                self.step = stop
                if stop == steps:
                    self.epoch, self.step, self.order = self.epoch + 1, 0, self.generator.get_state()
                self._look(steps)
                if not self.step:
                    break
        return True

    def flat(self, least_epochs: int, flat: float) -> bool:
        """True where enough epochs are over, and the last one gained less than so many nats."""
        before = [point["nll"] for point in self.curve if point["passes"] <= self.epoch - 1]
        if self.step or self.epoch < least_epochs or not before:
            return False
        return min(before) - min(point["nll"] for point in self.curve) < flat

    def _look(self, steps: int) -> None:
        passes = self.epoch + self.step / steps
        self.curve.append({"seconds": self.seconds, "passes": passes, "nll": self.model.nll(self.test)})
        print(f"  {self.seconds:8.1f} s  {passes:6.2f} passes  {self.curve[-1]['nll']:.3f} nats", flush=True)
        if self.path is not None:
            names = ("facts", "centroids", "kmeans_seconds", "epoch", "step", "seconds", "order", "curve")
            state = {name: getattr(self, name) for name in names}
            part = self.path.with_suffix(".part")
            torch.save(state | {"model": self.model.state_dict(), "adam": self.adam.state_dict()}, part)
            part.replace(self.path)


def ours(
    x: Tensor, test: Tensor, components: int, rank: int, noise: str, epochs: int, before: float = 0.0, **options: Any
) -> tuple[Curve, dict[str, Any]]:
    """The curve of `fit`, K-means included: its own, or that of `clusters`, which took `before` seconds."""
    curve: Curve = []
    began, looking = time.perf_counter() - before, 0.0

    def look(mfa: MFA, record: dict[str, Any]) -> None:
        nonlocal looking
        now = time.perf_counter()
        curve.append({"seconds": now - began - looking, "passes": record["epoch"], "nll": mean_nll(mfa, test)})
        looking += time.perf_counter() - now

    mfa = fit(x, components, rank, noise=noise, epochs=epochs, callbacks=[look], progress=False, **options)
    seconds, report = time.perf_counter() - began - looking, mfa.fit_report
    return curve, {
        "final": mean_nll(mfa, test),
        "all_seconds": seconds,
        "stages": report.seconds,
        "live": f"{report.live_components}/{mfa.n_components}",
        "prior_strength": report.prior_strength,
    }


def reached(curve: Curve, nll: float, what: str) -> float | None:
    """The first `what` at which a curve is at or below `nll`."""
    return next((point[what] for point in curve if point["nll"] <= nll), None)


def rise(curve: Curve) -> float:
    """The most that a curve stands above what it came to before."""
    lowest, most = math.inf, 0.0
    for point in curve:
        lowest = min(lowest, point["nll"])
        most = max(most, point["nll"] - lowest)
    return most


def at_fastest_pace(curve: Curve) -> float:
    """Seconds that a curve would have taken, had all of it gone as fast as its fastest quarter of a pass or more."""
    steps = [(b["passes"] - a["passes"], b["seconds"] - a["seconds"]) for a, b in pairwise(curve)]
    pace = min(seconds / passes for passes, seconds in steps if passes > 0.8 / _EVALUATIONS)
    return curve[0]["seconds"] + pace * curve[-1]["passes"]


def target_of(runs: dict[str, dict[str, Any]]) -> float:
    """The best of the baseline; without one, of the run that ends highest."""
    if "paper" in runs:
        return min(point["nll"] for point in runs["paper"]["curve"])
    return max(run["final"] for run in runs.values())


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown: where each run ended, and when it reached the baseline's best."""
    target = target_of(runs)

    def cell(value: float | None, form: str = "{:.1f}") -> str:
        return "never" if value is None else form.format(value)

    lines = [
        f"| | held-out NLL, final | best | rose by | seconds to {target:.2f} | passes to it | seconds in all | live |",
        "|" + "---|" * 8,
    ]
    for name, run in runs.items():
        curve = run["curve"]
        lines.append(
            f"| {name} | {run['final']:.2f} | {min(p['nll'] for p in curve):.2f} | {rise(curve):.2f} "
            f"| {cell(reached(curve, target, 'seconds'))} | {cell(reached(curve, target, 'passes'), '{:.2f}')} "
            f"| {run.get('all_seconds', curve[-1]['seconds']):.1f} | {run.get('live', '')} |"
        )
    return "\n".join(lines)


def marks(runs: dict[str, dict[str, Any]]) -> str:
    """A line for each method: its time to the baseline's best as a share of the baseline's."""
    if "paper" not in runs:
        return "no baseline among the runs"
    target = target_of(runs)
    whole = reached(runs["paper"]["curve"], target, "seconds") or math.nan
    fastest = at_fastest_pace(runs["paper"]["curve"])
    lines = [f"the baseline: {whole:.0f} s; {fastest:.0f} s, had all of it gone at its fastest pace"]
    for name, run in runs.items():
        if name == "paper":
            continue
        own = reached(run["curve"], target, "seconds")
        if own is None:
            lines.append(f"{name}: never reached {target:.2f} nats (final {run['final']:.2f})")
            continue
        verdict = "aim" if own <= AIM * whole else "must" if own <= MUST * whole else "missed"
        lines.append(
            f"{name}: {own:.1f} s of {whole:.1f} s to {target:.2f} nats, 1/{whole / own:.1f} (1/{fastest / own:.1f}) "
            f"(must 1/{1 / MUST:.0f}, aim 1/{1 / AIM:.0f}: {verdict}); final {run['final']:.2f}, live {run['live']}"
        )
    if not runs["paper"].get("flat", True):
        lines.append("the baseline is not flat yet: go on with it before you compare")
    return "\n".join(lines)


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of several; the last one has a run of which there are two. Raises where settings differ."""
    for report in reports[1:]:
        for name in _SAME:
            if report["settings"][name] != reports[0]["settings"][name]:
                raise ValueError(
                    f"merge: {name} differs: {report['settings'][name]} and {reports[0]['settings'][name]}"
                )
    runs = {name: run for report in reports for name, run in report["runs"].items()}
    return {**reports[0], "runs": runs, "machines": [report["machine"] for report in reports]}


def data(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Returns rows to train on, and rows held out."""
    x, held = activations.chosen(arguments).split()
    if len(x) < arguments.tokens:
        raise ValueError(f"tokens: {arguments.tokens:,} asked for, there are {len(x):,}")
    return x[: arguments.tokens], held[:HELD_OUT]


def main() -> None:
    """Runs the methods one after the other, or merges what runs have written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    activations.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=200_000, help="to train on")
    parser.add_argument("-K", "--components", type=int, default=512)
    parser.add_argument("-R", "--rank", type=int, default=10)
    parser.add_argument(
        "--noise", choices=("shared", "per_component"), default="shared", help="the baseline's is shared"
    )
    parser.add_argument("--epochs", type=int, default=10, help="of our methods: passes over the rows")
    parser.add_argument("--least-epochs", type=int, default=10, help="of the baseline")
    parser.add_argument("--flat", type=float, default=0.5, help="nats that an epoch of the baseline has to gain")
    parser.add_argument("--most-seconds", type=float, default=math.inf, help="of the baseline, in this call")
    parser.add_argument("--baseline-state", type=Path, help="file to go on from and to keep the baseline in")
    parser.add_argument("--centroids-of", type=Path, help="a --baseline-state, whose centroids ours begin with too")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "paper"], choices=["paper", *METHODS])
    parser.add_argument("--merge", type=Path, nargs="+", help="reports to put together instead of running anything")
    parser.add_argument("--out", type=Path, default=Path("time_to_quality.json"))
    parser.add_argument("--figure", type=Path, help="an SVG file to draw")
    arguments = parser.parse_args()

    if arguments.merge:
        report = merged([json.loads(path.read_text()) for path in arguments.merge])
    else:
        report = measured(arguments)
    atomic_write_text(arguments.out, json.dumps(report, indent=1) + "\n")
    runs = report["runs"]
    if arguments.figure is not None:
        lines = {name: [(point["seconds"], point["nll"]) for point in run["curve"]] for name, run in runs.items()}
        s = report["settings"]
        title = f"K={s['components']} R={s['rank']}, {int(s['tokens']):,} activations"
        atomic_write_text(arguments.figure, curves.svg(lines, title, target_of(runs), above_lowest=True))
    print(table(runs))
    print(marks(runs))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the methods."""
    x, test = data(arguments)
    print(f"{len(x):,} x {x.shape[1]}, held out {len(test):,}", flush=True)
    load = os.getloadavg()
    runs: dict[str, dict[str, Any]] = {}

    def baseline() -> tuple[Curve, dict[str, Any]]:
        of = Baseline(x, test, arguments.components, arguments.rank, arguments.baseline_state)
        flat = of.run(arguments.least_epochs, arguments.flat, arguments.most_seconds)
        return of.curve, {"final": of.curve[-1]["nll"], "flat": flat, "kmeans_seconds": of.kmeans_seconds}

    given: dict[str, Any] = {}
    if arguments.centroids_of is not None:
        saved = torch.load(arguments.centroids_of, weights_only=True)
        given = {"clusters": saved["centroids"], "before": saved["kmeans_seconds"]}

    def library(name: str) -> Callable[[], tuple[Curve, dict[str, Any]]]:
        sizes = arguments.components, arguments.rank, arguments.noise, arguments.epochs
        return lambda: ours(x, test, *sizes, **METHODS[name], **given)

    for name in arguments.methods:
        curve, facts = (baseline if name == "paper" else library(name))()
        runs[name] = {"curve": curve, **facts}
        print(f"{name}: {facts}", flush=True)
    return {
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "machine": {
            "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "load": [load, os.getloadavg()], "torch": torch.__version__,
        },
        "runs": runs,
    }  # fmt: skip


if __name__ == "__main__":
    main()

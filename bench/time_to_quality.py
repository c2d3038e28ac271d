"""python -m bench.time_to_quality: held-out likelihood against time, on the same activations and the same clusters.

The baseline is the paper's procedure written plainly (arXiv 2602.02464): K-means centroids, random loadings, equal
weights, Adam with lr 1e-3 on batches of 128, the likelihood by bench.baselines in eager PyTorch. Against it, the
library's methods. Time is that of K-means, of the start and of training; evaluations are not counted. Passes over the
data are printed beside it, which do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bench.baselines import plain_log_prob
from mfa_kernels import MFA, fit, kmeans
from mfa_kernels.fitting.kmeans import KMeansResult
from mfa_kernels.fitting.sgd import mean_nll

Curve = list[dict[str, float]]  # seconds, passes, nll

METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"method": "sgd"},
    "em": {"method": "em", "patience": None},
    "online": {"method": "online", "patience": None},
}


def activations(tokens: int, layer: int, model: str | None) -> Tensor:
    """Activations (tokens, D) of a layer over the standard library's sources."""
    from mfa_kernels.data.harvest import harvest
    from mfa_kernels.data.tiny_lm.corpus import stdlib_texts
    from mfa_kernels.models import load_language_model

    loaded, tokenizer = load_language_model(model)
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(
            loaded, tokenizer, stdlib_texts("all"), layer, Path(folder) / "store", max_tokens=tokens, seed=0
        )
        return store.tensor().clone()


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


def paper(
    x: Tensor, test: Tensor, centroids: Tensor, rank: int, epochs: int, most_seconds: float, evaluations: int = 4
) -> Iterator[dict[str, float]]:
    """The baseline's curve, `evaluations` points an epoch. x and test less a common centre: it expands the square."""
    generator = torch.Generator().manual_seed(0)
    center = x.mean(0)
    x, test = x - center, test - center
    model = Paper(centroids - center, rank, generator)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = -(-len(x) // 128)
    every, seconds = max(1, steps // evaluations), 0.0
    yield {"seconds": seconds, "passes": 0.0, "nll": model.nll(test)}
    for epoch in range(epochs):
        began = time.perf_counter()
        for step, batch in enumerate(torch.randperm(len(x), generator=generator).split(128), 1):
            adam.zero_grad()
            (-plain_log_prob(x[batch], *model.parts()).mean()).backward()
            adam.step()
            if step % every == 0:
                seconds += time.perf_counter() - began
                yield {"seconds": seconds, "passes": epoch + step / steps, "nll": model.nll(test)}
                if seconds > most_seconds:
                    return
                began = time.perf_counter()
        seconds += time.perf_counter() - began


def ours(
    x: Tensor, test: Tensor, clusters: KMeansResult, rank: int, noise: str, epochs: int, **options: Any
) -> tuple[Curve, dict[str, Any]]:
    """The curve of `fit`, and what its report says."""
    curve: Curve = []

    def look(mfa: MFA, record: dict[str, Any]) -> None:
        curve.append({"seconds": record["seconds"], "passes": record["epoch"], "nll": mean_nll(mfa, test)})

    mfa = fit(
        x, len(clusters.centroids), rank, noise=noise, clusters=clusters, epochs=epochs, callbacks=[look],
        progress=False, **options,
    )  # fmt: skip
    report = mfa.fit_report
    for point in curve:
        point["seconds"] += report.seconds["start"]
    return curve, {
        "final": mean_nll(mfa, test),
        "live": f"{report.live_components}/{mfa.n_components}",
        "prior_strength": report.prior_strength,
    }


def reached(curve: Curve, nll: float, what: str) -> float | None:
    """The first `what` at which a curve is at or below `nll`."""
    return next((point[what] for point in curve if point["nll"] <= nll), None)


def table(runs: dict[str, dict[str, Any]], target: float) -> str:
    """Markdown: where each run ended, and when it reached the target."""

    def cell(value: float | None, form: str = "{:.1f}") -> str:
        return "never" if value is None else form.format(value)

    lines = [
        f"| | held-out NLL, final | best | seconds to {target:.1f} | passes to it | seconds in all | live |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        curve = run["curve"]
        lines.append(
            f"| {name} | {run['final']:.2f} | {min(p['nll'] for p in curve):.2f} "
            f"| {cell(reached(curve, target, 'seconds'))} | {cell(reached(curve, target, 'passes'), '{:.2f}')} "
            f"| {curve[-1]['seconds']:.1f} | {run.get('live', '')} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the methods one after the other and writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000, help="to train on; a tenth more is held out")
    parser.add_argument("-K", "--components", type=int, default=256)
    parser.add_argument("-R", "--rank", type=int, default=10)
    parser.add_argument(
        "--noise", choices=("shared", "per_component"), default="shared", help="the baseline's is shared"
    )
    parser.add_argument("--model", help="a Hugging Face id or folder; without it, the small model of the package")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10, help="of the baseline and of sgd, passes of em")
    parser.add_argument("--online-epochs", type=int, default=3)
    parser.add_argument("--paper-seconds", type=float, default=math.inf, help="most that the baseline may train")
    parser.add_argument("--methods", nargs="+", default=["paper", *METHODS], choices=["paper", *METHODS])
    parser.add_argument("--activations", type=Path, help="a .pt file (N, D) to use instead of harvesting")
    parser.add_argument("--out", type=Path, default=Path("time_to_quality.json"))
    arguments = parser.parse_args()

    held = arguments.tokens // 10
    if arguments.activations is None:
        x = activations(arguments.tokens + held, arguments.layer, arguments.model)
    else:
        x = torch.load(arguments.activations, weights_only=True)[: arguments.tokens + held].float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, x = x[order[:held]], x[order[held:]]
    began = time.perf_counter()
    clusters = kmeans(x, arguments.components, progress=False)
    kmeans_seconds = time.perf_counter() - began
    print(f"{len(x):,} x {x.shape[1]}, held out {len(test):,}; K-means {kmeans_seconds:.1f} s", flush=True)

    runs: dict[str, dict[str, Any]] = {}
    work: dict[str, Callable[[], tuple[Curve, dict[str, Any]]]] = {}

    def baseline() -> tuple[Curve, dict[str, Any]]:
        curve = list(paper(x, test, clusters.centroids, arguments.rank, arguments.epochs, arguments.paper_seconds))
        return curve, {"final": curve[-1]["nll"]}

    def library(name: str) -> Callable[[], tuple[Curve, dict[str, Any]]]:
        epochs = arguments.online_epochs if name == "online" else arguments.epochs
        return lambda: ours(x, test, clusters, arguments.rank, arguments.noise, epochs, **METHODS[name])

    for name in arguments.methods:
        work[name] = baseline if name == "paper" else library(name)
    for name, run in work.items():
        curve, facts = run()
        for point in curve:
            point["seconds"] += kmeans_seconds
        runs[name] = {"curve": curve, **facts}
        print(f"{name}: {facts}", flush=True)
    target = runs["paper"]["final"] if "paper" in runs else max(run["final"] for run in runs.values())
    report = {
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "machine": {
            "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "load": os.getloadavg(), "torch": torch.__version__,
        },
        "kmeans_seconds": kmeans_seconds,
        "target": target,
        "runs": runs,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(report, indent=1))
    print(table(runs, target))


if __name__ == "__main__":
    main()

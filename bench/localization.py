"""Localization on a real language model: which features carry a causal variable, by mixture and by other methods.

    make real                                        # once: SmolLM2-135M
    python -m bench.localization --sites             # full vectors at 3 layers and 2 tokens: where variables are
    python -m bench.localization                     # all methods there, 3 seeds; goes on where it was cut off
    python -m bench.localization --draw              # the tables and the figure, of what was measured
    python -m bench.localization --timed             # one run by a mask of 512 regions, 2,000 pairs

The mixture (K=512, R=10) is that of bench/real.py, fitted to texts of eight genres, none of them prompts of the tasks.
Pairs are those that SmolLM2-135M answers right.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench import dots, real
from bench.race import processor
from mfa_kernels import kmeans
from mfa_kernels.common.files import atomic_write_json
from mfa_kernels.evaluation import comparison, tasks
from mfa_kernels.evaluation.comparison import METHODS, Baselines, Result, compare
from mfa_kernels.evaluation.localization import LinearFeaturizer, localize
from mfa_kernels.models import load_language_model

RESULTS = Path("bench/results/localization.json")
FIGURE = Path("docs/figures/localization.svg")
COMPONENTS, PAIRS, SEEDS = 512, 1000, 3
SITES = {  # chosen by --sites: layer and token where the whole activation carries the variable
    "country": (18, "entity"),
    "continent": (18, "entity"),
    "language": (18, "entity"),
    "pointer": (18, "last"),
    "answer": (24, "last"),
}
EPOCHS = {"mcqa": 8, "ravel": 4}


def kind_of(variable: str) -> str:
    """The task of a variable."""
    return "mcqa" if variable in tasks.MCQA else "ravel"


def pairs_of(variable: str, at: str, count: int) -> list[tasks.Pair]:
    """Pairs before the model is asked, four times as many as are wanted."""
    make = tasks.mcqa_pairs if kind_of(variable) == "mcqa" else tasks.ravel_pairs
    return make(variable, 4 * count, at)


def sweep(model: Any, tokenizer: Any, count: int) -> None:
    """Prints what swapping the whole activation does, by layer and token."""
    print("| variable | token | layer | IIA | cause | isolation |\n|---|---|---|---|---|---|")
    for variable in SITES:
        for at in ("symbol", "last") if kind_of(variable) == "mcqa" else ("entity", "last"):
            task = tasks.prepare(model, tokenizer, pairs_of(variable, at, count), count=count, progress=False)
            for layer in real.LAYERS:
                site = task.site(model, layer)
                features = LinearFeaturizer(n_features=site.base.shape[1])
                found = localize(
                    site.logits, task.labels, site.base, site.source, features, mask=torch.ones(features.n_masked),
                    changes=task.changes, progress=False,
                )  # fmt: skip
                parts = " | ".join(map(_shown, (found.iia, found.cause, found.isolation)))
                print(f"| {variable} | {at} | {layer} | {parts} |", flush=True)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def measure(model: Any, tokenizer: Any, path: Path, variables: list[str], seeds: int, count: int) -> None:
    """Runs all methods that are not in the file yet, and writes each when it is done."""
    here = {"processor": processor(), "threads": torch.get_num_threads()}
    known = json.loads(path.read_text()) if path.exists() else {**here, "variables": {}}
    if {name: known[name] for name in here} != here:
        raise ValueError(
            f"{path} is of {known['processor']}, {known['threads']} threads, not of {here}: name another --out"
        )
    made: dict[int, Baselines] = {}
    for variable in variables:
        layer, at = SITES[variable]
        told = known["variables"].setdefault(variable, {"layer": layer, "at": at, "results": {}})
        left = [method for method in METHODS if method not in told["results"]]
        if not left:
            continue
        task = tasks.prepare(model, tokenizer, pairs_of(variable, at, count), count=count, progress=False)
        told |= {"accuracy": task.accuracy, "pairs": len(task.pairs), "judged": int(task.held_out.sum())}
        site = task.site(model, layer)
        if layer not in made:
            own = real.Real(layer)
            x = own.split()[0]
            clusters = kmeans(x, COMPONENTS, progress=False)
            made[layer] = Baselines(own.mixture(COMPONENTS).requires_grad_(False), x, clusters, progress=False)
        for method in left:
            started = time.perf_counter()
            found = compare(
                site, task, made[layer], [method], seeds=seeds, epochs=EPOCHS[kind_of(variable)], progress=False
            )
            (values,) = comparison.described(found)
            told["results"][method] = values | {"seconds": round((time.perf_counter() - started) / seeds, 1)}
            atomic_write_json(path, known)
            print(variable, layer, at, comparison.table(found).splitlines()[-1], flush=True)


def timed(model: Any, tokenizer: Any) -> None:
    """Prints the seconds of one run by the mask of regions, with all that comes before it."""
    variable, count = "country", 2000
    layer, at = SITES[variable]
    mfa = real.Real(layer).mixture(COMPONENTS).requires_grad_(False)
    started = time.perf_counter()
    task = tasks.prepare(model, tokenizer, pairs_of(variable, at, count), count=count, progress=False)
    asked = time.perf_counter()
    site = task.site(model, layer)
    ready = time.perf_counter()
    (found,) = compare(site, task, Baselines(mfa), ["regions"], seeds=1, progress=False)
    done = time.perf_counter()
    print(
        f"{processor()}, {torch.get_num_threads()} threads: {len(task.pairs):,} pairs, {variable}, layer {layer}, "
        f"{at}, mask of {found.masked}, 8 epochs: prompts asked {asked - started:.0f} s, site {ready - asked:.0f} s, "
        f"mask learnt and judged {done - ready:.0f} s, together {done - started:.0f} s"
    )


def draw(path: Path, figure: Path) -> None:
    """Prints the tables, and writes the figure."""
    known = json.loads(path.read_text())
    print(f"{known['processor']}, {known['threads']} threads")
    sites = []
    for variable, told in known["variables"].items():
        results = [
            Result(runs=(), **{n: v for n, v in told["results"][m].items() if n != "seconds"})
            for m in METHODS
            if m in told["results"]
        ]
        about = f"{told['pairs']} pairs, {told['judged']} judged; {told['accuracy']:.0%} of prompts right"
        sites.append((f"{variable}, layer {told['layer']}, {told['at']} token", about, results))
    dots.told(sites, "Interchange intervention accuracy, 95% intervals", figure)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--variables", nargs="+", default=list(SITES), choices=list(SITES))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--count", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.draw:
        draw(options.out, FIGURE)
        return
    model, tokenizer = load_language_model("smollm2")
    if options.sites:
        sweep(model, tokenizer, 300)
    elif options.timed:
        timed(model, tokenizer)
    else:
        measure(model, tokenizer, options.out, options.variables, options.seeds, options.count)


if __name__ == "__main__":
    main()

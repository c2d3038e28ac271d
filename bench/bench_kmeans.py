"""python -m bench.bench_kmeans: K-means against scikit-learn's and a plain PyTorch loop, at equal inertia.

    pip install scikit-learn
    python -m bench.bench_kmeans [--tokens 200000] [--clusters 512] [--threads 2]

On activations of the small language model. Each of the others runs once, from its own seeding to its own end; then
ours, from cold, under budgets that grow, until one run ends at or below their inertia: its seconds are the ones
reported, seeding and the last assignment included. Inertia is that of the returned centroids over all the rows,
measured by one function for all. Building the C++ kernels and a first small run of everything are not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import activations
from mfa_kernels import kmeans
from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.kmeans.op import nearest

PLAIN_ITERATIONS = 25


def budgets(clusters: int) -> dict[str, dict[str, Any]]:
    """Options of ours, from hasty to thorough."""
    everything = 1 << 62
    return {
        "sample=16 K, iterations=2": {"sample": 16 * clusters, "iterations": 2},
        "sample=32 K, iterations=4": {"sample": 32 * clusters, "iterations": 4},
        "sample=64 K, iterations=8": {"sample": 64 * clusters, "iterations": 8},
        "(default)": {},
        "sample=N": {"sample": everything},
        "sample=N, iterations=100, tol=0": {"sample": everything, "iterations": 100, "tol": 0.0},
    }


def inertia(x: Tensor, centroids: Tensor) -> float:
    """Sum of the squared distances of the rows (N, D) to their nearest centroids (K, D)."""
    center = centroids.mean(0)
    return float(nearest(x, centroids - center, center)[1].double().sum())


def plain(x: Tensor, clusters: int) -> Tensor:
    """Lloyd's algorithm as a PyTorch user writes it: rows as first centroids, a GEMM and an index_add an iteration."""
    centroids = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:clusters]].clone()
    for _ in range(PLAIN_ITERATIONS):
        half = centroids.square().sum(1) / 2
        owner = torch.cat([(part @ centroids.T - half).argmax(1) for part in x.split(8192)])
        counts = owner.bincount(minlength=clusters).unsqueeze(1)
        sums = torch.zeros_like(centroids).index_add_(0, owner, x)
        centroids = torch.where(counts > 0, sums / counts, centroids)
    return centroids


def others(threads: int) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Returns the libraries to compare with: (N, D) and K -> centroids (K, D)."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    def scikit(estimator: Any, **options: Any) -> Callable[[Tensor, int], Tensor]:
        def run(x: Tensor, clusters: int) -> Tensor:
            with threadpool_limits(threads):
                fitted = estimator(clusters, n_init=1, random_state=0, **options).fit(x.numpy())
            return torch.from_numpy(fitted.cluster_centers_).to(x)

        return run

    return {
        "scikit-learn MiniBatchKMeans": scikit(MiniBatchKMeans),
        "scikit-learn MiniBatchKMeans, batch_size=4096": scikit(MiniBatchKMeans, batch_size=4096),
        "scikit-learn KMeans": scikit(KMeans),
        f"PyTorch, {PLAIN_ITERATIONS} iterations": plain,
    }


def main() -> None:
    """Runs everything once and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("-K", "--clusters", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="a part of the names of those to compare with")
    activations.add_arguments(parser)
    arguments = parser.parse_args()
    if importlib.util.find_spec("sklearn") is None:
        parser.error("scikit-learn is what this compares with: pip install scikit-learn")
    torch.set_num_threads(arguments.threads)
    x = activations.chosen(arguments).split()[0][: arguments.tokens]
    x, clusters = x.contiguous(), arguments.clusters
    cpp.library()

    def timed(run: Callable[..., Tensor], *arguments: Any, **options: Any) -> tuple[float, float]:
        began = time.perf_counter()
        centroids = run(*arguments, **options)
        seconds = time.perf_counter() - began
        return seconds, inertia(x, centroids)

    def library(**options: Any) -> Tensor:
        return kmeans(x, clusters, progress=False, **options).centroids

    rivals = {name: run for name, run in others(arguments.threads).items() if arguments.only in name}
    for rival in rivals.values():
        rival(x[:4096], 8)
    kmeans(x[:4096], 8, progress=False)
    print(f"{len(x):,} x {x.shape[1]}, K = {clusters}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}\n")
    ours = {}
    for name, options in budgets(clusters).items():
        ours[name] = timed(library, **options)
        print(f"ours, {name}: {ours[name][0]:.2f} s, inertia {ours[name][1]:.5g}", flush=True)
    print("\n| | seconds | inertia | ours: seconds to it | with | ratio |\n|---|---|---|---|---|---|")
    for name, rival in rivals.items():
        seconds, target = timed(rival, x, clusters)
        reached = [(own, setting) for setting, (own, value) in ours.items() if value <= target]
        own, setting = min(reached, default=(float("nan"), "never"))
        print(f"| {name} | {seconds:.2f} | {target:.5g} | {own:.2f} | {setting} | {seconds / own:.1f} |", flush=True)


if __name__ == "__main__":
    main()

"""K-means: the sample, the first centroids (`init`, by seeding.py), Lloyd's passes, the result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common import checks
from mfa_kernels.common.modes import door
from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.data.reservoir import numbered
from mfa_kernels.data.source import Source, as_source, home, picked
from mfa_kernels.fitting.kmeans.lloyd import Partition, Rows, chunks, lloyd
from mfa_kernels.fitting.kmeans.nearest_centroid import NearestCentroid
from mfa_kernels.fitting.kmeans.seeding import draw, k_means_parallel
from mfa_kernels.fitting.row_weights import check_weights
from mfa_kernels.ops.common.finite import finite_rows

_SAMPLE_PER_CLUSTER = 128
_LEAST_SAMPLE = 50_000
_SEED_ROWS_PER_CLUSTER = 32
_FULL_PASSES = 2  # updates on all the rows, after those on the sample
_EXCHANGES = 4  # at most, on the sample


@dataclass(frozen=True)
class KMeansResult(NearestCentroid):
    """Clusters of N rows; of a stream, those of the sample that was kept.

    Attributes:
        centroids: (K, D), float32 or float64 as the data.
        assignment: the cluster of each row, (N,) int64 on the CPU; -1 for one that is not finite (`finite_rows`).
        inertia: sum of the (weighted) squared distances of the rows to their centroids.
        counts: rows of each cluster, (K,) int64; the sums of their weights, float64, where weights were given.
        iterations: updates of the centroids that were done.
        skipped: rows that are not finite.
        rows: of a stream, the numbers of the rows kept, (N,) int64 on the CPU, ascending; else None.
    """

    centroids: Tensor
    assignment: Tensor
    inertia: float
    counts: Tensor
    iterations: int
    skipped: int = 0
    rows: Tensor | None = None


@door
@torch.no_grad()
def kmeans(
    x: Any,
    n_clusters: int,
    *,
    weights: Tensor | None = None,
    iterations: int = 25,
    init: str | Tensor = "k-means||",
    tol: float = 1e-4,
    sample: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> KMeansResult:
    """K-means clusters: Lloyd's iterations from a k-means|| start. The same seed and number of threads give the same
    bits.

    More than `sample` rows are clustered on a random subset of them first; two updates and the assignment then run
    over all. A cluster that loses its rows moves into the cluster with the largest inertia. Every few updates, unless
    `init` gives the centroids, clusters that lie together are merged and wide ones split instead, where that lowers
    the inertia. Rows that are not finite are left out and counted. Where the data has fewer distinct rows than
    clusters, the clusters left over repeat a centroid and own no row, and a warning says so.

    An iterator is read once, and not held: `sample` of its rows stay, drawn so that each subset of that many is as
    likely as another (`reservoir`), and are clustered as if they were all there are. So the result is exact for these
    rows; centroids differ from those of the whole stream as those of a random sample do. A stream of no more rows is
    kept whole.

    Args:
        x: (N, D) activations of any kind that `as_source` takes, or an iterator of batches (B, D).
        n_clusters: K.
        weights: (N,), finite and non-negative: a row of weight 2 counts as two rows. Not of an iterator.
        iterations: most updates of the centroids (on the sample, where there is one); 0 keeps the start.
        init: "k-means||", "random" (rows drawn by weight), or the centroids (K, D) themselves, or those of an earlier
            result.
        tol: iterations end when the inertia falls by less than this fraction of itself.
        sample: rows of the subset, and of an iterator those that stay; max(50000, 128 K) when None.
        seed: of everything that is drawn.
        device: that computes; where x is when None. A sample that would take a quarter of a GPU stays where x is.
        progress: show progress bars.
        processes: processes that share the work: each calls `kmeans` with the same arguments, all rows among them, and
            gets the same result. They hold centroids and sums alike, a few times K x D numbers, and none holds the
            sample, but that of an iterator.

    Raises:
        TypeError, ValueError: naming the argument, among them fewer than K finite rows (of positive weight).
    """
    n_clusters = checks.check_integer(n_clusters, "n_clusters", 1, checks.MOST_COMPONENTS)
    iterations = checks.check_integer(iterations, "iterations")
    sample = None if sample is None else checks.check_integer(sample, "sample", 1)
    if sample is not None and sample < n_clusters:
        raise ValueError(f"sample must be at least n_clusters = {n_clusters}, got {sample}")
    tol = checks.check_number(tol, "tol", 0)
    seed, progress = checks.check_integer(seed, "seed"), checks.check_flag(progress, "progress")
    sample = max(_LEAST_SAMPLE, _SAMPLE_PER_CLUSTER * n_clusters) if sample is None else sample
    rows = None
    if isinstance(x, Iterator):
        if weights is not None:
            raise ValueError(
                "weights must be None for an iterator, which is sampled as it is read: give weighted rows as a whole"
            )
        x, rows = numbered(x, sample, seed, "x")
    source = as_source(x, "x")
    init = init if isinstance(init, str) else checks.check_centroids(init, "init")
    device = checks.check_device(device) if device is not None else source.device
    weights, unit = _check_weights(weights, len(source), device)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"tol": tol, "generator": generator, "progress": progress}

    subset, index = _finite_sample(source, sample, weights, generator, device, processes)
    if len(index) < n_clusters:
        positive = "" if weights is None else " of positive weight"
        among = f" in a sample of {sample}" if sample < len(source) else ""
        raise ValueError(
            f"n_clusters = {n_clusters} needs at least as many finite rows{positive}, "
            f"got {len(index)} of {len(source)}{among}"
        )
    center = _mean(subset, device, processes)
    sampled = Rows(subset, center, None if weights is None else weights[index], processes)
    centroids = _start(sampled, n_clusters, init, generator)
    exchanges = 0 if isinstance(init, Tensor) else _EXCHANGES
    centroids, part, updates = lloyd(sampled, centroids, iterations=iterations, exchanges=exchanges, **options)
    if len(subset) < len(source):
        full = min(_FULL_PASSES, iterations) if sample < len(source) else 0
        options["name"] = "k-means, all rows"
        every = Rows(source, center, weights, processes)
        centroids, part, more = lloyd(every, centroids, iterations=full, **options)
        updates += more
    return _result(part, centroids + center, unit, updates, rows)


def _check_weights(weights: Tensor | None, rows: int, device: torch.device) -> tuple[Tensor | None, float | None]:
    """The weights over a power of two that brings the largest to about 1, as float32 needs it; and that power."""
    if weights is None:
        return None, None
    weights = check_weights(weights, rows, "weights").to(device)
    unit = 2.0 ** (math.frexp(float(weights.max()))[1] - 1)
    return weights / unit, unit


def _finite_sample(
    source: Source, sample: int, weights: Tensor | None, generator: torch.Generator, device: torch.device,
    processes: Processes,
) -> tuple[Source, Tensor]:  # fmt: skip
    """The finite rows (of positive weight) of a random sample of the source, and their row numbers."""
    whole = sample >= len(source)
    index = torch.arange(len(source)) if weights is None or whole else (weights > 0).nonzero().squeeze(1).cpu()
    if not whole:
        index = index[torch.randperm(len(index), generator=generator)[:sample].sort().values]
    if not len(index):
        raise ValueError(f"x has no finite row of positive weight among {len(source)}")
    shared = processes.count > 1  # then each reads its part in every pass
    subset = source if whole else picked(source, index)
    if not shared:
        subset = as_source(subset.chunk(0, len(subset)).to(home(source, len(subset), device)), "x")
    found = [finite_rows(subset.chunk(*ends).to(device)) for ends in chunks(subset, 1, device, processes)]
    keep = processes.concatenated(torch.cat([torch.empty(0, device=device), *found])).bool()
    index = index.to(device)
    if weights is not None:
        keep &= weights[index] > 0
    if not keep.any():
        raise ValueError(f"x has no finite row of positive weight among {len(subset)}")
    if not keep.all():
        index = index[keep]
        subset = picked(source, index) if shared else as_source(subset.rows(keep.nonzero().squeeze(1)), "x")
    return subset, index


def _mean(source: Source, device: torch.device, processes: Processes) -> Tensor:
    total = torch.zeros(source.n_features, dtype=torch.float64, device=device)
    for ends in chunks(source, 1, device, processes):
        total += source.chunk(*ends).to(device).sum(0, dtype=torch.float64)
    processes.sum_(total)
    return (total / len(source)).to(source.dtype)


def _start(sampled: Rows, clusters: int, init: str | Tensor, generator: torch.Generator) -> Tensor:
    """First centroids, less the centre."""
    subset, center, weights, processes = sampled
    if isinstance(init, Tensor):
        if init.shape != (clusters, subset.n_features):
            raise ValueError(
                f"init must have shape (K, D) = ({clusters}, {subset.n_features}), got {tuple(init.shape)}"
            )
        return checks.check_finite(init, "init").to(center) - center
    checks.check_choice(init, ("k-means||", "random"), "init")
    mass = torch.ones(len(subset), device=center.device) if weights is None else weights
    if init == "random":
        return subset.rows(draw(mass, clusters, generator)).to(center) - center
    rows = draw(torch.ones_like(mass), max(_SEED_ROWS_PER_CLUSTER * clusters, 4096), generator)
    x = subset.rows(rows[slice(*processes.span(len(rows)))]).to(center) - center
    centroids = k_means_parallel(x, None if weights is None else weights[rows], clusters, generator, processes)
    # Where these rows are not distinct enough, the first pass finds the clusters that are empty and moves them.
    return torch.cat([centroids, centroids[:1].expand(clusters - len(centroids), -1)])


def _result(part: Partition, centroids: Tensor, unit: float | None, updates: int, rows: Tensor | None) -> KMeansResult:
    clusters = len(centroids)
    empty = int((part.mass == 0).sum())
    if empty:
        warnings.warn(
            f"kmeans: {empty} of {clusters} clusters own no row: fewer distinct rows than clusters", stacklevel=5
        )
    assignment = part.owner.cpu()
    lost = assignment == clusters
    inertia = float(part.inertia.sum()) * (unit or 1)
    counts = part.mass.long() if unit is None else part.mass * unit
    assignment.masked_fill_(lost, -1)
    return KMeansResult(centroids, assignment, inertia, counts, updates, int(lost.sum()), rows)

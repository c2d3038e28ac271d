"""K-means for many clusters, in two levels: a fit's start when a pass over all centroids would be the longest part.

Rows are first cut into about sqrt(K) parts, each part into its share of the K clusters, and a few of Lloyd's updates
then cross the borders of the parts: a row looks at the clusters that lie nearest to its own. Rows end up near the
nearest centroid, if not always at it; `mfa_kernels.kmeans` is the exact one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.common.progress import progress_bar
from mfa_kernels.data.source import Source, as_source
from mfa_kernels.fitting.kmeans.kmeans import KMeansResult, kmeans
from mfa_kernels.fitting.kmeans.lloyd import Rows, lloyd
from mfa_kernels.fitting.kmeans.seeding import k_means_parallel
from mfa_kernels.ops.common.products import product
from mfa_kernels.ops.kmeans.op import cluster_sums
from mfa_kernels.ops.kmeans.types import ClusterSums
from mfa_kernels.ops.scan.candidates import scan_candidates
from mfa_kernels.ops.woodbury.op import factorize

FEWEST = 4096
"""Clusters from which on the time that is saved outweighs what it costs in likelihood (bench/RESULTS.md)."""

_PART_UPDATES = 3  # of Lloyd's within each part
_UPDATES = 4  # across their borders
_SHARED = 2  # updates that look at the same neighbors: centroids move little by then
_NEIGHBORS = 16  # clusters that a row looks at besides its own
_CLOSEST_ROWS = 4096  # centroids whose distances to all others are computed at once


@torch.no_grad()
def two_levels(
    x: Source, n_clusters: int, *, weights: Tensor | None = None, seed: int = 0, progress: bool = True
) -> KMeansResult:
    """Clusters of the finite rows x, which are held in memory.

    Args:
        x: (N, D), finite.
        n_clusters: K, at most N.
        weights: (N,), finite and non-negative: a row of weight 2 counts as two rows.
        seed: of everything that is drawn.
        progress: show a progress bar.
    """
    rows, generator = x.chunk(0, len(x)), torch.Generator().manual_seed(seed)
    parts = kmeans(x, round(math.sqrt(n_clusters)), weights=weights, iterations=5, seed=seed, progress=False)
    owner = parts.assignment.to(rows.device)
    shares = _shares(rows, owner, parts.centroids, n_clusters)
    order = owner.argsort(stable=True)
    members = order.split(owner.bincount(minlength=len(shares)).tolist())
    found, begin = [], 0
    with progress_bar(total=len(shares), desc="k-means, parts", unit="part", progress=progress) as bar:
        for k, center, index in zip(shares, parts.centroids, members):
            bar.update()
            if not k:
                continue
            own = Rows(as_source(rows[index]), center, None if weights is None else weights[index])
            centroids, part = _clustered(own, k, generator)
            owner[index] = part + begin
            found.append(centroids + center)
            begin += k
    return _settled(rows, torch.cat(found), owner, weights)


def _shares(rows: Tensor, owner: Tensor, centroids: Tensor, clusters: int) -> list[int]:
    """How many of the clusters each part gets: by the root of its rows times their inertia, and at most its rows.

    By rows alone, wide parts would be left with coarse clusters; by inertia alone, a few outliers would take most.
    """
    counts = owner.bincount(minlength=len(centroids)).double()
    gap = torch.zeros_like(counts)
    for part, mine in zip(rows.split(1 << 14), owner.split(1 << 14)):
        gap.index_add_(0, mine, (part - centroids[mine]).double().square().sum(1))
    want = (counts * gap).sqrt()
    shares = torch.zeros_like(counts)
    left = float(clusters)
    while left > 0.5:  # what a part has no rows for goes to the others
        open_ = shares < counts
        room = torch.where(open_, want.clamp_min(1e-12 * float(want.max()) + 1e-300), 0)
        shares = torch.minimum(shares + left * room / room.sum(), counts)
        left = clusters - float(shares.sum())
    whole = shares.floor()
    missing = clusters - int(whole.sum())
    rest = torch.where(whole < counts, shares - whole, -1)
    whole[rest.topk(missing).indices] += 1
    return [int(share) for share in whole]


def _clustered(rows: Rows, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centroids (k, D) less the centre, and the cluster of each row."""
    x = rows.source.chunk(0, len(rows.source)) - rows.center
    weights = None if rows.weights is None else rows.weights.clamp_min(torch.finfo(torch.float64).tiny)
    start = k_means_parallel(x, weights, clusters, generator)
    start = torch.cat([start, start[:1].expand(clusters - len(start), -1)])
    centroids, part, _ = lloyd(rows, start, iterations=_PART_UPDATES, tol=1e-3, generator=generator, progress=False)
    return centroids, part.owner


def _settled(rows: Tensor, centroids: Tensor, owner: Tensor, weights: Tensor | None) -> KMeansResult:
    """Lloyd's updates in which a row looks at its cluster and those that lie nearest to that one."""
    center = centroids.mean(0)
    itself = torch.arange(len(centroids), device=owner.device).unsqueeze(1).int()
    for update in range(_UPDATES + 1):
        if update % _SHARED == 0:
            near = torch.cat([itself, closest(centroids - center)], 1)
        noise, none = torch.ones_like(center), centroids.new_empty(*centroids.shape, 0)
        woodbury = factorize(centroids, none, noise, center)
        log_weights = -woodbury.constants(torch.zeros_like(centroids[:, 0]))  # so that logits are -distance / 2
        sums = ClusterSums.zeros(centroids)
        for index in torch.arange(len(rows), device=rows.device).split(max(1 << 14, len(centroids))):
            part, candidates = rows[index], near[owner[index]]
            best, columns = scan_candidates(part, candidates, woodbury, log_weights, 1).logits.max(1)
            owner[index] = candidates.gather(1, columns.unsqueeze(1)).squeeze(1).long()
            own = None if weights is None else weights[index]
            cluster_sums(part, center, owner[index], -2 * best, own, sums)
        if update < _UPDATES:
            mass = sums.mass.unsqueeze(1)
            centroids = torch.where(mass > 0, sums.sums / mass + center, centroids.double()).to(centroids)
    counts = sums.mass if weights is not None else sums.mass.long()
    return KMeansResult(centroids, owner.cpu(), float(sums.inertia.sum()), counts, _UPDATES)


@torch.no_grad()
def closest(points: Tensor, count: int = _NEIGHBORS) -> Tensor:
    """The closest other points of each, (K, D) -> (K, count) int32; fewer where there are fewer."""
    count, square = min(count, len(points) - 1), points.square().sum(1)
    found = []
    for part in torch.arange(len(points), device=points.device).split(_CLOSEST_ROWS):
        distance = torch.add(square, product(points[part], points), alpha=-2)
        distance[torch.arange(len(part), device=points.device), part] = torch.inf
        found.append(distance.topk(count, largest=False).indices.int())
    return torch.cat(found)

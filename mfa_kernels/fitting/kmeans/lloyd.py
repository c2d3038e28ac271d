"""Lloyd's iterations in chunks: assign, average by segments, split where a cluster is empty.

Neither the N x K distances nor a copy of the data is ever in memory. Every sum runs over rows in one fixed order: two
runs on as many threads agree to the bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.data.source import Source
from mfa_kernels.fitting.kmeans.merge_split import exchange
from mfa_kernels.ops.common.finite import finite_rows
from mfa_kernels.ops.kmeans.basis import fitting_width, leading_directions
from mfa_kernels.ops.kmeans.op import cluster_sums, nearest
from mfa_kernels.ops.kmeans.types import ClusterSums

_CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # of the rows that are read, centred and averaged at once
_BASIS_ROWS = 4096  # that show along which directions rows differ
_EXCHANGE_EVERY = 4  # updates
_EXCHANGE_ROWS = 128  # of each cluster, on which merges and splits are decided
_EXCHANGE_ELEMENTS = 1 << 28  # of them at most
_EXCHANGE_WIDTH = 48  # directions among which the widest of a cluster is looked for
_SAME_POINT = 1e-10  # squared distance over squared norm at which two float32 rows count as one
_SPLIT_ROWS = 1 << 16  # members of a cluster that are read to split it
_EXTRA_PASSES = 10  # to settle clusters that are still empty when the iterations are over


class Partition(NamedTuple):
    """Who owns what, and the sums over each cluster.

    Attributes:
        owner: nearest centroid, (N,) int64; K for a row that is not finite (`finite_rows`), or whose distance is not.
        distance: squared distance to it, (N,).
        sums: weighted sums of the rows less the centre, (K, D) float64.
        mass: sums of the weights, (K,) float64.
        inertia: weighted sums of the squared distances, (K,) float64.
    """

    owner: Tensor
    distance: Tensor
    sums: Tensor
    mass: Tensor
    inertia: Tensor


class Rows(NamedTuple):
    """The rows of a pass, of which processes share the work: all of them have all rows.

    Attributes:
        source: N rows.
        center: (D,), which centroids are less of, on the device that computes.
        weights: (N,) non-negative, or None.
        processes: each takes its part of the rows; all have the same centroids, and the result.
    """

    source: Source
    center: Tensor
    weights: Tensor | None = None
    processes: Processes = ALONE


def chunks(source: Source, clusters: int, device: torch.device, processes: Processes = ALONE) -> list[tuple[int, int]]:
    """Ranges of a process's rows that bound the memory of a pass; long enough to outweigh the K x D sums of each."""
    first, last = processes.span(len(source))
    rows = max(clusters, _CHUNK_ELEMENTS.get(device.type, 1 << 22) // source.n_features)
    return [(start, min(start + rows, last)) for start in range(first, last, rows)]


@torch.no_grad()
def partition(
    rows: Rows, centroids: Tensor, bar: Any = None, basis: Tensor | None = None, dtype: torch.dtype | None = None,
    owner_of: Tensor | None = None,
) -> Partition:  # fmt: skip
    """One pass over the data.

    Args:
        rows: of the data.
        centroids: less the centre, (K, D), on the device that computes.
        bar: a progress bar of rows.
        basis: of `nearest`: it makes the pass faster and changes nothing else.
        dtype: in which a row must be finite to be owned (`finite_rows`).
        owner_of: the cluster of each row, (N,) int64, where that is given; None: that of the nearest centroid.
    """
    source, center, weights, processes = rows
    clusters, sums = len(centroids), ClusterSums.zeros(centroids)
    owner, distance = centroids.new_empty(len(source), dtype=torch.long), centroids.new_empty(len(source))
    for start, stop in chunks(source, clusters, centroids.device, processes):
        x = source.chunk(start, stop).to(centroids.device)
        if owner_of is None:
            mine, gap = nearest(x, centroids, center, basis)
        else:
            mine = owner_of[start:stop].to(x.device, copy=True)
            gap = (x - center - centroids[mine]).square().sum(1)
        mine.masked_fill_(~finite_rows(x, dtype), clusters)
        gap.masked_fill_(mine == clusters, 0)
        cluster_sums(x, center, mine, gap, None if weights is None else weights[start:stop], sums)
        owner[start:stop], distance[start:stop] = mine, gap
        if bar is not None:
            bar.update((stop - start) * processes.count)
    if processes.count > 1:
        own = slice(*processes.span(len(source)))
        owner, distance = processes.concatenated(owner[own]), processes.concatenated(distance[own])
        processes.sum_(*sums)
    return Partition(owner, distance, *sums)


@torch.no_grad()
def split_empty(rows: Rows, part: Partition, centroids: Tensor, generator: torch.Generator) -> Tensor | None:
    """Centroids whose empty clusters have been moved to rows of the clusters with the largest inertia.

    A row is drawn with a probability proportional to its squared distance (k-means++ within the cluster), so that no
    two centroids coincide. None where nothing is empty, or nothing is left to split: fewer distinct rows than clusters.
    """
    source, center, weights, _ = rows
    empty = (part.mass == 0).nonzero().squeeze(1).tolist()
    inertia = part.inertia.clone()
    members: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # rows, their norms, their share of the inertia
    out = centroids.clone()
    moved = False
    for cluster in empty:
        while True:
            donor = int(inertia.argmax())
            if not inertia[donor] > 0:
                return out if moved else None
            if donor in members:
                break
            # Seen from where the centroid is now: it may have moved onto all of its rows.
            index = (part.owner == donor).nonzero().squeeze(1)
            index = index[:: math.ceil(len(index) / _SPLIT_ROWS)]
            x = source.rows(index).to(centroids) - center
            weight = torch.ones_like(x[:, 0]) if weights is None else weights[index].to(x)
            members[donor] = x, weight, _spread(x, centroids[donor], weight)
            inertia[donor] = members[donor][2].sum()
        x, weight, spread = members[donor]
        pick = int(torch.multinomial(spread.cpu(), 1, generator=generator))
        out[cluster] = x[pick]
        spread = torch.minimum(spread, _spread(x, x[pick], weight))
        members[donor] = x, weight, spread
        inertia[donor] = spread.sum()
        moved = True
    return out if moved else None


def _spread(x: Tensor, point: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared distances (n,) in float64; 0 where a row is the point but for rounding."""
    distance = (x - point).double().square().sum(1)
    same = distance <= _SAME_POINT * x.double().square().sum(1)
    return (distance * weight).masked_fill(same, 0)


def _spaced(length: int, count: int, device: torch.device) -> Tensor:
    """At most `count` row numbers out of `length`, evenly spaced."""
    count = min(count, length)
    return torch.arange(count, device=device) * length // count


def _exchanged(
    rows: Rows, part: Partition, means: Tensor, generator: torch.Generator, basis: Tensor | None
) -> tuple[Tensor, int]:
    """`exchange`, decided on some of the rows."""
    source, center, weights, _ = rows
    count = min(max(_BASIS_ROWS, _EXCHANGE_ROWS * len(means)), _EXCHANGE_ELEMENTS // source.n_features)
    index = _spaced(len(source), count, means.device)
    x = source.rows(index).to(means) - center
    basis = None if basis is None else basis[:, :_EXCHANGE_WIDTH]
    weight = None if weights is None else weights[index]
    return exchange(x, part.owner[index], means, generator, weight, basis)


def lloyd(
    rows: Rows,
    centroids: Tensor,
    *,
    iterations: int,
    tol: float,
    generator: torch.Generator,
    progress: bool,
    name: str = "k-means",
    exchanges: int = 0,
) -> tuple[Tensor, Partition, int]:
    """Lloyd's iterations until the inertia falls by less than `tol` of itself.

    Up to `exchanges` times on the way, clusters that lie together are merged and wide ones split instead. Processes
    share the passes over the rows, of which all of them have all; every one does the rest.

    Returns:
        Centroids less the centre (K, D), the partition they make, and the updates that were done.
    """
    source, center = rows.source, rows.center
    few = source.rows(_spaced(len(source), _BASIS_ROWS, centroids.device)).to(centroids)
    basis = leading_directions(few, center)
    previous = math.inf
    updates = 0
    with progress_bar(
        total=(iterations + 1) * len(source), desc=name, unit="row", unit_scale=True, progress=progress
    ) as bar:
        while True:
            rows.processes.broadcast_(centroids)  # on other hardware the processes could differ by a rounding
            width = fitting_width(basis, few, centroids, center)
            part = partition(rows, centroids, bar, width)
            total = float(part.inertia.sum())
            bar.set_postfix(inertia=f"{total:.5g}", refresh=False)
            last, settled = updates >= iterations, total >= previous * (1 - tol)
            means, split, moves = centroids, None, 0
            if not last:
                mass = part.mass.unsqueeze(1)
                means = torch.where(mass > 0, part.sums / mass, centroids.double()).to(centroids)
            if updates < iterations + _EXTRA_PASSES and iterations:
                split = split_empty(rows, part, means, generator)
            due = settled or updates % _EXCHANGE_EVERY == _EXCHANGE_EVERY - 1
            if exchanges and due and split is None and iterations - updates > 2:
                means, moves = _exchanged(rows, part, means, generator, basis)
                exchanges = exchanges - 1 if moves > len(means) // 100 else 0
            if (last or settled) and split is None and not moves:
                return centroids, part, updates
            centroids = means if split is None else split
            previous = math.inf if moves else total  # moves are decided on a sample
            updates += 1

"""Merges of clusters that lie together and splits of wide ones, where that lowers the inertia.

Lloyd's iterations move centroids, never from one crowd of rows to another. Here the exact change of the inertia decides
(Ward's formula, for the rows as they are owned): merging clusters of masses m, n adds m n / (m + n) |c - d|^2, and
splitting a cluster takes the same off, for its two halves.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from mfa_kernels.ops.common.segments import segment_sums

_ROUNDS = 3  # of power iteration, towards the direction along which a cluster is widest
_TILE_ELEMENTS = 1 << 24  # of distances between centroids at once
_LEAST_ROWS = 16  # a cluster of fewer is not split: its widest direction is an accident


@torch.no_grad()
def exchange(
    x: Tensor, owner: Tensor, means: Tensor, generator: torch.Generator, weights: Tensor | None = None,
    basis: Tensor | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """The means (K, D) of the clusters after the merges and splits that pay, and how many of each there were.

    The inertia of these rows, owned as they are, falls by what the splits gain less what the merges cost.

    Args:
        x: (N, D), less a centre.
        owner: the cluster of each row, (N,); K where it has none.
        means: of the clusters, of which the rows may be a sample, (K, D).
        generator: starts the search for directions.
        weights: of the rows, (N,), or None.
        basis: (D, P), the directions among which the widest of a cluster is looked for; all of them when None.
    """
    clusters = len(means)
    weight = torch.ones_like(x[:, 0]) if weights is None else weights.to(x)
    mass = segment_sums(weight.double().unsqueeze(1), owner, clusters).squeeze(1)
    first, second, gain = _halves(x, owner, means, weight, mass, generator, basis)
    partner, cost = _partners(means, mass)
    # The widest clusters against the closest pairs, every cluster in one move at most.
    splits, gains = gain.argsort(descending=True, stable=True).tolist(), gain.tolist()
    partners, costs, masses = partner.tolist(), cost.tolist(), mass.tolist()
    used, moves, position = [False] * clusters, 0, 0
    out = means.clone()
    for a in cost.argsort(stable=True).tolist():
        b = partners[a]
        if used[a] or used[b]:
            continue
        while position < clusters and (used[splits[position]] or splits[position] in (a, b)):
            position += 1
        if position == clusters or not gains[splits[position]] > costs[a]:
            break
        wide = splits[position]
        share = masses[b] / max(masses[a] + masses[b], sys.float_info.min)
        out[b] = torch.lerp(means[a], means[b], share)
        out[a], out[wide] = first[wide], second[wide]
        used[a] = used[b] = used[wide] = True
        moves += 1
    return out, moves


def _positive(mass: Tensor) -> Tensor:
    """(...) -> (..., 1), to divide by: a mass of 0 comes with sums of 0."""
    return mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(-1)


def _halves(
    x: Tensor, owner: Tensor, means: Tensor, weight: Tensor, mass: Tensor, generator: torch.Generator,
    basis: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The means (K, D) of the two halves of every cluster across its widest direction, and what splitting it gains."""
    clusters = len(means)
    here = owner.clamp_max(clusters - 1)  # rows without a cluster: no segment takes them
    gap = x - means[here] if basis is None else x @ basis - (means @ basis)[here]
    direction = torch.randn(clusters, gap.shape[1], generator=generator).to(x)
    for _ in range(_ROUNDS):
        along = torch.linalg.vecdot(gap, direction[here])
        direction = segment_sums(gap, owner, clusters, weight * along)
        direction /= _positive(torch.linalg.vector_norm(direction, dim=1))
    right = torch.where(torch.linalg.vecdot(gap, direction[here]) > 0, owner, clusters)
    m = segment_sums(weight.double().unsqueeze(1), right, clusters).squeeze(1)
    n = mass - m
    own = segment_sums(x, right, clusters, weight).double()
    rest = segment_sums(x, owner, clusters, weight).double() - own
    first, second = own / _positive(m), rest / _positive(n)
    gain = m * n * (first - second).square().sum(1) / _positive(mass).squeeze(1)
    rows = owner.bincount(minlength=clusters + 1)[:clusters]
    gain.masked_fill_((m <= 0) | (n <= 0) | (rows < _LEAST_ROWS), 0)
    return first.to(x), second.to(x), gain


def _partners(means: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The cluster that each would merge with at the least cost (K,), and that cost (K,) float64."""
    clusters = len(means)
    partner = torch.zeros(clusters, dtype=torch.long, device=means.device)
    if clusters == 1:
        return partner, torch.full_like(mass, torch.inf)
    square, weight = means.square().sum(1), mass.to(means)
    for rows in torch.arange(clusters, device=means.device).split(max(1, _TILE_ELEMENTS // clusters)):
        gaps = torch.addmm(square, means[rows], means.T, alpha=-2) + square[rows].unsqueeze(1)
        own = weight[rows].unsqueeze(1)
        tile = gaps.clamp_min_(0) * (own * weight / (own + weight).clamp_min(torch.finfo(means.dtype).tiny))
        tile[torch.arange(len(rows), device=means.device), rows] = torch.inf
        partner[rows] = tile.argmin(1)
    gap = (means - means[partner]).double().square().sum(1)
    return partner, mass * mass[partner] * gap / _positive(mass + mass[partner]).squeeze(1)

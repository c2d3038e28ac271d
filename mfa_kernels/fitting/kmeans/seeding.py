"""First centroids by k-means|| (Bahmani et al., arXiv 1203.6402), in a fixed number of passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.ops.common.segments import segment_sums
from mfa_kernels.ops.kmeans.basis import fitting_width, leading_directions
from mfa_kernels.ops.kmeans.op import nearest

_DRAWS = 1 << 14  # extra draws of greedy k-means++ in all; each costs a pass over the 4 K candidates
_ROUNDS = 4  # passes over the rows, each of which draws K candidates
_COORDINATES = 64  # that candidates are compared in
_BASIS_ROWS = 4096  # that show along which directions rows differ: they come in random order


def draw(mass: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """At most n distinct indices into mass (N,), with probability proportional to it; never one whose mass is 0."""
    n = min(n, int((mass > 0).sum()))
    # An exponential race: of any length, unlike multinomial.
    uniform = torch.rand(len(mass), dtype=torch.float64, generator=generator).to(mass.device)
    times = -uniform.log() / mass.double()
    times.masked_fill_(~(mass > 0), float("inf"))
    return times.topk(n, largest=False, sorted=True).indices


def k_means_parallel(
    x: Tensor, weights: Tensor | None, clusters: int, generator: torch.Generator, processes: Processes = ALONE
) -> Tensor:
    """K of the rows x (n, D), far apart: (m, D), m < K only where x has fewer distinct rows.

    Four rounds draw K candidates each, by squared distance to the candidates so far; these, weighted by the rows they
    stand for, are then reduced to K by greedy k-means++. Of several processes, each has a part of the rows x (n_r, D),
    and all have all the weights (n,).
    """
    rows = int(processes.totals(len(x))[0])
    weights = x.new_ones(rows) if weights is None else weights.to(x)
    center = x.new_zeros(x.shape[1])
    few = processes.rows(x, torch.arange(min(_BASIS_ROWS, rows), device=x.device))
    basis = leading_directions(few, center)
    first = draw(weights, 1, generator)
    candidates, owner = processes.rows(x, first), torch.zeros(rows, dtype=torch.long, device=x.device)
    gap = x - candidates
    distance = processes.concatenated(torch.linalg.vecdot(gap, gap))
    for _ in range(_ROUNDS):
        new = processes.rows(x, draw(weights * distance, clusters, generator))
        if not len(new):
            break
        width = fitting_width(basis, few, new, center)
        index, gap = (processes.concatenated(found) for found in nearest(x, new, center, width))
        owner = torch.where(gap < distance, index + len(candidates), owner)
        distance = torch.minimum(distance, gap)
        candidates = torch.cat([candidates, new])
    mass = segment_sums(weights.unsqueeze(1), owner, len(candidates)).squeeze(1)
    return candidates[_reduce(candidates, mass, clusters, basis, generator)]


def _reduce(
    candidates: Tensor, mass: Tensor, clusters: int, basis: Tensor | None, generator: torch.Generator
) -> Tensor:
    """K of the weighted candidates (M, D), by number: greedy k-means++, by distances in the leading directions first.

    Each choice compares all candidates with a few draws, which are many passes over them: on few coordinates they stay
    in a cache, and where to begin is no matter of precision. Candidates that differ in none of the directions are left
    to a second round, in all of them.
    """
    found = torch.empty(0, dtype=torch.long, device=candidates.device)
    if basis is not None:
        found = _greedy(candidates @ basis[:, :_COORDINATES], mass, clusters, found, generator)
    return _greedy(candidates, mass, clusters, found, generator)


def _greedy(points: Tensor, mass: Tensor, clusters: int, found: Tensor, generator: torch.Generator) -> Tensor:
    """`found` and further points (M, d), by number, K in all: of a few draws, always the one that leaves the least
    inertia; fewer where all points are among them."""
    if len(found) >= clusters:
        return found
    trials = min(2 + int(math.log2(clusters)), max(1, _DRAWS // clusters))
    square = points.square().sum(1)
    found = found if len(found) else draw(mass, 1, generator)
    distance = nearest(points, points[found])[1]
    chosen = [found]
    for _ in range(clusters - len(found)):
        # On the CPU: a GPU's running sum of floats is not the same twice.
        ends = (mass * distance).double().cpu().cumsum(0)
        if not ends[-1] > 0:
            break
        uniform = torch.rand(trials, dtype=torch.float64, generator=generator)
        drawn = torch.searchsorted(ends, uniform * ends[-1], right=True).clamp_max(len(points) - 1)
        drawn = drawn.to(mass.device)
        gap = torch.addmm(square, points[drawn], points.t(), alpha=-2) + square[drawn].unsqueeze(1)
        left = torch.minimum(distance, gap.clamp_min_(0))
        best = int((left @ mass).argmin())
        gap = points - points[drawn[best]]
        distance = torch.minimum(distance, torch.linalg.vecdot(gap, gap))
        chosen.append(drawn[best : best + 1])
    return torch.cat(chosen)

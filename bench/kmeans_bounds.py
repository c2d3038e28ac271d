"""python -m bench.kmeans_bounds: how many centroids each bound leaves to be measured, a row, as Lloyd's iterations go.

Counted on the definition, from centroids that are random rows; nothing is timed. Bounds on the triangle inequality are
those of Hamerly (2010), Ding et al. (Yinyang, 2015), Elkan (2003), and Newling and Fleuret (exponion, 2016); they carry
distances from one iteration to the next. Those by P leading principal coordinates look at one iteration alone.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from bench import activations
from mfa_kernels import kmeans

LOOKED_AT = (1, 3, 8, 20)


def coordinates_left(y: Tensor, centers: Tensor, best: Tensor, p: int, rest: bool) -> float:
    """y (N, D) and centers (K, D) in principal coordinates, best (N,) the least distances."""
    bound = torch.cdist(y[:, :p], centers[:, :p]).square()
    if rest:
        bound += (y[:, p:].norm(dim=1, keepdim=True) - centers[:, p:].norm(dim=1)).square()
    return float((bound < best.unsqueeze(1).square()).sum(1).double().mean())


def carried_left(x: Tensor, old: Tensor, new: Tensor, distances: Tensor, groups: int) -> dict[str, float]:
    """Returns the bounds left after the centroids (K, D) moved from old to new; distances (N, K) to the old ones."""
    count = len(old)
    owner = distances.argmin(1)
    own, move = (x - new[owner]).norm(dim=1), (new - old).norm(dim=1)
    others = distances.scatter(1, owner.unsqueeze(1), torch.inf)
    group = kmeans(old, groups, progress=False).assignment
    yinyang = torch.zeros_like(own)
    for g in range(groups):
        member = group == g
        if member.any():
            yinyang += (others[:, member].amin(1) - move[member].max() < own) * member.sum()
    near = torch.cdist(new, new)[owner] < 2 * own.unsqueeze(1)
    left = {
        "Hamerly": (others.amin(1) - move.max() < own) * float(count),
        f"Yinyang, {groups} groups": yinyang,
        "Elkan": (others - move < own.unsqueeze(1)).sum(1).double(),
        "exponion": near.sum(1).double(),
    }
    return {name: float(value.double().mean()) for name, value in left.items()}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("-K", "--clusters", type=int, default=512)
    parser.add_argument("--groups", type=int, default=32)
    activations.add_arguments(parser)
    arguments = parser.parse_args()
    x = activations.chosen(arguments).split()[0][: arguments.tokens]
    x = x - x.mean(0)
    axes = torch.linalg.eigh((x.T @ x).double()).eigenvectors.flip(1).float()
    y = x @ axes
    centroids = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: arguments.clusters]]
    columns: list[dict[str, float]] = []
    for iteration in range(LOOKED_AT[-1] + 1):
        distances = torch.cdist(x, centroids)
        best, owner = distances.min(1)
        counts = owner.bincount(minlength=len(centroids)).unsqueeze(1)
        sums = torch.zeros_like(centroids).index_add_(0, owner, x)
        moved = torch.where(counts > 0, sums / counts, centroids)
        if iteration in LOOKED_AT:
            column = {"P = 16, projection alone": coordinates_left(y, centroids @ axes, best, 16, rest=False)}
            for p in (16, 32, 48, 96):
                column[f"P = {p} and the rest"] = coordinates_left(y, centroids @ axes, best, p, rest=True)
            columns.append({**column, **carried_left(x, centroids, moved, distances, arguments.groups)})
        centroids = moved
    print("| iteration | " + " | ".join(map(str, LOOKED_AT)) + " |\n|---|" + "---|" * len(LOOKED_AT))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.3g}" for column in columns) + " |")


if __name__ == "__main__":
    main()

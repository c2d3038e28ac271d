"""Mixtures whose parameters are known, far enough apart for K-means to find the regions; and what tests do to fits."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mfa_kernels import MFA

SIX: dict[str, Any] = {"n_components": 6, "rank": 2, "progress": False}


def planted(components: int = 6, features: int = 12, rank: int = 2, *, spread: float = 8.0, seed: int = 0) -> MFA:
    """A mixture with loadings well above the noise, and weights that differ by a factor of 3."""
    generator = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(components, features, generator=generator)
    loadings = 1.5 * torch.randn(components, features, rank, generator=generator)
    noise = 0.2 + torch.rand(features, generator=generator)
    return MFA.from_parameters(means, loadings, noise, torch.linspace(1, 3, components))


def draw(mfa: MFA, rows: int, seed: int = 1) -> Tensor:
    return mfa.sample(rows, torch.Generator().manual_seed(seed))


@torch.no_grad()
def nll(mfa: MFA, x: Tensor) -> float:
    return float(mfa(x.to(mfa.means.dtype)))


class Store:
    """The least that `fit` asks of an object that is read by row."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.n_features, self.reads = data, data.shape[1], 0

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, index: Tensor) -> Tensor:
        self.reads += 1
        return self.data[index]


class CutOff(Exception):
    """Ends a fit."""


def raising(
    error: BaseException, when: Callable[[dict[str, Any]], Any] = lambda record: record["step"]
) -> Callable[[MFA, dict[str, Any]], None]:
    """A callback that ends a fit: after its first evaluation in training unless told."""

    def callback(mfa: MFA, record: dict[str, Any]) -> None:
        if when(record):
            raise error

    return callback


def same(a: MFA, b: MFA) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def counted_batches(x: Tensor, rows: int, alive: list[int]) -> Iterator[Tensor]:
    """Batches of x; `alive` takes how many of them there are as each is made."""
    made: list[weakref.ref] = []
    for part in x.split(rows):
        batch = part.clone()
        made.append(weakref.ref(batch))
        alive.append(sum(ref() is not None for ref in made))
        yield batch
        del batch

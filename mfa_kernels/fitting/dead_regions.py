"""Moves of regions that own next to nothing, or what another one owns: each takes half of the largest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.processes import Processes
from mfa_kernels.fitting.guard import Guard, Scan
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.statistics.op import SufficientStatistics

_DEAD = 2.0  # tokens that a region owns, below which it is moved
_WORTH = 1.0  # nats that each token of a region can be expected to gain where another one takes half of it
_DUPLICATE = 0.4  # share of a region's tokens that another one owns too, above which it is moved (twins: 0.5)


class Overlap:
    """Counts the tokens that pairs of regions share: sum_n r_ni r_nj over the two largest responsibilities."""

    def __init__(self, components: int) -> None:
        self.components = components
        self.pairs: list[Tensor] = []
        self.shares: list[Tensor] = []

    def add(self, components: Tensor, responsibilities: Tensor) -> None:
        """Counts a batch: (N, S) both, largest first."""
        if components.shape[1] < 2:
            return
        both = (components[:, 1] >= 0) & (responsibilities[:, 1] > 0)
        pair = components[both, :2].long().sort(1).values
        code, place = (pair[:, 0] * self.components + pair[:, 1]).unique(return_inverse=True)
        share = torch.zeros(len(code), dtype=torch.float64, device=code.device)
        share.index_put_((place,), responsibilities[both, :2].double().prod(1), accumulate=True)
        self.pairs.append(code)
        self.shares.append(share)

    def clear(self) -> None:
        """Forgets all of them."""
        self.pairs, self.shares = [], []

    def pool(self, processes: Processes) -> None:
        """Adds what the other processes have counted, in the order of the processes."""
        if processes.count > 1:
            none = torch.empty(0, device=processes.device)
            self.pairs = [processes.concatenated(torch.cat([none.long(), *self.pairs]))]
            self.shares = [processes.concatenated(torch.cat([none.double(), *self.shares]))]

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        if not self.pairs:
            return {}
        return {"overlap.pairs": torch.cat(self.pairs), "overlap.shares": torch.cat(self.shares)}

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Takes over what `state` gave."""
        if "overlap.pairs" in tensors:
            pairs, shares = tensors["overlap.pairs"], tensors["overlap.shares"]
            found = pairs.dtype, shares.dtype, pairs.dim(), pairs.shape == shares.shape
            if found != (torch.int64, torch.float64, 1, True):
                raise ValueError("overlap: pairs and shares must be int64 and float64 of one shape (n,)")
            if len(pairs) and not 0 <= int(pairs.min()) <= int(pairs.max()) < self.components**2:
                raise ValueError(f"overlap: pairs are of more than {self.components} regions")
            self.pairs = [tensors["overlap.pairs"].to(device, copy=True)]
            self.shares = [tensors["overlap.shares"].to(device, copy=True)]

    def duplicates(self, mass: Tensor) -> list[tuple[int, int]]:
        """Pairs of regions that explain the same tokens, given what each owns, (K,)."""
        if not self.pairs:
            return []
        code, place = torch.cat(self.pairs).unique(return_inverse=True)
        share = torch.zeros(len(code), dtype=torch.float64, device=code.device)
        share.index_put_((place,), torch.cat(self.shares), accumulate=True)
        first, second = code // self.components, code % self.components
        same = share > _DUPLICATE * torch.minimum(mass[first], mass[second])
        return list(zip(first[same].tolist(), second[same].tolist()))


class Revival(NamedTuple):
    """The regions that are to be moved.

    Attributes:
        moves: of each, its number and that of the region that it takes half of, one move after the other.
        lost: those of them that own a few tokens, which perhaps no other region explains.
        touched: all regions that have other parameters or tokens afterwards.
        mass: tokens of each region, (K,), as they are expected then.
    """

    moves: list[tuple[int, int]]
    lost: list[int]
    touched: list[int]
    mass: Tensor


@torch.no_grad()
def find(
    mfa: Mixture, mass: Tensor, overlap: Overlap, guard: Guard, owned: Tensor | None = None, scan: Scan | None = None
) -> Revival:
    """The regions that own next to nothing, or what another one owns too: each is to take half of the largest.

    One whose tokens would lose more without it than the largest region's can be expected to gain stays: a token that
    is like no other may be all that a region is there for.

    Args:
        mfa: the mixture, after the M-step.
        mass: tokens of each region of this process, (K,).
        overlap: of the same tokens, between all regions.
        guard: tokens that say what would be missed.
        owned: tokens that each may own after all, (K,), where `mass` counts few; None: `mass`.
        scan: as `Guard.look` takes it.
    """
    own = mfa.processes.concatenated(mass)
    owned = own if owned is None else mfa.processes.concatenated(owned)
    duplicates = overlap.duplicates(own)
    mass, _ = _merged(own, duplicates)
    dead = (mass < _DEAD).nonzero().squeeze(1)
    few = dead[(own[dead] < _DEAD) & (owned[dead] > 0)]
    cost = _missed(mfa, dead, few, owned, guard, scan)
    stay = {k for k in dead.tolist() if not cost[k] <= _WORTH * mass.max()}
    mass, touched = _merged(own, [pair for pair in duplicates if not stay & set(pair)])
    moves: list[tuple[int, int]] = []
    for k in dead.tolist():
        donor = int(mass.argmax())
        if mass[donor] < 2 * _DEAD:
            break
        if k in stay or not cost[k] <= _WORTH * mass[donor]:
            continue
        mass[donor] /= 2
        mass[k] = mass[donor]
        moves.append((k, donor))
        touched += [k, donor]
    lost = {k for k, _ in moves} & set(few.tolist())
    return Revival(moves, sorted(lost), sorted(set(touched)), mass)


def _merged(mass: Tensor, duplicates: list[tuple[int, int]]) -> tuple[Tensor, list[int]]:
    """Tokens of each region, (K,), where the larger one of each pair takes over all; and these larger ones."""
    mass, larger = mass.clone(), []
    for first, second in duplicates:
        small, large = sorted((first, second), key=lambda k: float(mass[k]))
        mass[large] += mass[small]
        mass[small] = 0
        larger.append(large)
    return mass, larger


def _missed(mfa: Mixture, dead: Tensor, few: Tensor, owned: Tensor, guard: Guard, scan: Scan | None = None) -> Tensor:
    """The loss of the tokens of each region if the dead regions were gone, (K,) in nats.

    Those of the guard, as many as all regions own; and of the `few` that own next to nothing, in case their tokens are
    not among these, as many copies of their mean as they own.
    """
    cost = torch.zeros_like(owned)
    if not len(dead):
        return cost
    rows = mfa.processes.rows(mfa.means.detach(), few)
    likelihood, before = mfa.log_prob(rows).double(), guard.look(mfa, scan)
    with _without(mfa, dead.tolist()):
        cost[few] = owned[few] * (likelihood - mfa.log_prob(rows).double())
        lost = guard.lost(mfa, dead, *before) * owned.sum() / guard.weights.sum().clamp_min(1)
    return torch.maximum(cost, lost)


def _here(mfa: Mixture) -> range:
    """The numbers of this process's components."""
    return range(mfa.first_component, mfa.first_component + len(mfa.means))


@contextmanager
def _without(mfa: Mixture, regions: Iterable[int]) -> Iterator[None]:
    """The mixture of the other regions, meanwhile."""
    here = [k - mfa.first_component for k in regions if k in _here(mfa)]
    logits = mfa.weight_logits[here]
    mfa.weight_logits[here] = -torch.inf
    try:
        yield
    finally:
        mfa.weight_logits[here] = logits


@torch.no_grad()
def hand_on(
    mfa: Mixture,
    revival: Revival,
    s: SufficientStatistics,
    expect: Callable[[Tensor, SufficientStatistics, Tensor], ActivePairs],
) -> bool:
    """Gives the few tokens of regions that are to be moved to all the others, a region's as copies of their mean.

    The M-step that follows then leaves these tokens the noise that they need. Without it they would have been explained
    by a region that is gone: one on a single row takes the noise from the dimensions that only this row has something
    in, and the row is left millions of nats from every other region.

    Args:
        mfa: what the statistics were collected under.
        revival: what is to be moved.
        s: the statistics, of this process's components; changed in place.
        expect: adds the statistics of tokens (n, D) with weights (n,) under the mixture as it is.

    Returns:
        Whether the others have a density for all of these tokens; if not, nothing was changed.
    """
    here = [k - mfa.first_component for k in revival.lost if k in _here(mfa)]
    lost = torch.tensor(here, dtype=torch.long, device=s.mass.device)
    lost = lost[s.mass[lost] > 0]
    mass, shift = s.mass[lost], s.shift[lost]
    rows = mfa.means[lost].double() + shift / mass.unsqueeze(1)
    given = SufficientStatistics.zeros(mfa.means, mfa.rank, s.squares.dim() == 2)
    with _without(mfa, (k for k, _ in revival.moves)):
        active = expect(mfa.processes.concatenated(rows), given, mfa.processes.concatenated(mass))
    if not active.log_prob.isfinite().all():
        return False
    given.log_likelihood.zero_()  # of tokens that are counted already
    if s.squares.dim() == 1:
        s.squares.sub_((shift.square() / mass.unsqueeze(1)).sum(0))
    else:
        s.squares[lost] = 0
    for own in (s.mass, s.shift, s.latent, s.second, s.cross):
        own[lost] = 0
    for own, more in zip(s.tensors(), given.tensors()):
        own.add_(more)
    return True


@torch.no_grad()
def move(mfa: Mixture, revival: Revival, covariance: Tensor) -> None:
    """Moves regions, in place.

    Args:
        mfa: the mixture.
        revival: which.
        covariance: pooled, (D, D): the directions of a mixture of rank 0.
    """
    for k, donor in revival.moves:
        _split(mfa, donor, k, covariance)


def _split(mfa: Mixture, donor: int, other: int, covariance: Tensor) -> None:
    """Gives half of a region to another, of any rank, whose own parameters are lost.

    It is split across its widest direction u (unit latent variance): the halves of a normal distribution have their
    means at +-sqrt(2/pi) u, and the variance 1 - 2/pi along u.
    """
    parts = [mfa.means, mfa.loadings, mfa.weight_logits, *([mfa.log_noise] if mfa.log_noise.dim() == 2 else [])]
    half = torch.zeros(sum(part[0].numel() for part in parts), dtype=mfa.means.dtype, device=mfa.means.device)
    here = _here(mfa)
    if donor in here:
        k = donor - mfa.first_component
        if mfa.rank:
            u, strength, rotation = torch.linalg.svd(mfa.loadings[k].double(), full_matrices=False)
            direction = u[:, 0] * strength[0]
            strength[0] *= math.sqrt(1 - 2 / math.pi)
            mfa.loadings[k] = (u * strength @ rotation).to(mfa.loadings)
        else:
            values, vectors = torch.linalg.eigh(covariance)
            direction = vectors[:, -1] * values[-1].clamp_min(0).sqrt()
        mfa.weight_logits[k] -= math.log(2)
        step = (math.sqrt(2 / math.pi) * direction).to(mfa.means)
        half = torch.cat([mfa.means[k] - step, *(part[k].flatten() for part in parts[1:])])
        mfa.means[k] += step
    mfa.processes.sum_(half)  # all others have zeros
    if other in here:
        for part, row in zip(parts, half.split([part[0].numel() for part in parts])):
            part[other - mfa.first_component] = row.view(part[0].shape)

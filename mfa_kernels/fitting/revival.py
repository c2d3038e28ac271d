"""Regions that own next to nothing, or what another one owns too, are moved: each takes half of the largest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mfa_kernels.ranks import Ranks
from mfa_kernels.sharded import AnyMFA

_DEAD = 2.0  # tokens that a region owns, below which it is moved
_DUPLICATE = 0.4  # of a region's tokens shared with another (0.5 and more: always both), from which on it is moved


class Overlap:
    """How much of their tokens pairs of regions share: sum_n r_ni r_nj over the two largest responsibilities."""

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

    def pool(self, ranks: Ranks) -> None:
        """Adds what the other ranks have counted, in the order of the ranks."""
        if ranks.size > 1:
            none = torch.empty(0, device=ranks.device)
            self.pairs = [ranks.concatenated(torch.cat([none.long(), *self.pairs]))]
            self.shares = [ranks.concatenated(torch.cat([none.double(), *self.shares]))]

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
    """What `revive` did.

    Attributes:
        moved: regions, counted.
        touched: all regions that have other parameters or tokens now.
        mass: tokens of each region, (K,), as they are expected now.
    """

    moved: int
    touched: list[int]
    mass: Tensor


@torch.no_grad()
def revive(mfa: AnyMFA, mass: Tensor, overlap: Overlap, covariance: Tensor) -> Revival:
    """Moves the regions that own next to nothing, or what another one owns too: each takes half of the largest.

    Args:
        mfa: changed in place.
        mass: tokens of each region held here, (K,).
        overlap: of the same pass, between all regions.
        covariance: pooled, (D, D): the directions of a mixture of rank 0.
    """
    mass = mfa.ranks.concatenated(mass).clone()
    touched: list[int] = []
    for first, second in overlap.duplicates(mass):
        small, large = sorted((first, second), key=lambda k: float(mass[k]))
        mass[large] += mass[small]
        mass[small] = 0
        touched.append(large)
    moved = 0
    for k in (mass < _DEAD).nonzero().squeeze(1).tolist():
        donor = int(mass.argmax())
        if mass[donor] < 2 * _DEAD:
            break
        _split(mfa, donor, k, covariance)
        mass[donor] /= 2
        mass[k] = mass[donor]
        moved += 1
        touched += [k, donor]
    return Revival(moved, sorted(set(touched)), mass)


def _split(mfa: AnyMFA, donor: int, other: int, covariance: Tensor) -> None:
    """Gives half of a region to another, of any rank, whose own parameters are lost.

    It is split across its widest direction u (unit latent variance): the halves of a normal distribution have their
    means at +-sqrt(2/pi) u, and the variance 1 - 2/pi along u.
    """
    parts = [mfa.means, mfa.loadings, mfa.weight_logits, *([mfa.log_noise] if mfa.log_noise.dim() == 2 else [])]
    half = torch.zeros(sum(part[0].numel() for part in parts), dtype=mfa.means.dtype, device=mfa.means.device)
    here = range(mfa.start, mfa.start + len(mfa.means))
    if donor in here:
        k = donor - mfa.start
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
    mfa.ranks.sum_(half)  # all others have zeros
    if other in here:
        for part, row in zip(parts, half.split([part[0].numel() for part in parts])):
            part[other - mfa.start] = row.view(part[0].shape)

"""How regions and latents go with labels of the tokens, beside what chance would give.

Regions and classes: normalised mutual information, and purity, the share of rows whose class is the most frequent one
of their region. Latents: inside each region, the rank correlation of each latent with the labels. Both grow with the
number of regions by themselves, so each comes with the same number for shuffled labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.checks import check_integer, check_integers, check_tensor, shown
from mfa_kernels.mixture.codes import Code

_LEAST_ROWS = 20  # of a region whose latents are looked at


@dataclass(frozen=True)
class LatentAssociation:
    """A latent that goes with the labels.

    Attributes:
        component, axis: the region, and the latent in it.
        rows: of the region.
        correlation: of the ranks of latent and label, in [-1, 1]; with more than two classes, the root of the part of
            the variance of the latent's ranks that lies between classes, in [0, 1].
        p: share of shuffled labels under which some latent of the region goes with them as much, at least 1 / (n + 1).
    """

    component: int
    axis: int
    rows: int
    correlation: float
    p: float


@dataclass(frozen=True)
class Association:
    """What `associate` finds.

    Attributes:
        nmi: 2 I(region; class) / (H(region) + H(class)), in [0, 1]; None where labels are values.
        nmi_null: the mean of it over shuffled labels.
        purity: share of rows whose class is the most frequent of their region; None where labels are values.
        purity_null: the mean of it over shuffled labels.
        p: share of shuffles with at least that mutual information, at least 1 / (n + 1); None where labels are values.
        latents: those of every region that has enough rows, the strongest first.
        rows: rows that count: those with a region.
    """

    nmi: float | None
    nmi_null: float | None
    purity: float | None
    purity_null: float | None
    p: float | None
    latents: list[LatentAssociation]
    rows: int


@torch.no_grad()
def associate(
    code: Code, labels: Any, *, groups: Any = None, n_permutations: int = 200, min_rows: int = _LEAST_ROWS,
    seed: int = 0,
) -> Association:  # fmt: skip
    """Compares the regions and latents of rows with their labels.

    Args:
        code: of N rows, as `encode` returns it; the first component of each is its region.
        labels: N of them: strings, booleans or integers are classes, floats are values.
        groups: (N,) integers, such as `store.texts`, where a label belongs to a whole text: rows of one text are alike,
            and labels that are shuffled row by row would look too surprising. Whole groups are shuffled then.
        n_permutations: shuffles of the labels that chance is told from.
        min_rows: rows of a region, below which its latents are left out.
        seed: of the shuffles.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(code, Code):
        raise TypeError(f"code must be a Code, as `encode` returns it, got {shown(code)}")
    n_permutations = check_integer(n_permutations, "n_permutations", 1)
    min_rows, seed = check_integer(min_rows, "min_rows", 3), check_integer(seed, "seed")
    component, latents = code.components[..., 0].flatten().cpu(), code.latents[..., 0, :].double().cpu()
    latents = latents.reshape(len(component), latents.shape[-1])
    values, classes = _labels(labels, len(component))
    group = _groups(groups, values)
    own = component >= 0
    component, latents, values, group = component[own], latents[own], values[own], group[own]
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = dict.fromkeys(("nmi", "nmi_null", "purity", "purity_null", "p"))
    if classes and len(component):
        region = component.unique(return_inverse=True)[1]
        nmi, purity = _agreement(region, values.long())
        shuffled = [_agreement(region, _shuffled(values, group, generator).long()) for _ in range(n_permutations)]
        least = sum(other >= nmi - 1e-12 for other, _ in shuffled)
        found = {
            "nmi": nmi, "nmi_null": sum(one for one, _ in shuffled) / n_permutations, "purity": purity,
            "purity_null": sum(other for _, other in shuffled) / n_permutations,
            "p": (1 + least) / (1 + n_permutations),
        }  # fmt: skip
    of_latents = []
    for k in component.unique().tolist():
        here = component == k
        if int(here.sum()) >= min_rows and latents.shape[1]:
            given = latents[here], values[here], group[here], classes
            of_latents += _of_region(k, *given, n_permutations, generator)
    of_latents.sort(key=lambda latent: -abs(latent.correlation))
    return Association(**found, latents=of_latents, rows=len(component))


def _labels(labels: Any, count: int) -> tuple[Tensor, int]:
    """Labels as numbers (N,) float64, and the number of classes, 0 where they are values."""
    if getattr(getattr(labels, "dtype", None), "kind", "") in ("U", "O"):  # NumPy's and pandas' texts
        labels = labels.tolist()
    if isinstance(labels, Sequence) and not isinstance(labels, str) and all(isinstance(each, str) for each in labels):
        names = sorted(set(labels))
        number = {name: i for i, name in enumerate(names)}
        found, classes = torch.tensor([number[each] for each in labels]), len(names)
    elif is_several(labels):
        found = check_tensor(labels, "labels").cpu().flatten()
        classes = 0
        if not found.is_floating_point():
            distinct, found = found.unique(return_inverse=True)
            classes = len(distinct)
        elif not found.isfinite().all():
            raise ValueError(f"labels must be finite, got {int((~found.isfinite()).sum())} that are not")
    else:
        raise TypeError(f"labels must be a list, an array or a tensor, got {shown(labels)}")
    if len(found) != count:
        raise ValueError(f"labels must be one for each of the {count} rows of the code, got {len(found)}")
    return found.double(), classes


def _agreement(region: Tensor, label: Tensor) -> tuple[float, float]:
    """Normalised mutual information, and purity, of two partitions (N,) int64."""
    regions, classes = int(region.max()) + 1, int(label.max()) + 1
    joint = torch.bincount(region * classes + label, minlength=regions * classes).view(regions, classes).double()
    purity = float(joint.amax(1).sum() / joint.sum())
    joint /= joint.sum()
    of_region, of_class = joint.sum(1), joint.sum(0)
    entropies = [-float(torch.special.xlogy(p, p).sum()) for p in (joint.flatten(), of_region, of_class)]
    both = entropies[1] + entropies[2]
    return (2 * (both - entropies[0]) / both if both > 0 else 1.0), purity


def _groups(groups: Any, values: Tensor) -> Tensor:
    """Numbers of the groups that are shuffled whole, (N,): each row is one where none are given."""
    if groups is None:
        return torch.arange(len(values))
    found = check_integers(groups, "groups").cpu().flatten()
    if len(found) != len(values):
        raise ValueError(f"groups must be one for each of {len(values)} rows, got {len(found)}")
    number = found.unique(return_inverse=True)[1]
    first = torch.zeros(int(number.max()) + 1, dtype=values.dtype).index_put((number,), values)
    if bool((first[number] != values).any()):
        raise ValueError("groups must have one label each, but labels vary inside of one: leave groups out")
    return number


def _shuffled(values: Tensor, group: Tensor, generator: torch.Generator) -> Tensor:
    """Labels (n,) with those of whole groups exchanged."""
    names, number = group.unique(return_inverse=True)
    of_group = torch.zeros(len(names), dtype=values.dtype).index_put((number,), values)
    return of_group[torch.randperm(len(names), generator=generator)][number]


def _of_region(
    component: int, latents: Tensor, values: Tensor, group: Tensor, classes: int, n_permutations: int,
    generator: torch.Generator,
) -> list[LatentAssociation]:  # fmt: skip
    """The associations of the latents (n, R) of a region with the labels of its rows, (n,)."""
    if len(values.unique()) < 2:
        return []
    ranks = torch.stack([_ranks(column) for column in latents.unbind(1)], 1)
    label = values.unique(return_inverse=True)[1].double() if classes > 2 else _ranks(values)
    measure = _between if classes > 2 else _correlation
    own = measure(ranks, label)
    strongest = torch.stack(
        [measure(ranks, _shuffled(label, group, generator)).abs().max() for _ in range(n_permutations)]
    )
    return [
        LatentAssociation(
            component, axis, len(values), float(value),
            (1 + int((strongest >= value.abs() - 1e-12).sum())) / (1 + n_permutations),
        )
        for axis, value in enumerate(own)
    ]  # fmt: skip


def _ranks(values: Tensor) -> Tensor:
    """Ranks (n,) float64; equal values share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def _correlation(ranks: Tensor, label: Tensor) -> Tensor:
    """Correlations of ranks (n, R) with labels (n,): (R,); 0 for what does not vary."""
    centered, other = ranks - ranks.mean(0), label - label.mean()
    norm = other.norm() * centered.norm(dim=0)
    return torch.where(norm > 0, other @ centered / norm.clamp_min(1e-300), 0)


def _between(ranks: Tensor, label: Tensor) -> Tensor:
    """Roots of the shares of the variance of ranks (n, R) that lie between classes (n,): (R,)."""
    centered, number = ranks - ranks.mean(0), label.long()
    counts = torch.bincount(number).double()
    sums = centered.new_zeros(len(counts), ranks.shape[1]).index_add_(0, number, centered)
    between = (sums.square() / counts.clamp_min(1).unsqueeze(1)).sum(0)
    whole = centered.square().sum(0)
    return torch.where(whole > 0, between / whole.clamp_min(1e-300), 0).clamp_max(1).sqrt()

"""Candidates of rows that have none: some of the components are looked at in few coordinates, few of these in full.

Along the directions in which the means differ most, a component is a normal distribution of few coordinates, its exact
marginal. Components whose means lie near each other form a group, and a group is a normal distribution too. A row
looks at the groups that are likeliest for it, at the marginals in these, and at the components with the largest ones.
It takes a few per cent of a scan of all. Where the means differ alike in very many directions, it misses components:
so what it misses is measured before it is used, and again at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mfa_kernels.fitting.initialization import leading
from mfa_kernels.fitting.kmeans import kmeans
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.ops.common.products import product
from mfa_kernels.ops.kmeans.basis import WIDTHS, leading_directions
from mfa_kernels.ops.kmeans.op import nearest
from mfa_kernels.ops.scan.candidates import scan_candidates
from mfa_kernels.ops.scan.top_scores import top_scores
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.screen.cost import dense_cost
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury

LISTED = 32
"""Candidates of a row."""

_GROUP = 16  # components of a group, on average
_GROUP_DIRECTIONS = 10  # in which a group is wider than the noise
_SHARE, _LEAST = 12, 16  # a row looks at one group in so many, and at so many at least
_PAYS = 0.5  # of the cost of a scan of all, below which a search is worth what it may miss
_PAIR_COST = 4  # of a pair on its own, in units of one in a scan of all, at most: 2.0 to 2.3 on Zen 3 (bench_search)


class _Terms(NamedTuple):
    woodbury: Woodbury
    center: Tensor  # (D,)
    basis: Tensor  # (F, D), times the scale
    groups: tuple[Tensor, Tensor]  # right and offsets, as `top_scores` takes them
    components: tuple[Tensor, Tensor]  # of the components, group by group
    order: Tensor  # (K,) int32, their numbers
    starts: Tensor  # (G + 1,)


class CandidateSearch:
    """Finds the likeliest components of rows, nearly always, for parameters that stand still for many rows.

    Args:
        mfa: the mixture, with one noise for all components.
        middles: (G, D), those that an earlier search of the fit had; None: of the means as they are when rows are
            looked at for the first time.

    Attributes:
        middles: a component belongs to the group whose middle is nearest. They stay where they are while parameters
            change, so that what a row finds depends on nothing but them and the parameters.
    """

    def __init__(self, mfa: MFA, middles: Tensor | None = None) -> None:
        self.mfa, self.middles = mfa, middles
        self._terms: _Terms | None = None

    @classmethod
    def where_it_pays(cls, mfa: MFA, rows: int) -> CandidateSearch | None:
        """A search, where that of so many rows costs far less than a scan of all components; `missed` says whether it
        finds them."""
        woodbury, (components, features, rank) = mfa.woodbury(), (mfa.n_components, mfa.n_features, mfa.rank)
        width = WIDTHS[-1]
        if not woodbury.is_cpp or woodbury.per_component or mfa.precision == "reference":
            return None
        if features < 2 * width or components < 2 * width:
            return None
        pair, groups = (rank + 1) * features, groups_of(components)
        of_groups = groups * (_GROUP_DIRECTIONS + 1) * width
        marginals = _looked_at(groups) * _GROUP * (rank + 1) * width
        cost = features * width + of_groups + marginals + _PAIR_COST * LISTED * pair
        return cls(mfa) if cost < _PAYS * components * pair * dense_cost(woodbury, rows) else None

    @torch.no_grad()
    def candidates(self, x: Tensor) -> Tensor:
        """The candidates of rows x (n, D): (n, LISTED) int32, -1 for none."""
        terms = self._prepared()
        y = product(x.to(terms.center) - terms.center, terms.basis)
        lists = top_scores(y, *terms.groups, _looked_at(len(terms.starts) - 1))
        found = top_scores(y, *terms.components, LISTED, terms.starts, lists)
        return torch.where(found < 0, -1, terms.order[found.clamp_min(0).long()])

    @torch.no_grad()
    def scan(self, x: Tensor) -> ActivePairs:
        """The active pairs of rows x (n, D) among their candidates; among all components for rows that have none, as
        where they are too far out for the dtype along the coordinates."""
        parameters, woodbury = self.mfa.prepared()
        active = scan_candidates(x, self.candidates(x), woodbury, parameters.log_weights).active
        lost = active.components[:, 0] < 0
        if lost.any():
            for own, full in zip(active, self.mfa.active_pairs(x[lost])):
                own[lost] = full
        return active

    @torch.no_grad()
    def missed(self, x: Tensor) -> float:
        """By how much the bound that candidates give falls short of log p of rows x (n, D), the mean in nats."""
        gap = self.mfa.active_pairs(x).log_prob.double() - self.scan(x).log_prob.double()
        gap = gap[gap.isfinite()]
        return float(gap.mean()) if len(gap) else 0.0

    def _prepared(self) -> _Terms:
        parameters, woodbury = self.mfa.prepared()
        if self._terms is None or self._terms.woodbury is not woodbury:
            means = parameters.means
            center, basis = _coordinates(means, woodbury.scale)
            if self.middles is None:
                found = kmeans(product(means - center, basis), groups_of(len(means)), progress=False)
                owner = found.assignment.to(means.device)
                counts = owner.bincount(minlength=len(found.centroids)).clamp_min(1).unsqueeze(1)
                self.middles = means.new_zeros(len(counts), means.shape[1]).index_add_(0, owner, means) / counts
            self._terms = _terms(parameters, woodbury, center, basis, self.middles)
        return self._terms


def groups_of(components: int) -> int:
    """How many groups so many components form."""
    return -(-components // _GROUP)


def _looked_at(groups: int) -> int:
    return min(groups, max(_LEAST, -(-groups // _SHARE)))


def _coordinates(means: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The center (D,) and a basis (D, F): coordinates of x are (x - center) basis, in units of the noise."""
    center = means.mean(0)
    found = leading_directions((means - center) * scale, torch.zeros_like(center))
    assert found is not None, "there are too few components or features for coordinates"
    return center, (found * scale.unsqueeze(1)).mT.contiguous()


def _terms(parameters: Parameters, woodbury: Woodbury, center: Tensor, basis: Tensor, middles: Tensor) -> _Terms:
    """The marginals of the components along the basis, in units of the noise, and those of their groups."""
    loadings, log_weights = parameters.loadings, parameters.log_weights
    m = product(parameters.means - center, basis)
    along = product(loadings.mT.flatten(0, 1), basis).view(*loadings.mT.shape[:2], -1)  # (K, R, F)
    owner, _ = nearest(m, product(middles - center, basis))
    order, counts = owner.argsort(stable=True), owner.bincount(minlength=len(middles))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    m, along, log_weights = m[order], along[order], log_weights[order]
    members = list(zip(m.split(counts.tolist()), along.split(counts.tolist())))
    middle = torch.stack([own.mean(0) if len(own) else torch.zeros_like(m[0]) for own, _ in members])
    spread = torch.stack([_spread(own - k, loaded) for (own, loaded), k in zip(members, middle)])
    probe = torch.randn(m.shape[1], 2 * _GROUP_DIRECTIONS, generator=torch.Generator().manual_seed(0)).to(m)
    directions, squares = leading(spread, probe, _GROUP_DIRECTIONS)  # of spread' spread: roots are of spread
    logs = torch.where(counts > 0, counts.double().log(), -torch.inf)

    of_groups = _normals(middle, (directions * squares.sqrt().sqrt().unsqueeze(1)).mT, squares.double().sqrt(), logs)
    strength, turn = torch.linalg.eigh((along @ along.mT).double())
    own = _normals(m, turn.mT.to(m) @ along, strength.clamp_min(0), log_weights.double())
    return _Terms(woodbury, center, basis, of_groups, own, order.int(), starts)


def _spread(m: Tensor, loadings: Tensor) -> Tensor:
    """The covariance (F, F) of components with means m (n, F) about theirs and loadings (n, R, F), less the noise."""
    rows = torch.cat([m, loadings.flatten(0, 1)])
    return rows.mT @ rows / max(1, len(m))


def _normals(m: Tensor, loadings: Tensor, strength: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """What `top_scores` takes of normal distributions with means m (n, F) and covariances I + L' L of loadings
    (n, S, F), L L' = diag(s): the precision is I - B' B with B = diag(1 + s)^-1/2 L, and |y|^2 is common to all."""
    b = loadings * (1 + strength).rsqrt().unsqueeze(2).to(m)
    first = log_weights - 0.5 * ((1 + strength).log().sum(1) + m.double().square().sum(1))
    offsets = torch.cat([first.to(m).unsqueeze(1), -(b @ m.unsqueeze(2)).squeeze(2)], 1)
    return torch.cat([m.unsqueeze(1), b], 1).contiguous(), offsets

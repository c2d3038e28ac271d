"""The bounds of screening, which stage 0 prepares, and the pairs that a screened scan finds."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.types import ScanRows


class Neighbors(NamedTuple):
    """Lists of neighbors, and the means in groups, among which a first component is looked for.

    csrc/cpu/screen/neighbor_scan.h reads them.

    Attributes:
        centers: of G groups of the means m, (G, p).
        center_halves: half of their squared lengths, (G,).
        starts: where the members of each group begin, (G+1,) int32.
        members: components, group by group, (K,) int32.
        means: m of the members, (K, p).
        mean_halves: half of their squared lengths, (K,).
        neighbors: of every component those with the smallest onsets, sorted by them, (K, M) int32.
        onsets: Mahalanobis distance of a token from the component, nearer than which a neighbor is not active, (K, M).
        horizons: the smallest onset that is not in the list, (K,).
        threshold: nats below the best logit at which a component stops being active, for which the onsets hold.
    """

    centers: Tensor
    center_halves: Tensor
    starts: Tensor
    members: Tensor
    means: Tensor
    mean_halves: Tensor
    neighbors: Tensor
    onsets: Tensor
    horizons: Tensor
    threshold: float


class Screen(NamedTuple):
    """The terms of the bounds that the C++ kernels read.

    Attributes:
        basis: Q, (D, p).
        rows: m_k = Q^T lam (mu_k - c) and B_k, (K, p/V, R+1, V).
        radii: |lam (mu_k - c)|, rounded up, (K,).
        slack: of a bound, per squared reach |x~| + |m~_k|, (K,).
        exact_slack: the slack of a logit that is computed in full.
        log_det: log|C_k|, (K,): its size bounds the rounding error of the constants.
        lines: a direction u_k for every component, (K, p); (0, p) where the scan does without.
        line_terms: u_k . m_k, and one over the variance of u_k . y, rounded down; (2, K) or (2, 0).
        batches_by_lines: True where batches of more than four tokens use the lines too; fewer tokens always do.
        neighbors: lists of components that can be active together; None bounds every component for every token.
    """

    basis: Tensor
    rows: Tensor
    radii: Tensor
    slack: Tensor
    exact_slack: float
    log_det: Tensor
    lines: Tensor
    line_terms: Tensor
    batches_by_lines: bool = True
    neighbors: Neighbors | None = None

    def without_lines(self) -> Screen:
        """The same, with every marginal bound computed."""
        return self._replace(lines=self.lines[:0], line_terms=self.line_terms[:, :0])


class GpuScreen(NamedTuple):
    """The terms of the bounds that the Triton kernels read, on their device.

    Attributes:
        basis: Q as it was given, (D, p).
        projection: Q^T, (p', D') fp16; p' and D' are p and D rounded up to multiples of 64.
        sigma: the factor of y that brings |Q|_2 to sqrt(1 - EPSILON), (1,).
        spread: |Q|_F / |Q|_2, () float64.
        rows: of the marginals, for the scan.
        slack: of the bounds, (K,) float64; infinite for a component without a bound.
        rounding: the largest rounding of B among the components that have a bound, () float64.
    """

    basis: Tensor
    projection: Tensor
    sigma: Tensor
    spread: Tensor
    rows: ScanRows
    slack: Tensor
    rounding: Tensor


AnyScreen: TypeAlias = "Screen | GpuScreen"


class ScreenedPairs(NamedTuple):
    """The active pairs, and how they were found.

    Attributes:
        active: log p(x) and the active pairs, those of the dense scan up to rounding.
        dropped: bound on the responsibility of all the components whose logit was never computed, together; (N,).
        evaluated: components whose logit was computed, (N,) int32; -1 where the token took the dense scan.
    """

    active: ActivePairs
    dropped: Tensor
    evaluated: Tensor

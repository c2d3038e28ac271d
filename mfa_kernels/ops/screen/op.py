"""Screening on a CPU: what stage 0 precomputes for it (`screen`), and the scan that uses it (`select`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mfa_kernels.ops import native
from mfa_kernels.ops.factors.op import Factors
from mfa_kernels.ops.screen.basis import basis as choose_basis
from mfa_kernels.ops.select.op import Active

WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""What `choose` tries for p."""

PAIR_COST = 8
"""Of a logit computed by itself, in units of one in the dense scan."""

_CHUNK = 1 << 23  # largest number of float64 values of a temporary
_FLUSH = 64  # features between flushes of a sum, csrc/cpu/scan.h


class Screen(NamedTuple):
    """What the bounds need of the parameters.

    Attributes:
        basis: Q, (D, p).
        rows: m_k = Q^T lam (mu_k - c) and B_k, (K, p/V, R+1, V).
        radii: |lam (mu_k - c)|, rounded up, (K,).
        slack: of a bound, per squared reach |x~| + |m~_k|, (K,).
        exact_slack: what a logit computed in full adds to it.
        log_det: log|C_k|, whose rounding is in the constants, (K,).
    """

    basis: Tensor
    rows: Tensor
    radii: Tensor
    slack: Tensor
    exact_slack: float
    log_det: Tensor


class Screened(NamedTuple):
    """As `Active`, and what screening did.

    Attributes:
        active: log p(x) and the active pairs, those of the dense scan up to rounding.
        dropped: bound on the responsibility of all the components whose logit was never computed, together; (N,).
        evaluated: components whose logit was computed, (N,) int32; -1 where the token took the dense scan.
    """

    active: Active
    dropped: Tensor
    evaluated: Tensor


def default_features(features: int) -> int:
    """p where nothing was measured: an eighth of D, at least 48 and at most D, in multiples of 16."""
    return min(max(48, -(-features // 128) * 16), features // 16 * 16)


def screen(
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
    factors: Factors,
    features: int | None = None,
    basis: Tensor | None = None,
) -> Screen:
    """Stage 0 of screening: K D p (R + 1) multiply-adds in float64, and an eigenproblem unless a basis is given.

    Args:
        means: (K, D), float32 or float64, on a CPU for which the C++ kernels are built.
        loadings: (K, D, R).
        noise_variance: (D,); noise per component is not screened.
        log_weights: (K,).
        factors: of these parameters.
        features: p, a multiple of 16 and at most D; None takes `default_features`.
        basis: Q (D, p), any matrix with nearly orthonormal columns: that of a step before serves as well; None
            computes the one that suits these parameters.

    Raises:
        ValueError: noise per component, or p that is not a multiple of 16 between 16 and D.
    """
    if noise_variance.dim() != 1:
        raise ValueError(f"noise_variance must have shape (D,) for screening, got {tuple(noise_variance.shape)}")
    width = features if features is not None else default_features(means.shape[1])
    if basis is not None:
        if basis.dim() != 2 or basis.shape[0] != means.shape[1]:
            raise ValueError(f"basis must have shape (D, p) = ({means.shape[1]}, p), got {tuple(basis.shape)}")
        width = basis.shape[1]
    if not 16 <= width <= means.shape[1] or width % 16:
        raise ValueError(f"features must be a multiple of 16 between 16 and D = {means.shape[1]}, got {width}")
    with torch.no_grad():
        q = choose_basis(factors, log_weights.exp(), width) if basis is None else basis
        return _screen(means, loadings, noise_variance, factors, q.to(means.dtype).contiguous())


def choose(
    x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor, log_weights: Tensor, factors: Factors
) -> Screen | None:
    """The screen that costs least on some tokens; None where the dense scan costs less, as it does with noise per
    component. Counts decide, not times: the same tokens and parameters give the same choice.

    Args:
        x: (N, D), a few hundred tokens like those to come, in the dtype of the parameters.
        means, loadings, noise_variance, log_weights, factors: as `screen` takes them.
    """
    count, features = means.shape
    widths = [width for width in WIDTHS if 2 * width <= features]
    if noise_variance.dim() != 1 or not widths:
        return None
    constants = factors.constants(log_weights)
    threshold = math.log(count / torch.finfo(x.dtype).eps)
    basis = choose_basis(factors, log_weights.exp(), widths[-1])
    best, least = None, 1.0  # in units of the dense scan
    for width in widths:  # leading eigenvectors: one basis serves all
        if width >= least * features:
            break
        candidate = screen(means, loadings, noise_variance, log_weights, factors, basis=basis[:, :width])
        evaluated = select(x, factors, constants, candidate, threshold, 1).evaluated
        pairs = torch.where(evaluated < 0, count, PAIR_COST * evaluated).double().mean().item()
        cost = width / features + width / (count * (loadings.shape[2] + 3)) + pairs / count
        if cost < least:
            best, least = candidate, cost
    return best


def _screen(means: Tensor, loadings: Tensor, noise_variance: Tensor, factors: Factors, q: Tensor) -> Screen:
    count, features, rank = loadings.shape
    kept = q.shape[1]
    scale = noise_variance.double().rsqrt()
    wide = q.double()
    lanes = native.library().vector_bytes // means.element_size()
    rows = means.new_empty(count, kept // lanes, rank + 1, lanes)
    radii, slack = torch.empty(2, count, dtype=torch.float64)
    step = max(1, _CHUNK // (features * (rank + 1)))
    for begin in range(0, count, step):
        chunk = slice(begin, begin + step)
        m = (means[chunk].double() - factors.center.double()) * scale
        v = loadings[chunk].mT.flatten(0, 1).double() @ (scale.unsqueeze(-1) * wide)
        # Only multiplied by the rounding of float64: their own is of no account.
        sizes = 1 + (loadings[chunk] * factors.scale.unsqueeze(-1)).square().sum(1).double()
        marginal, uncertainty = _marginal(v.unflatten(0, sizes.shape), sizes, features)
        packed = torch.cat([(m @ wide).unsqueeze(1), marginal], 1).to(means.dtype)
        rows[chunk] = packed.unflatten(2, (-1, lanes)).transpose(1, 2)
        radii[chunk] = m.norm(dim=-1)
        slack[chunk] = uncertainty
    slack += _slack(wide, features, rank, torch.finfo(means.dtype).eps / 2)
    exact = _exact_slack(features, rank, torch.finfo(means.dtype).eps / 2)
    up = 1 + 4 * torch.finfo(means.dtype).eps  # rounds up through the conversion to a narrower dtype
    return Screen(q, rows, (radii * up).to(means.dtype), (slack * up).to(means.dtype), exact * up, factors.log_det)


def _marginal(v: Tensor, sizes: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """B of the marginals whose loadings are v^T, both (K, R, p), and their rounding in float64 as slack (K,).

    `sizes` (K, R) are 1 + the squared lengths of the loadings before they were projected.
    """
    count, rank, kept = v.shape
    identity = torch.eye(rank, dtype=v.dtype).expand(count, rank, rank)
    cholesky, failed = torch.linalg.cholesky_ex(v @ v.mT + identity)
    usable = (failed == 0) & cholesky.isfinite().flatten(1).all(-1) & v.isfinite().flatten(1).all(-1)
    cholesky = torch.where(usable[:, None, None], cholesky, identity)
    b = torch.linalg.solve_triangular(cholesky, torch.where(usable[:, None, None], v, 0), upper=False)
    inverse = torch.linalg.solve_triangular(cholesky, identity, upper=False)
    # tau (README): what rounding is multiplied by when loadings are nearly collinear. Where it leaves nothing, or there
    # is no factorisation, nothing is known of the component, and it is never dropped.
    tau = (sizes * inverse.square().sum(1)).sum(-1)
    rounding = 8 * features * (rank + 1) * math.sqrt(kept) * torch.finfo(torch.float64).eps
    return b, torch.where(usable & (rounding * tau < 0.5), rounding * tau, torch.inf)


def _slack(q: Tensor, features: int, rank: int, unit: float) -> float:
    """What a bound may be off by, per squared reach, in a dtype with this unit of rounding (README, "Rounding")."""
    kept = q.shape[1]
    skew = torch.linalg.matrix_norm(q.mT @ q - torch.eye(kept, dtype=q.dtype)).item()
    long, short = _FLUSH + -(-features // _FLUSH) + 2, _FLUSH + -(-kept // _FLUSH) + 2
    token = (6 + long * math.sqrt(kept * (1 + skew))) * unit  # |y - Q^T x~| / |x~|
    coordinates = token + 4 * unit
    products = coordinates + (short + 1) * math.sqrt(max(rank, 1)) * unit
    total = 2 * coordinates + 2 * products + products**2 + 2 * (short + rank + 8) * unit + 2 * skew
    return 0.5 * total * 1.01 + 8 * unit


def _exact_slack(features: int, rank: int, unit: float) -> float:
    """The same for a logit from all the features: sums in SIMD lanes, of at most D/4 values each, then across lanes."""
    long = -(-features // 4) + 8
    products = (6 + (long + 1) * math.sqrt(max(rank, 1))) * unit
    return 0.5 * (12 * unit + 2 * products + products**2 + 2 * (long + rank + 8) * unit) * 1.01 + 8 * unit


def select(x: Tensor, factors: Factors, constants: Tensor, screen: Screen, threshold: float, slots: int) -> Screened:
    """Stage 1 through the bounds; contract of the C++ `select`, with what screening did beside it. No gradients.

    Args:
        x: (N, D), any float dtype; it is brought to the dtype of the factors.
        factors: shared noise, in the layout of the C++ kernels.
        constants: `factors.constants(log_weights)`, (K,).
        screen: of the same parameters.
        threshold: nats below the best logit at which a component stops being active.
        slots: S, the most active components kept per token.
    """
    *active, dropped, evaluated = torch.ops.mfa_kernels.select_screened(
        x, factors.rows, constants, factors.scale, factors.center, screen.basis, screen.rows, screen.log_det,
        screen.radii, screen.slack, screen.exact_slack, threshold, slots,
    )  # fmt: skip
    return Screened(Active(*active), dropped, evaluated)


def bounds(x: Tensor, factors: Factors, constants: Tensor, screen: Screen) -> Tensor:
    """The upper bounds of all logits that `select` works from, (N, K); arguments as there, in one dtype."""
    return native.library().screen_bounds(
        x, constants, factors.scale, factors.center, screen.basis, screen.rows, screen.log_det, screen.radii,
        screen.slack,
    )  # fmt: skip


torch.library.define(
    "mfa_kernels::select_screened",
    "(Tensor x, Tensor rows, Tensor constants, Tensor scale, Tensor center, Tensor basis, Tensor marginal_rows,"
    " Tensor log_det, Tensor radii, Tensor slack, float exact_slack, float threshold, int slots)"
    " -> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts, Tensor dropped, Tensor evaluated)",
)


@torch.library.impl("mfa_kernels::select_screened", "CPU")
def _select_screened(x, rows, *rest):
    return native.library().select_screened(x.to(rows.dtype).contiguous(), rows, *rest)


@torch.library.register_fake("mfa_kernels::select_screened")
def _(
    x, rows, constants, scale, center, basis, marginal_rows, log_det, radii, slack, exact_slack, threshold, slots
):  # fmt: skip
    tokens = x.shape[0]
    return (
        rows.new_empty(tokens),
        rows.new_empty(tokens, slots, dtype=torch.int32),
        rows.new_empty(tokens, slots),
        rows.new_empty(tokens, dtype=torch.int32),
        rows.new_empty(tokens),
        rows.new_empty(tokens, dtype=torch.int32),
    )

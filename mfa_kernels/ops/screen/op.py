"""Screening on a CPU: what stage 0 precomputes for it (`screen`), and the scan that uses it (`select`)."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mfa_kernels.ops import native, trust
from mfa_kernels.ops.factors.op import Factors
from mfa_kernels.ops.screen import neighbors as lists
from mfa_kernels.ops.screen.basis import basis as choose_basis
from mfa_kernels.ops.screen.neighbors import Neighbors
from mfa_kernels.ops.select.op import Active, activity_threshold

if TYPE_CHECKING:
    from mfa_kernels.ops.screen.triton_screen import Marginals

AnyScreen: TypeAlias = "Screen | Marginals"

WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""What `choose` tries for p."""

PAIR_COST = 8
"""Of a logit computed by itself, in units of one in the dense scan."""

LINE_PAIR_COST = 12
"""Of a marginal bound computed by itself, in units of one among those of all components; kLineShare in csrc."""

STAGE_COST = (40, 1.8)
"""Of stage 0, in tokens of the dense scan: the first for reading all loadings, the second for each of p coordinates."""

_KNOWN = 1 << 25  # largest number of float64 projections that `choose` keeps from one width to the next
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
        lines: a direction u_k for every component, (K, p); (0, p) where the scan does without.
        line_terms: u_k . m_k, and one over the variance of u_k . y, rounded down; (2, K) or (2, 0).
        batches_by_lines: whether lines go first for batches too, beside up to four tokens that come alone.
        neighbors: which components can matter beside which, or None: then every component is bounded for every token.
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


def serves(factors: Factors) -> bool:
    """Whether there are kernels that screen with these factors: C++ on a CPU, or Triton."""
    shared = not factors.per_component
    return shared and (factors.is_native or (bool(factors.scan) and factors.scan[0].numel() > 0))


def _triton() -> ModuleType:
    from mfa_kernels.ops.screen import triton_screen

    return triton_screen


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
) -> AnyScreen:
    """Stage 0 of screening: K D p (R + 1) multiply-adds in float64, and an eigenproblem unless a basis is given.

    PyTorch's BLAS has a hand in it, so its last bits may depend on the number of threads; those of its scans do not.

    Args:
        means: (K, D), float32 (or float64 on a CPU).
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
    if not serves(factors):
        raise ValueError("factors must be those of the C++ kernels or of Triton for screening: no other backend has it")
    width = features if features is not None else default_features(means.shape[1])
    if basis is not None:
        if basis.dim() != 2 or basis.shape[0] != means.shape[1]:
            raise ValueError(f"basis must have shape (D, p) = ({means.shape[1]}, p), got {tuple(basis.shape)}")
        width = basis.shape[1]
    if not 16 <= width <= means.shape[1] or width % 16:
        raise ValueError(f"features must be a multiple of 16 between 16 and D = {means.shape[1]}, got {width}")
    with torch.no_grad():
        q = (choose_basis(factors, log_weights.exp(), width) if basis is None else basis).to(means.dtype)
        if factors.is_native:
            return _screen(means, loadings, noise_variance, log_weights, factors, q)[0]
        return _triton().screen(means, loadings, noise_variance, factors, q)


def refresh(
    previous: AnyScreen, means: Tensor, loadings: Tensor, noise_variance: Tensor, log_weights: Tensor, factors: Factors
) -> AnyScreen:
    """The screen of parameters that have moved, on the coordinates of another: stage 0 without an eigenproblem, for
    every training step. `modelled_cost` says whether a step should; other arguments as `screen` takes them."""
    moved = screen(means, loadings, noise_variance, log_weights, factors, basis=previous.basis)
    if isinstance(moved, Screen) and isinstance(previous, Screen):
        moved = moved._replace(batches_by_lines=previous.batches_by_lines)
    return moved


def with_neighbors(
    screen: Screen,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
    factors: Factors,
    threshold: float | None = None,
) -> Screen:
    """The same, knowing which components can matter beside which: work per token that hardly grows with K, for about
    K^2 p R^2 multiply-adds now.

    Args:
        screen: of the parameters, which follow as `screen` takes them.
        threshold: nats for which it is made; larger ones find it less useful. None takes that of active components.
    """
    if threshold is None:
        threshold = activity_threshold(len(means), means.dtype)
    with torch.no_grad():
        q = screen.basis
        projections = _screen(means, loadings, noise_variance, log_weights, factors, q, keep=True)[1]
        assert projections is not None
        constants = factors.constants(log_weights)
        size = constants.abs() + screen.log_det.abs() + 2 * means.shape[1]
        known = screen.slack.isfinite()
        # As in csrc/cpu/screen_few.h, and rho, which is less than the slack: log|C_k| in float64 is off by so much.
        raised = constants + 2 * torch.finfo(means.dtype).eps * size + torch.where(known, screen.slack, 0)
        raised = torch.where(constants == -math.inf, constants, raised)  # of no weight: nobody's neighbor
        sizes = factors.cholesky.double().square().sum((1, 2)).sqrt()
        norm = 1 + _skew(q.double())
        found = lists.find(projections, sizes, raised, known, norm, means.shape[1], threshold)
    return screen._replace(neighbors=found)


def choose(
    x: Tensor,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
    factors: Factors,
    least: int = 16,
) -> AnyScreen | None:
    """The screen that costs least on some tokens; None where the dense scan costs less, as it does with noise per
    component. Counts decide, not times: the same tokens and parameters give the same choice, on as many threads.

    Args:
        x: (N, D), a few hundred tokens like those to come, in the dtype of the parameters.
        means, loadings, noise_variance, log_weights, factors: as `screen` takes them.
        least: coordinates, where that is no more than half of the features: `neighbors.FEATURES` for lists.
    """
    step = 16 if factors.is_native else 64  # features that a tile of Triton's scan reads at least
    widths = [width for width in WIDTHS if 2 * width <= means.shape[1] and width % step == 0]
    widths = [width for width in widths if width >= least] or widths
    if not serves(factors) or not widths:
        return None
    with torch.no_grad():
        return _choose(x, means, loadings, noise_variance, log_weights, factors, widths)


def _choose(
    x: Tensor,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
    factors: Factors,
    widths: list[int],
) -> AnyScreen | None:
    count, features, rank = loadings.shape
    constants = factors.constants(log_weights)
    threshold = activity_threshold(count, means.dtype)
    basis = choose_basis(factors, log_weights.exp(), widths[-1]).to(means.dtype)
    best, least, before = None, 1.0, math.inf  # in units of the dense scan
    known, one = None, torch.ones(1)
    for width in widths:
        sizes = count, features, rank, width
        ways = (None, 0.0) if factors.is_native else (None,)
        if min(modelled_cost(one, *sizes, lines=lines) for lines in ways) >= least:
            break
        # Leading eigenvectors: the basis of one width begins that of the next, and so do the projections on it.
        keep = count * (rank + 1) * width <= _KNOWN
        parameters = means, loadings, noise_variance
        if factors.is_native:
            candidate, known = _screen(*parameters, log_weights, factors, basis[:, :width], known, keep)
            (_, _, logits, _), _, evaluated = select(x, factors, constants, candidate, threshold, 1)
            share = lines_left(x, factors, constants, candidate, logits[:, 0] - threshold).mean().item()
            by_lines = modelled_cost(evaluated, *sizes, lines=share)
            cost = modelled_cost(evaluated, *sizes)
            candidate = candidate._replace(batches_by_lines=by_lines < cost)
            rises, before, cost = by_lines >= before, by_lines, min(by_lines, cost)
        else:
            candidate = _triton().screen(*parameters, factors, basis[:, :width])
            evaluated = select(x, factors, constants, candidate, threshold, 1).evaluated
            rises, cost = False, modelled_cost(evaluated, *sizes)
        if cost < least:
            best, least = candidate, cost
        elif best is not None and rises:  # no longer cheaper with lines or without
            break
    return best


def modelled_cost(
    evaluated: Tensor,
    components: int,
    features: int,
    rank: int,
    kept: int,
    tokens: int | None = None,
    lines: float | None = None,
) -> float:
    """Of a token, in units of its dense scan: projection, bounds, and the pairs computed in full. Below 1, it pays.

    Args:
        evaluated: of some tokens like it, (N,), as `select` returns it: those of the batch before will do.
        components: K.
        features: D.
        rank: R.
        kept: p.
        tokens: among which stage 0 is shared, where it is to be counted: those of one training step.
        lines: share of the components that their lines leave, where the screen has lines.
    """
    marginals = 1.0  # in units of the marginal bounds of all components
    if lines is not None:
        marginals = 1 / (rank + 3) + LINE_PAIR_COST * (lines + candidates(components) / components)
    pairs = torch.where(evaluated < 0, components, PAIR_COST * evaluated).double().mean().item()
    stage_0 = 0.0 if tokens is None else (STAGE_COST[0] + STAGE_COST[1] * kept) / tokens
    return kept / features * marginals + kept / (components * (rank + 3)) + pairs / components + stage_0


def bytes_read(evaluated: Tensor, factors: Factors, screen: Screen, lines: Tensor | None = None) -> Tensor:
    """Bytes of parameters that each token reads when it comes alone, (N,) int64.

    Args:
        evaluated: (N,), as `select` returns it.
        factors: of the mixture; reading all of it is `factors.rows.nbytes` and a little.
        screen: of the mixture.
        lines: (N,), as `lines_left` returns it, where the screen has lines.
    """
    of_all = (screen.basis, screen.radii, screen.slack, screen.log_det, factors.scale, factors.center)
    constants = screen.log_det.nbytes  # log pi_k and the rest, (K,) too
    components = factors.rows.shape[0]
    computed = torch.where(evaluated < 0, components, evaluated).long()
    read = sum(t.nbytes for t in of_all) + constants + computed * factors.rows[0].nbytes
    if lines is None:
        return read + screen.rows.nbytes
    marginals = (lines * components).round().long() + candidates(components)
    return read + screen.lines.nbytes + screen.line_terms.nbytes + marginals * screen.rows[0].nbytes


def candidates(components: int) -> int:
    """Components per token whose marginal bounds choose the first logit, as in csrc/cpu/screen.h."""
    return min(max(8, components // 128), 32)


def lines_left(x: Tensor, factors: Factors, constants: Tensor, screen: Screen, bars: Tensor) -> Tensor:
    """Share of the components whose bound by their line reaches the bar of the token, (N,) float64.

    Args:
        x, factors, constants, screen: as `select` takes them; x in the dtype of the factors.
        bars: (N,), the best logit less the threshold.
    """
    below = bounds(x, factors, constants, screen, by_lines=True) < bars.unsqueeze(-1)
    return (~below).double().mean(-1)


def _screen(
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
    factors: Factors,
    q: Tensor,
    known: Tensor | None = None,
    keep: bool = False,
) -> tuple[Screen, Tensor | None]:
    """A screen, and the projections (K, R+1, p) float64 behind it if they are to be kept; `known` are those on the
    first columns of q."""
    features, rank = loadings.shape[1:]
    q = q.contiguous()
    wide, scale, eps = q.double(), noise_variance.double().rsqrt(), torch.finfo(means.dtype).eps
    up = 1 + 4 * eps  # rounds up through the conversion to a narrower dtype
    projection = scale.unsqueeze(-1) * wide
    weights = log_weights.double().exp()
    middle = (weights @ means.double() / weights.sum() - factors.center.double()) @ projection
    middle = middle.nan_to_num(0, 0, 0)  # of one component that is not finite, the others' lines know nothing
    rows, radii, slack, lines, line_terms, projections = native.library().screen_marginals(
        means.contiguous(), loadings.contiguous(), factors.cholesky, factors.center, scale, projection, known, keep,
        _rounding(features, rank, q.shape[1]), _slack(wide, features, rank, eps / 2), 1 + _skew(wide), middle, up,
    )  # fmt: skip
    exact = _exact_slack(features, rank, eps / 2) * up
    return Screen(q, rows, radii, slack, exact, factors.log_det, lines, line_terms), projections


def _rounding(features: int, rank: int, kept: int) -> float:
    """What tau (README, "Rounding") is multiplied by: the rounding of stage 0, in float64."""
    return 8 * features * (rank + 1) * math.sqrt(kept) * torch.finfo(torch.float64).eps


def _slack(q: Tensor, features: int, rank: int, unit: float) -> float:
    """What a bound may be off by, per squared reach, in a dtype with this unit of rounding (README, "Rounding")."""
    kept, skew = q.shape[1], _skew(q)
    long, short = _FLUSH + -(-features // _FLUSH) + 2, _FLUSH + -(-kept // _FLUSH) + 2
    token = (6 + long * math.sqrt(kept * (1 + skew))) * unit  # |y - Q^T x~| / |x~|
    coordinates = token + 4 * unit
    products = coordinates + (short + 1) * math.sqrt(max(rank, 1)) * unit
    total = 2 * coordinates + 2 * products + products**2 + 2 * (short + rank + 8) * unit + 2 * skew
    return 0.5 * total * 1.01 + 8 * unit


def _skew(q: Tensor) -> float:
    """|Q^T Q - I|."""
    return torch.linalg.matrix_norm(q.mT @ q - torch.eye(q.shape[1], dtype=q.dtype)).item()


def _exact_slack(features: int, rank: int, unit: float) -> float:
    """The same for a logit from all the features: sums in SIMD lanes, of at most D/4 values each, then across lanes."""
    long = -(-features // 4) + 8
    products = (6 + (long + 1) * math.sqrt(max(rank, 1))) * unit
    return 0.5 * (12 * unit + 2 * products + products**2 + 2 * (long + rank + 8) * unit) * 1.01 + 8 * unit


def select(x: Tensor, factors: Factors, constants: Tensor, screen: AnyScreen, threshold: float, slots: int) -> Screened:
    """Stage 1 through the bounds; contract of the C++ `select`, with what screening did beside it. No gradients.

    Args:
        x: (N, D), any float dtype; it is brought to the dtype of the factors.
        factors: shared noise.
        constants: `factors.constants(log_weights)`, (K,).
        screen: of the same parameters.
        threshold: nats below the best logit at which a component stops being active.
        slots: S, the most active components kept per token.
    """
    if not isinstance(screen, Screen):
        x = x if x.dtype in (torch.bfloat16, torch.float16) else x.to(constants.dtype)
        return _triton().select(x.contiguous(), factors, constants, screen, threshold, slots)
    *active, dropped, evaluated = torch.ops.mfa_kernels.select_screened(
        x, factors.rows, constants, factors.scale, factors.center, screen.basis, screen.rows, screen.log_det,
        screen.radii, screen.slack, screen.lines, screen.line_terms,
        screen.batches_by_lines, *lists.flat(screen.neighbors), screen.exact_slack, threshold, slots,
    )  # fmt: skip
    return Screened(Active(*active), dropped, evaluated)


def bounds(x: Tensor, factors: Factors, constants: Tensor, screen: Screen, by_lines: bool = False) -> Tensor:
    """The upper bounds of all logits that `select` works from, (N, K); arguments as there, in one dtype.

    Args:
        by_lines: those of the first level, of which `select` goes on with what comes within its threshold.
    """
    return native.library().screen_bounds(
        x, constants, factors.scale, factors.center, screen.basis, screen.rows, screen.log_det, screen.radii,
        screen.slack, screen.lines, screen.line_terms, by_lines,
    )  # fmt: skip


torch.library.define(
    "mfa_kernels::select_screened",
    "(Tensor x, Tensor rows, Tensor constants, Tensor scale, Tensor center, Tensor basis, Tensor marginal_rows,"
    " Tensor log_det, Tensor radii, Tensor slack, Tensor lines, Tensor line_terms,"
    " bool batches_by_lines, Tensor[] neighbors, float neighbor_threshold, float exact_slack, float threshold,"
    " int slots)"
    " -> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts, Tensor dropped, Tensor evaluated)",
)


_check_select_screened = trust.checker(
    "select_screened",
    {
        "x": "any(N, D)", "rows": "scale(K, -(-D // lanes[scale_dtype]), Q, lanes[scale_dtype])",
        "constants": "scale(K)",
        "scale": "real(D)", "center": "scale(D)", "basis": "scale(D, P)",
        "marginal_rows": "scale(K, P // lanes[scale_dtype], Q, lanes[scale_dtype])", "log_det": "scale(K)",
        "radii": "scale(K)",
        "slack": "scale(K)", "lines": "scale(K * (len(lines) > 0), P)", "line_terms": "scale(2, len(lines))",
    },
    last=("rows", "constants", "marginal_rows", "x"),
)  # fmt: skip


@torch.library.impl("mfa_kernels::select_screened", "CPU")
def _select_screened(x, rows, *rest):
    if native.library() is None:
        raise RuntimeError("select_screened: the C++ kernels, which alone have it, are not built here")
    _check_select_screened(x, rows, *rest[:10])
    return native.library().select_screened(x.to(rows.dtype).contiguous(), rows, *rest)


@torch.library.register_fake("mfa_kernels::select_screened")
def _(
    x, rows, constants, scale, center, basis, marginal_rows, log_det, radii, slack, lines, line_terms,
    batches_by_lines, neighbors, neighbor_threshold, exact_slack, threshold, slots,
):  # fmt: skip
    active = Active.empty(x.shape[0], slots, rows)
    return *active, torch.empty_like(active.log_prob), torch.empty_like(active.counts)

"""Screening: `screen` prepares bounds, `choose` picks their width, `scan` computes what they leave."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp, trust
from mfa_kernels.ops.common.register import operator
from mfa_kernels.ops.scan.types import ActivePairs, activity_threshold
from mfa_kernels.ops.screen import neighbors as lists
from mfa_kernels.ops.screen.basis import basis as choose_basis
from mfa_kernels.ops.screen.cost import modelled_cost
from mfa_kernels.ops.screen.rounding import bound_slack, logit_slack, skew, stage_0_rounding
from mfa_kernels.ops.screen.types import AnyScreen, Screen, ScreenedPairs
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury

WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""The p that `choose` tries."""


_KNOWN = 1 << 25  # largest number of float64 projections that `choose` keeps from one width to the next


def serves(woodbury: Woodbury) -> bool:
    """True where kernels screen with these terms: C++ on a CPU, or Triton."""
    shared = not woodbury.per_component
    return shared and (woodbury.backend == "cpp" or (bool(woodbury.scan) and woodbury.scan[0].numel() > 0))


def _triton() -> ModuleType:
    from mfa_kernels.ops.screen import triton_screen

    return triton_screen


def default_features(features: int) -> int:
    """p where nothing was measured: an eighth of D, at least 48 and at most D, in multiples of 16."""
    return min(max(48, -(-features // 128) * 16), features // 16 * 16)


def screen(
    parameters: Parameters, woodbury: Woodbury, features: int | None = None, basis: Tensor | None = None
) -> AnyScreen:
    """Stage 0 of screening: K D p (R + 1) multiply-adds in float64, and an eigenproblem unless a basis is given.

    PyTorch's BLAS has a hand in it, so its last bits may depend on the number of threads; those of its scans do not.

    Args:
        parameters: float32 (or float64 on a CPU); noise per component is not screened.
        woodbury: of these parameters.
        features: p, a multiple of 16 and at most D; None takes `default_features`.
        basis: Q (D, p), any matrix with nearly orthonormal columns: that of a step before serves as well; None
            computes the one that suits these parameters.

    Raises:
        ValueError: noise per component, or p that is not a multiple of 16 between 16 and D.
    """
    means, loadings, noise_variance, log_weights = parameters
    if noise_variance.dim() != 1:
        raise ValueError(f"noise_variance must have shape (D,) for screening, got {tuple(noise_variance.shape)}")
    if not serves(woodbury):
        raise ValueError("woodbury must be that of the C++ kernels or of Triton for screening: no other backend has it")
    width = features if features is not None else default_features(means.shape[1])
    if basis is not None:
        if basis.dim() != 2 or basis.shape[0] != means.shape[1]:
            raise ValueError(f"basis must have shape (D, p) = ({means.shape[1]}, p), got {tuple(basis.shape)}")
        width = basis.shape[1]
    if not 16 <= width <= means.shape[1] or width % 16:
        raise ValueError(f"features must be a multiple of 16 between 16 and D = {means.shape[1]}, got {width}")
    with torch.no_grad():
        q = (choose_basis(woodbury, log_weights.exp(), width) if basis is None else basis).to(means.dtype)
        if woodbury.backend == "cpp":
            return _screen(parameters, woodbury, q)[0]
        return _triton().screen(means, loadings, noise_variance, woodbury, q)


def refresh(previous: AnyScreen, parameters: Parameters, woodbury: Woodbury) -> AnyScreen:
    """The screen of parameters that have moved, on the coordinates of another: stage 0 without an eigenproblem, for
    every training step. `modelled_cost` says whether a step should; other arguments as `screen` takes them."""
    moved = screen(parameters, woodbury, basis=previous.basis)
    if isinstance(moved, Screen) and isinstance(previous, Screen):
        moved = moved._replace(batches_by_lines=previous.batches_by_lines)
    return moved


def with_neighbors(
    screen: Screen, parameters: Parameters, woodbury: Woodbury, threshold: float | None = None
) -> Screen:
    """The same with lists of neighbors, which make the work per token hardly grow with K, for about
    K^2 p R^2 multiply-adds now.

    Args:
        screen: of these parameters.
        parameters, woodbury: as `screen` takes them.
        threshold: nats for which it is made; larger ones find it less useful. None takes that of active components.
    """
    means, _, _, log_weights = parameters
    if threshold is None:
        threshold = activity_threshold(len(means), means.dtype)
    with torch.no_grad():
        q = screen.basis
        projections = _screen(parameters, woodbury, q, keep=True)[1]
        assert projections is not None
        constants = woodbury.constants(log_weights)
        size = constants.abs() + screen.log_det.abs() + 2 * means.shape[1]
        known = screen.slack.isfinite()
        # Raised by their rounding, as `Screen::raised` in csrc/cpu/screen/screen.h does, and by the slack, which
        # covers the error of log|C_k| in float64.
        raised = constants + 2 * torch.finfo(means.dtype).eps * size + torch.where(known, screen.slack, 0)
        # A component of weight 0 is never active, so it belongs in no list.
        raised = torch.where(constants == -math.inf, constants, raised)
        sizes = woodbury.cholesky.double().square().sum((1, 2)).sqrt()
        norm = 1 + skew(q.double())
        found = lists.find(projections, sizes, raised, known, norm, means.shape[1], threshold)
    return screen._replace(neighbors=found)


def choose(x: Tensor, parameters: Parameters, woodbury: Woodbury, least: int = 16) -> AnyScreen | None:
    """The screen that costs least on some tokens; None where the dense scan costs less, as it does with noise per
    component. Counts decide, not times: the same tokens and parameters give the same choice, on as many threads.

    Args:
        x: (N, D), a few hundred tokens like those to come, in the dtype of the parameters.
        parameters, woodbury: as `screen` takes them.
        least: coordinates, where that is no more than half of the features: `neighbors.FEATURES` for lists.
    """
    step = 16 if woodbury.backend == "cpp" else 64  # features that a tile of Triton's scan reads at least
    widths = [width for width in WIDTHS if 2 * width <= parameters[0].shape[1] and width % step == 0]
    widths = [width for width in widths if width >= least] or widths
    if not serves(woodbury) or not widths:
        return None
    with torch.no_grad():
        return _choose(x, parameters, woodbury, widths)


def _choose(x: Tensor, parameters: Parameters, woodbury: Woodbury, widths: list[int]) -> AnyScreen | None:
    means, loadings, noise_variance, log_weights = parameters
    count, features, rank = loadings.shape
    constants = woodbury.constants(log_weights)
    threshold = activity_threshold(count, means.dtype)
    basis = choose_basis(woodbury, log_weights.exp(), widths[-1]).to(means.dtype)
    best, least, before = None, 1.0, math.inf  # in units of the dense scan
    known, one = None, torch.ones(1)
    for width in widths:
        sizes = count, features, rank, width
        ways = (None, 0.0) if woodbury.backend == "cpp" else (None,)
        if min(modelled_cost(one, *sizes, lines=lines) for lines in ways) >= least:
            break
        # Leading eigenvectors: the basis of one width begins that of the next, and so do the projections on it.
        keep = count * (rank + 1) * width <= _KNOWN
        if woodbury.backend == "cpp":
            candidate, known = _screen(parameters, woodbury, basis[:, :width], known, keep)
            (_, _, logits, _), _, evaluated = scan(x, woodbury, constants, candidate, threshold, 1)
            share = lines_left(x, woodbury, constants, candidate, logits[:, 0] - threshold).mean().item()
            by_lines = modelled_cost(evaluated, *sizes, lines=share)
            cost = modelled_cost(evaluated, *sizes)
            candidate = candidate._replace(batches_by_lines=by_lines < cost)
            rises, before, cost = by_lines >= before, by_lines, min(by_lines, cost)
        else:
            candidate = _triton().screen(means, loadings, noise_variance, woodbury, basis[:, :width])
            evaluated = scan(x, woodbury, constants, candidate, threshold, 1).evaluated
            rises, cost = False, modelled_cost(evaluated, *sizes)
        if cost < least:
            best, least = candidate, cost
        elif best is not None and rises:  # no longer cheaper with lines or without
            break
    return best


def lines_left(x: Tensor, woodbury: Woodbury, constants: Tensor, screen: Screen, bars: Tensor) -> Tensor:
    """Share of the components whose bound by their line reaches the bar of the token, (N,) float64.

    Args:
        x, woodbury, constants, screen: as `scan` takes them; x in the dtype of the Woodbury terms.
        bars: (N,), the best logit less the threshold.
    """
    below = bounds(x, woodbury, constants, screen, by_lines=True) < bars.unsqueeze(-1)
    return (~below).double().mean(-1)


def _screen(
    parameters: Parameters, woodbury: Woodbury, q: Tensor, known: Tensor | None = None, keep: bool = False
) -> tuple[Screen, Tensor | None]:
    """A screen, and the projections (K, R+1, p) float64 behind it if they are to be kept; `known` are those on the
    first columns of q."""
    means, loadings, noise_variance, log_weights = parameters
    features, rank = loadings.shape[1:]
    q = q.contiguous()
    wide, scale, eps = q.double(), noise_variance.double().rsqrt(), torch.finfo(means.dtype).eps
    up = 1 + 4 * eps  # rounds up through the conversion to a narrower dtype
    projection = scale.unsqueeze(-1) * wide
    weights = log_weights.double().exp()
    middle = (weights @ means.double() / weights.sum() - woodbury.center.double()) @ projection
    # One mean that is not finite would make the middle, and with it every component's line, NaN.
    middle = middle.nan_to_num(0, 0, 0)
    rows, radii, slack, lines, line_terms, projections = cpp.library().screen_marginals(
        means.contiguous(), loadings.contiguous(), woodbury.cholesky, woodbury.center, scale, projection, known, keep,
        stage_0_rounding(features, rank, q.shape[1]), bound_slack(wide, features, rank, eps / 2), 1 + skew(wide),
        middle, up,
    )  # fmt: skip
    exact = logit_slack(features, rank, eps / 2) * up
    return Screen(q, rows, radii, slack, exact, woodbury.log_det, lines, line_terms), projections


def scan(
    x: Tensor, woodbury: Woodbury, constants: Tensor, screen: AnyScreen, threshold: float, slots: int
) -> ScreenedPairs:
    """Runs stage 1 through the bounds, without gradients.

    Args:
        x: (N, D), any float dtype; it is brought to the dtype of the Woodbury terms.
        woodbury: shared noise.
        constants: `woodbury.constants(log_weights)`, (K,).
        screen: of the same parameters.
        threshold: nats below the best logit at which a component stops being active.
        slots: S, the most active components kept per token.
    """
    if not isinstance(screen, Screen):
        x = x if x.dtype in (torch.bfloat16, torch.float16) else x.to(constants.dtype)
        return _triton().scan(x.contiguous(), woodbury, constants, screen, threshold, slots)
    *active, dropped, evaluated = torch.ops.mfa_kernels.select_screened(
        x, woodbury.rows, constants, woodbury.scale, woodbury.center, screen.basis, screen.rows, screen.log_det,
        screen.radii, screen.slack, screen.lines, screen.line_terms,
        screen.batches_by_lines, *lists.flat(screen.neighbors), screen.exact_slack, threshold, slots,
    )  # fmt: skip
    return ScreenedPairs(ActivePairs(*active), dropped, evaluated)


def bounds(x: Tensor, woodbury: Woodbury, constants: Tensor, screen: Screen, by_lines: bool = False) -> Tensor:
    """The upper bounds of all logits that `scan` works from, (N, K); arguments as there, in one dtype.

    Args:
        by_lines: the bounds of the first level; `scan` continues with the components that they leave in reach.
    """
    return cpp.library().screen_bounds(
        x, constants, woodbury.scale, woodbury.center, screen.basis, screen.rows, screen.log_det, screen.radii,
        screen.slack, screen.lines, screen.line_terms, by_lines,
    )  # fmt: skip


_check = trust.checker(
    "select_screened",
    {
        "x": "any(N, D)", "rows": "scale(K, -(-D // lanes[scale_dtype]), Q, lanes[scale_dtype])",
        "constants": "scale(K)", "scale": "real(D)", "center": "scale(D)", "basis": "scale(D, P)",
        "marginal_rows": "scale(K, P // lanes[scale_dtype], Q, lanes[scale_dtype])", "log_det": "scale(K)",
        "radii": "scale(K)", "slack": "scale(K)", "lines": "scale(K * (len(lines) > 0), P)",
        "line_terms": "scale(2, len(lines))",
    },
    last=("rows", "constants", "marginal_rows", "x"),
)  # fmt: skip


def _fake_scan(given):
    active = ActivePairs.empty(given.x.shape[0], given.slots, given.rows)
    return *active, torch.empty_like(active.log_prob), torch.empty_like(active.counts)


@operator(
    "select_screened",
    "(Tensor x, Tensor rows, Tensor constants, Tensor scale, Tensor center, Tensor basis, Tensor marginal_rows,"
    " Tensor log_det, Tensor radii, Tensor slack, Tensor lines, Tensor line_terms,"
    " bool batches_by_lines, Tensor[] neighbors, float neighbor_threshold, float exact_slack, float threshold,"
    " int slots)"
    " -> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts, Tensor dropped, Tensor evaluated)",
    {},
    fake=_fake_scan,
    devices=("CPU",),
)
def _scan_screened(x, rows, *others):
    if cpp.library() is None:
        raise RuntimeError("select_screened: the C++ kernels, which alone have it, are not built here")
    _check(x, rows, *others[:10])
    return cpp.library().scan_screened(x.to(rows.dtype).contiguous(), rows, *others)

"""Screens on a GPU: the dense scan's pipeline on p << D coordinates, certified (GPU.md).

    tokens -> project -> scan of the marginals -> guess, its exact logit -> candidates -> exact logits -> finish
                                                                  \\-> candidate overflow: the dense scan of those

A token keeps the components whose upper bound reaches its guess's logit less T. Where too many are left to be told
apart, the token takes the dense scan of triton_pipeline.py; how many such tokens there are is known to the device
alone, and programs that have nothing to do leave at once. Nothing waits for the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.triton_fp16 import FEATURES, slack
from mfa_kernels.ops.common.triton_tokens import Tokens, scan_tokens
from mfa_kernels.ops.pairs.triton_pairs import explain
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.scan import triton_merge as merge
from mfa_kernels.ops.scan.triton_pipeline import CANDIDATES, finish_candidate_overflow
from mfa_kernels.ops.scan.triton_scan import Partials, scan_tiles
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.screen.triton_project import project, sum_error
from mfa_kernels.ops.screen.types import GpuScreen, ScreenedPairs
from mfa_kernels.ops.woodbury.triton_rows import scan_rows
from mfa_kernels.ops.woodbury.types import ScanRows, Woodbury

SURVIVORS = 32
"""Components per token that are computed in full; a token with more takes the dense scan."""

EPSILON = 2.0**-8
"""Share of a marginal's distance given up for the rounding of coordinates: its size matters little (GPU.md)."""

_LARGEST_ROUNDING = 2.0**-12
"""Components whose B is less accurate, relative to |b|, get no bound and are always evaluated: fp16 loses as much."""

_CHUNK = 1 << 26  # float64 values of a temporary, at most


def screen(means: Tensor, loadings: Tensor, noise_variance: Tensor, woodbury: Woodbury, basis: Tensor) -> GpuScreen:
    """Prepares a screen: K D p (R + 1) multiply-adds in float64 and a p x p eigenproblem.

    Args:
        means: (K, D) float32.
        loadings: (K, D, R).
        noise_variance: (D,).
        woodbury: of these parameters, in the portable layout.
        basis: Q, (D, p).
    """
    count, features, rank = loadings.shape
    kept, padded, double = basis.shape[1], woodbury.scan[0].shape[-1], torch.float64
    half = (basis.double() * (256 / basis.double().abs().amax())).half()
    projection = half.new_zeros(-(-kept // FEATURES) * FEATURES, padded)
    projection[:kept, :features] = half.mT
    wide = half.double()
    largest = torch.linalg.eigvalsh(wide.mT @ wide)[-1].sqrt() * (1 + 2.0**-40)
    wide = wide / largest  # now Q^T Q <= I
    shrink = math.sqrt(1 - EPSILON)
    scale, center = noise_variance.double().rsqrt(), woodbury.center.double()
    rows = means.new_empty(count, rank + 1, kept)
    off, rounding = (torch.empty(count, dtype=double, device=means.device) for _ in range(2))
    step = max(1, _CHUNK // (features * (rank + 1)))
    for begin in range(0, count, step):
        chunk = slice(begin, begin + step)
        m = (means[chunk].double() - center) * scale
        w = loadings[chunk].mT.double() * scale
        b, rounding[chunk] = _marginal(w @ wide, 1 + w.square().sum(-1), features)
        rows[chunk, 0], rows[chunk, 1:] = shrink * (m @ wide), b
        off[chunk] = m.norm(dim=-1)
    is_bounded = (rounding < _LARGEST_ROUNDING) & rows.flatten(1).isfinite().all(-1)
    rows = torch.where(is_bounded[:, None, None], rows, 0)
    off *= (features + 8) * math.sqrt(kept) * torch.finfo(double).eps  # the rounding of a mean's coordinates
    marginals = Woodbury(
        rows, woodbury.cholesky, woodbury.log_det, torch.ones_like(rows[0, 0]), torch.zeros_like(rows[0, 0]), False
    )
    marginal, worst = scan_rows(marginals), torch.where(is_bounded, rounding, 0).amax()
    # B is off by at most `worst` times |y| + |m|: E1 multiplies |y|, and E3 multiplies M2 >= |m|.
    more = torch.stack([0 * worst, worst, 0 * worst, worst, 0 * worst]).float() * (1 + 2.0**-20)
    sigma, marginal = (shrink / largest).float().view(1), marginal._replace(worst=marginal.worst + more)
    slack_of = torch.where(is_bounded, off.square() / EPSILON, torch.inf)
    return GpuScreen(basis, projection, sigma, wide.norm(), marginal, slack_of, worst)


def _marginal(v: Tensor, sizes: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """B (k, R, p) of the marginals whose loadings are v^T, float64, and their rounding relative to |b|, (k,).

    `sizes` (k, R) are 1 + the squared lengths of the loadings before they were projected (README, "Rounding").
    """
    rank, kept = v.shape[1:]
    if rank == 0:
        return v, v.new_zeros(v.shape[0])
    identity = torch.eye(rank, dtype=v.dtype, device=v.device)
    cholesky, failed = torch.linalg.cholesky_ex(v @ v.mT + identity)
    inverse = torch.linalg.solve_triangular(cholesky, identity.expand_as(cholesky), upper=False)
    tau = (sizes * inverse.square().sum(1)).sum(-1)
    rounding = 8 * features * (rank + 1) * math.sqrt(kept) * torch.finfo(v.dtype).eps * tau
    usable = (failed == 0) & rounding.isfinite()
    return torch.linalg.solve_triangular(cholesky, v, upper=False), torch.where(usable, rounding, torch.inf)


def bounds(
    tokens: Tokens, woodbury: Woodbury, constants: Tensor, screen: GpuScreen, config: configs.Scan
) -> tuple[Partials, Tensor]:
    """Upper bounds from p coordinates: the scan's partials, and their lift, (N,) float64.

    `partials.upper - lift` is above the logit, however it was rounded, and a component that a tile does not report is
    below those that it reports. Lower bounds are those of marginals, and bound no logit.

    Args:
        tokens: of x, under the scale and center of `woodbury`.
        woodbury: shared noise, with the rows of the dense scan.
        constants: (K,).
        screen: of the same parameters.
        config: of the scan.
    """
    padded, kept = tokens.tokens.shape[1], screen.projection.shape[0]
    y = project(tokens, screen.projection, screen.sigma)
    projected = scan_tokens(y, torch.ones_like(y[0]), torch.zeros_like(y[0]), kept, False)
    # Three times their rounding: `raised` is rounded to float32 too.
    raised = constants.double() + 3 * _rounding_of_constants(woodbury, constants) + screen.slack
    raised = torch.where(constants == -torch.inf, constants, raised.float())
    partials = scan_tiles(projected, screen.rows, raised, config, bounds=True)
    norm, eta = tokens.norms[0].double(), tokens.norms[1].double()
    off = eta + sum_error(padded) * screen.spread * (norm + eta)
    # The scan leaves |y|^2 / 2 out of its bounds.
    return partials, projected.length.double() * (0.5 / slack(kept)) - off.square() / EPSILON


def _rounding_of_constants(woodbury: Woodbury, constants: Tensor) -> Tensor:
    """Bounds the rounding of the constants, (K,) float64."""
    size = constants.double().abs() + woodbury.log_det.double().abs() + 2 * woodbury.center.shape[0]
    return torch.finfo(torch.float32).eps * size


def scan(
    x: Tensor, woodbury: Woodbury, constants: Tensor, screen: GpuScreen, threshold: float, slots: int
) -> ScreenedPairs:
    """Runs stage 1 through the bounds on a GPU: the contract of `mfa_kernels.ops.screen.op.scan`.

    Args:
        x: (N, D), contiguous, bfloat16, float16 or float32.
        woodbury: shared noise, float32, portable layout, with the rows of the dense scan.
        constants: `woodbury.constants(log_weights)`, (K,).
        screen: of the same parameters.
        threshold: nats below the best logit at which a component stops being active.
        slots: S, the most active components kept per token.
    """
    count, components = x.shape[0], constants.shape[0]
    log_eps = math.log(components) - threshold
    if math.isclose(log_eps, merge.LOG_EPS, rel_tol=1e-9):
        log_eps = merge.LOG_EPS  # kernels are compiled for it: once for all K
    with torch.cuda.device_of(x):
        active = ActivePairs.empty(count, slots, constants)
        dropped, evaluated = torch.zeros_like(active.log_prob), torch.full_like(active.counts, -1)
        if count == 0:
            return ScreenedPairs(active, dropped, evaluated)
        rows = ScanRows(*woodbury.scan)
        config = configs.configured(configs.Scan, x, count, components)
        tokens = scan_tokens(x, rows.scale, woodbury.center, rows.rows.shape[-1], False)
        partials, lift = bounds(tokens, woodbury, constants, screen, config)
        guess = _guess(partials)
        own, t = explain(Pairs(x, torch.arange(count, device=x.device), guess), woodbury, constants)
        assert own is not None  # constants were given
        assert t is not None
        best = own - _exact_slack(x, guess, own, t, woodbury, constants, screen)
        # The bar is in the units of the scan's bounds, and rounded down.
        bar = best + lift
        bar = (bar - 2.0**-22 * bar.abs()).float()

        partials = partials._replace(lower=bar.unsqueeze(1).expand_as(partials.lower).contiguous())
        left = torch.empty_like(bar)
        found, candidate_overflow = merge.candidates(partials, tokens.norms, components, SURVIVORS, log_eps, left)
        each = torch.arange(count * SURVIVORS, device=x.device) // SURVIVORS
        is_guess = found == guess.unsqueeze(1)
        others = Pairs(x, each, found.masked_fill(is_guess, -1).flatten())
        logits, _ = explain(others, woodbury, constants, with_t=False)
        assert logits is not None
        logits = torch.where(is_guess, own.unsqueeze(1), logits.view_as(found))
        merge.finish(found, logits.contiguous(), candidate_overflow, components, active, log_eps)

        n_kept = (found >= 0).sum(1, dtype=torch.int32)
        screened = n_kept > 0  # a token of candidate overflow, or that is not finite, keeps none
        share = (components - n_kept) * (left.double() - bar).exp() * (1 + 1e-6)
        dropped = torch.where(screened & (n_kept < components), share.float(), dropped)
        evaluated = torch.where(screened, n_kept, evaluated)
        _dense_scan(x, tokens, woodbury, constants, candidate_overflow, active, log_eps)
    return ScreenedPairs(active, dropped, evaluated)


def _guess(partials: Partials) -> Tensor:
    """The component with the largest finite bound, (N,) int32; -1 where there is none."""
    upper = partials.upper[..., 0]
    upper = torch.where(upper < torch.inf, upper, -torch.inf)
    best, tile = upper.max(1)
    guess = partials.components[..., 0].gather(1, tile.unsqueeze(1)).squeeze(1)
    return torch.where(best > -torch.inf, guess, -1)


def _exact_slack(
    x: Tensor, guess: Tensor, logits: Tensor, t: Tensor, woodbury: Woodbury, constants: Tensor, screen: GpuScreen
) -> Tensor:
    """Bounds the error of the logits (N,) of `explain`, (N,) float64; |v|^2 = 2 (constant - logit) + |t|^2.

    README.md, "Rounding", bounds |v|^2 and |t|^2: sums of D terms in lanes, then across lanes in any order.
    """
    unit, rank = torch.finfo(torch.float32).eps / 2, t.shape[1]
    block = configs.configured(configs.Pairs, x, x.shape[0], constants.shape[0]).features
    long = -(-x.shape[1] // block) + block + 8
    products = (6 + long) * math.sqrt(max(rank, 1)) * unit + screen.rounding
    share = 0.5 * (12 * unit + 2 * products + products.square() + 2 * (long + rank + 8) * unit) * 1.01 + 8 * unit
    k = guess.clamp_min(0).long()
    square = 2 * (constants[k].double() - logits) + t.double().square().sum(1)
    return share * square.abs() + 4 * _rounding_of_constants(woodbury, constants)[k] + 16 * unit * logits.abs()


def _dense_scan(
    x: Tensor,
    tokens: Tokens,
    woodbury: Woodbury,
    constants: Tensor,
    chosen: Tensor,
    out: ActivePairs,
    log_eps: float,
) -> None:
    """Writes the tokens whose `chosen` (N,) int32 is 1, by a dense scan that works on those alone."""
    components = constants.shape[0]
    config = configs.configured(configs.Scan, x, x.shape[0], components)
    index, total = merge.gather(chosen)
    norms = tokens.norms[:, index]
    in_use = torch.arange(len(index), device=x.device) < total
    norms = torch.where(in_use, norms, torch.nan)  # NaN norms give the unused rows no candidates
    some = Tokens(tokens.tokens[index], None, tokens.scales[index], norms, tokens.length[index])
    partials = scan_tiles(some, ScanRows(*woodbury.scan), constants, config, bounds=True, in_use=total)
    found, candidate_overflow = merge.candidates(partials, norms, components, CANDIDATES, log_eps)
    pairs = Pairs(x, index.repeat_interleave(CANDIDATES), found.flatten())
    logits, _ = explain(pairs, woodbury, constants, with_t=False)
    assert logits is not None
    room = ActivePairs.empty(len(index), out.components.shape[1], constants)
    merge.finish(found, logits, candidate_overflow, components, room, log_eps)
    place = (chosen.cumsum(0) - 1).clamp_min(0)  # of a token in `index`
    is_chosen = chosen == 1
    for own, new in zip(out, room):
        own.copy_(torch.where(is_chosen if own.dim() == 1 else is_chosen.unsqueeze(1), new[place], own))
    flags = torch.where(is_chosen, candidate_overflow[place], 0).int()
    finish_candidate_overflow(x, woodbury, constants, flags, out, log_eps)

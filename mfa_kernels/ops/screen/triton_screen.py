"""Screening on a GPU: the dense scan's pipeline on p << D coordinates, certified; see GPU.md in this folder.

    tokens -> project -> scan of the marginals -> guess, its exact logit -> candidates -> exact logits -> finish
                                                                  \\-> crowded tokens: the dense scan, of those alone

A token keeps the components whose upper bound reaches its guess's logit less T. Those of which too many are left to be
told apart take the dense scan of triton_pipeline.py; how many they are is known to the device alone, and programs that
have nothing to do leave at once. Nothing waits for the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.triton_fp16 import FEATURES, slack
from mfa_kernels.ops.common.triton_tokens import Tokens, scan_tokens
from mfa_kernels.ops.pairs.triton_pairs import explain
from mfa_kernels.ops.scan import triton_merge as merge
from mfa_kernels.ops.scan.triton_pipeline import CANDIDATES, crowded_tokens
from mfa_kernels.ops.scan.triton_scan import Partials, scan_tiles
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.screen.triton_project import project, sum_error
from mfa_kernels.ops.screen.types import GpuScreen, ScreenedPairs
from mfa_kernels.ops.woodbury.triton_rows import scan_rows
from mfa_kernels.ops.woodbury.types import ScanRows, Woodbury

SURVIVORS = 32
"""Components per token that are computed in full; more, and the token takes the dense scan."""

EPSILON = 2.0**-8
"""Share of a marginal's distance given up for coordinates that are off: a choice that matters little (GPU.md)."""

_KNOWN = 2.0**-12
"""Rounding of B, relative to |b|, beyond which nothing is said of a component: what fp16 costs anyway."""

_CHUNK = 1 << 26  # largest number of float64 values of a temporary


def screen(means: Tensor, loadings: Tensor, noise_variance: Tensor, woodbury: Woodbury, basis: Tensor) -> GpuScreen:
    """Stage 0 of screening: K D p (R + 1) multiply-adds in float64 and a p x p eigenproblem.

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
    known = (rounding < _KNOWN) & rows.flatten(1).isfinite().all(-1)
    rows = torch.where(known[:, None, None], rows, 0)
    off *= (features + 8) * math.sqrt(kept) * torch.finfo(double).eps  # of a mean's coordinates
    seen = Woodbury(
        rows, woodbury.cholesky, woodbury.log_det, torch.ones_like(rows[0, 0]), torch.zeros_like(rows[0, 0]), False
    )
    marginal, worst = scan_rows(seen), torch.where(known, rounding, 0).amax()
    # B is off by at most `worst` times |y| + |m|: E1 is of |y|, and E3 of |m| <= M2.
    more = torch.stack([0 * worst, worst, 0 * worst, worst, 0 * worst]).float() * (1 + 2.0**-20)
    sigma, marginal = (shrink / largest).float().view(1), marginal._replace(worst=marginal.worst + more)
    slack_of = torch.where(known, off.square() / EPSILON, torch.inf)
    return GpuScreen(basis, projection, sigma, wide.norm(), marginal, slack_of, worst)


def _marginal(v: Tensor, sizes: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """B of the marginals whose loadings are v^T, both (k, R, p) float64, and their rounding relative to |b|, (k,).

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
    """Upper bounds from p coordinates: the scan's partials, and (N,) float64 what to take from them.

    `partials.upper - lift` is above the logit, whatever rounding did, and what a tile does not report is below what it
    reports. Lower bounds are those of marginals, and say nothing.

    Args:
        tokens: of x, under the scale and center of the factors.
        woodbury: shared noise, with the rows of the dense scan.
        constants: (K,).
        screen: of the same parameters.
        config: of the scan.
    """
    padded, kept = tokens.tokens.shape[1], screen.projection.shape[0]
    y = project(tokens, screen.projection, screen.sigma)
    seen = scan_tokens(y, torch.ones_like(y[0]), torch.zeros_like(y[0]), kept, False)
    raised = constants.double() + 3 * _unsure(woodbury, constants) + screen.slack  # thrice: float32 once more
    raised = torch.where(constants == -torch.inf, constants, raised.float())
    partials = scan_tiles(seen, screen.rows, raised, config, bounds=True)
    norm, eta = tokens.norms[0].double(), tokens.norms[1].double()
    off = eta + sum_error(padded) * screen.spread * (norm + eta)
    # The scan leaves |y|^2 / 2 out.
    return partials, seen.length.double() * (0.5 / slack(kept)) - off.square() / EPSILON


def _unsure(woodbury: Woodbury, constants: Tensor) -> Tensor:
    """What the rounding of constants is at most, (K,) float64."""
    size = constants.double().abs() + woodbury.log_det.double().abs() + 2 * woodbury.center.shape[0]
    return torch.finfo(torch.float32).eps * size


def scan(
    x: Tensor, woodbury: Woodbury, constants: Tensor, screen: GpuScreen, threshold: float, slots: int
) -> ScreenedPairs:
    """Stage 1 through the bounds: the contract of `mfa_kernels.ops.screen.op.scan`, on the GPU.

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
        own, t = explain(x, torch.arange(count, device=x.device), guess, woodbury, constants)
        assert own is not None  # constants were given
        assert t is not None
        best = own - _exact_slack(x, guess, own, t, woodbury, constants, screen)
        # In the scan's units, and rounded down.
        bar = best + lift
        bar = (bar - 2.0**-22 * bar.abs()).float()

        partials = partials._replace(lower=bar.unsqueeze(1).expand_as(partials.lower).contiguous())
        left = torch.empty_like(bar)
        found, crowded = merge.candidates(partials, tokens.norms, components, SURVIVORS, log_eps, left)
        each = torch.arange(count * SURVIVORS, device=x.device) // SURVIVORS
        known = found == guess.unsqueeze(1)
        logits, _ = explain(x, each, found.masked_fill(known, -1).flatten(), woodbury, constants, with_t=False)
        assert logits is not None
        logits = torch.where(known, own.unsqueeze(1), logits.view_as(found))
        merge.finish(found, logits.contiguous(), crowded, components, active, log_eps)

        held = (found >= 0).sum(1, dtype=torch.int32)
        screened = held > 0  # neither crowded nor NaN
        share = (components - held) * (left.double() - bar).exp() * (1 + 1e-6)
        dropped = torch.where(screened & (held < components), share.float(), dropped)
        evaluated = torch.where(screened, held, evaluated)
        _dense_scan(x, tokens, woodbury, rows, constants, crowded, active, config, log_eps)
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
    """What the logits (N,) of `explain` are off by at most, (N,) float64; |v|^2 = 2 (constant - logit) + |t|^2.

    The same for |v|^2 and |t|^2 as in README.md, "Rounding": sums of D terms in lanes, then across lanes in any order.
    """
    unit, rank = torch.finfo(torch.float32).eps / 2, t.shape[1]
    block = configs.configured(configs.Pairs, x, x.shape[0], constants.shape[0]).features
    long = -(-x.shape[1] // block) + block + 8
    products = (6 + long) * math.sqrt(max(rank, 1)) * unit + screen.rounding
    share = 0.5 * (12 * unit + 2 * products + products.square() + 2 * (long + rank + 8) * unit) * 1.01 + 8 * unit
    k = guess.clamp_min(0).long()
    square = 2 * (constants[k].double() - logits) + t.double().square().sum(1)
    return share * square.abs() + 4 * _unsure(woodbury, constants)[k] + 16 * unit * logits.abs()


def _dense_scan(
    x: Tensor,
    tokens: Tokens,
    woodbury: Woodbury,
    rows: ScanRows,
    constants: Tensor,
    chosen: Tensor,
    out: ActivePairs,
    config: configs.Scan,
    log_eps: float,
) -> None:
    """Writes the tokens whose `chosen` (N,) int32 is 1, by the dense scan; as many as there are, and no more work."""
    components = constants.shape[0]
    index, total = merge.gather(chosen)
    norms = tokens.norms[:, index]
    norms = torch.where(torch.arange(len(index), device=x.device) < total, norms, torch.nan)  # nobody's candidates
    some = Tokens(tokens.tokens[index], None, tokens.scales[index], norms, tokens.length[index])
    partials = scan_tiles(some, rows, constants, config, bounds=True, in_use=total)
    found, crowded = merge.candidates(partials, norms, components, CANDIDATES, log_eps)
    logits, _ = explain(x, index.repeat_interleave(CANDIDATES), found.flatten(), woodbury, constants, with_t=False)
    assert logits is not None
    room = ActivePairs.empty(len(index), out.components.shape[1], constants)
    merge.finish(found, logits, crowded, components, room, log_eps)
    place = (chosen.cumsum(0) - 1).clamp_min(0)  # where in `index` a token is
    mine = chosen == 1
    for own, new in zip(out, room):
        own.copy_(torch.where(mine if own.dim() == 1 else mine.unsqueeze(1), new[place], own))
    crowded_tokens(x, woodbury, constants, torch.where(mine, crowded[place], 0).int(), out, log_eps)

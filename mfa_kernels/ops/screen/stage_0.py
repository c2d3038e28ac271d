"""Stage 0 of screening on a CPU: rows in int8, and what is known of them. See README.md in this folder, "The bound"."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.screen.rounding import UNIT, bound_slack, skew, stage_0_rounding
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury

BLOCK = 64
"""Bytes of a row that lie together; kScreenBlock in csrc."""

BALANCE = 0.5
"""nu is chosen for tokens at random, and those that matter are nearer: |T v| then counts for less beside the rest."""

_MOST = 127  # of int8
_UP = 1 + 1e-6  # rounds up through the conversion to float32
_USABLE = 1e-3  # rounding beyond which nothing is known of a component
_SAMPLE = 1024  # components
_SQUARINGS = 5  # of a matrix, to find its largest eigenvalue
_CHUNK = 1 << 23  # values of the loadings at a time, in float64


class Spread(NamedTuple):
    """Where the tokens of the mixture lie, as y - y' with y' their mean; all float64.

    Attributes:
        mean: y', (D,).
        inside: covariance of Q^T y, (p, p).
        outside: variance of y outside of Q, all together, ().
    """

    mean: Tensor
    inside: Tensor
    outside: Tensor


class _Whitened(NamedTuple):
    """Some components: m (k, D), W~^T (k, R, D), Q^T W~ transposed (k, R, p); float64, zeros where not finite."""

    means: Tensor
    loadings: Tensor
    inside: Tensor
    finite: Tensor


def bound_terms(
    parameters: Parameters, woodbury: Woodbury, basis: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the tensors of a `Screen`. K (R + 1) D p multiply-adds in float64.

    Args:
        parameters: of a mixture with shared noise.
        woodbury: of these parameters.
        basis: Q, (D, p) float32.
    """
    count, features, rank = parameters[1].shape
    kept, q = basis.shape[1], basis.double()
    blocks = -(-features // BLOCK) + rank * -(-kept // BLOCK)
    rows = torch.empty(count, blocks, BLOCK, dtype=torch.int8)
    starts = torch.empty(count, rank + 1, dtype=torch.int32)
    terms = torch.empty(count, 2 * rank + 13)
    constants = woodbury.constants(parameters[3])
    size = constants.abs() + woodbury.log_det.abs() + 2 * features
    raises = torch.where(constants.isfinite(), 4 * UNIT * size, 0).float() * _UP
    step = max(1, _CHUNK // (features * (rank + 1)))
    center, off = _center(parameters), skew(q)
    spread = _spread(parameters, center, q, step)
    for first in range(0, count, step):
        chunk = slice(first, first + step)
        own = _whitened(parameters, center, q, chunk)
        rows[chunk], starts[chunk], terms[chunk] = _terms(own, q, off, spread, raises[chunk])
    return center, basis, rows, starts, terms


def _center(parameters: Parameters) -> Tensor:
    """The mean of the components that are finite, (D,): the shorter y and m, the less is lost in int8."""
    means, _, _, log_weights = parameters
    weights = torch.where(means.isfinite().all(-1), log_weights.double().exp().nan_to_num(0), 0)
    center = weights @ means.double().nan_to_num(0, 0, 0) / weights.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return center.to(means.dtype)


def _whitened(parameters: Parameters, center: Tensor, q: Tensor, chunk: slice | Tensor) -> _Whitened:
    means, loadings, noise_variance, _ = parameters
    scale = noise_variance.double().rsqrt()
    m = (means[chunk].double() - center.double()) * scale
    w = loadings[chunk].double().mT * scale
    finite = m.isfinite().all(-1) & w.flatten(1).isfinite().all(-1)
    w = torch.where(finite[:, None, None], w, 0)
    return _Whitened(torch.where(finite[:, None], m, 0), w, w @ q, finite)


def _spread(parameters: Parameters, center: Tensor, q: Tensor, step: int) -> Spread:
    """Of the components that are finite, `_SAMPLE` at most: it says where bounds are to be tight, not what they are."""
    (features, kept), count = q.shape, len(parameters[0])
    sample = torch.arange(count) if count <= _SAMPLE else torch.arange(_SAMPLE) * count // _SAMPLE
    mass, total = q.new_zeros(()), q.new_zeros(())
    mean, inside = q.new_zeros(features), q.new_zeros(kept, kept)
    for chunk in sample.split(step):
        own = _whitened(parameters, center, q, chunk)
        weights = parameters[3][chunk].double().exp().nan_to_num(0) * own.finite
        means = own.means @ q
        mass += weights.sum()
        mean += weights @ own.means
        rows = torch.cat([means.unsqueeze(1), own.inside], 1) * weights.sqrt()[:, None, None]
        inside += rows.flatten(0, 1).mT @ rows.flatten(0, 1)
        total += weights @ (own.means.square().sum(-1) + own.loadings.square().sum((1, 2)))
    mass = mass.clamp_min(torch.finfo(torch.float64).tiny)
    mean, projected = mean / mass, mean @ q / mass
    inside = inside / mass - projected.outer(projected) + torch.eye(kept, dtype=q.dtype)
    return Spread(mean, inside, total / mass - mean.square().sum() + features - inside.trace())


def _terms(own: _Whitened, q: Tensor, off: float, spread: Spread, raises: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    features, kept = q.shape
    rank = own.loadings.shape[1]
    inside = own.means @ q  # Q^T m
    b, covered, usable, rounding = _marginal(own, kept)
    # What the rows leave outside of Q, and what an inexact Q and rounding may add to it.
    identity = torch.eye(rank, dtype=q.dtype)
    rest = covered - b @ b.mT + (2 * off + rounding)[:, None, None] * identity
    nu = _nu(rest, b, own.means - spread.mean, inside - spread.mean @ q, spread)
    factor, failed = torch.linalg.cholesky_ex(identity - rest / nu[:, None, None])
    usable &= failed == 0
    factor = torch.where(usable[:, None, None], factor, identity)
    t = torch.where(usable[:, None, None], _inverse(factor) @ b, 0)
    nu = torch.where(usable, nu, 0)
    squares, squares_inside = own.means.square().sum(-1), inside.square().sum(-1)
    w = own.means - nu.unsqueeze(-1) * (own.means - inside @ q.mT)
    w8, w_quantum, w_lost = _quantised(w)
    t8, t_quanta, t_lost = _quantised(t)
    offsets = (t @ inside.unsqueeze(-1)).squeeze(-1)
    t_norm = _norm(t)
    slack = bound_slack(features, kept, rank, off, nu, t_norm.square()) + 4 * rounding * (1 + nu + t_norm.square())
    known = usable & own.finite
    share = b.square().sum((1, 2)) / t.square().sum((1, 2)).clamp_min(torch.finfo(q.dtype).tiny)
    columns = (
        w_quantum, squares_inside + (1 - nu) * (squares - squares_inside), 1 - nu,
        w.norm(dim=-1) * _UP, w_lost.norm(dim=-1) * _UP, t_norm * _UP, _norm(t_lost) * _UP,
        2 * UNIT * offsets.norm(dim=-1), squares.sqrt() * _UP, torch.where(known, slack * _UP, torch.inf),
        raises, squares / 2, share,
    )  # fmt: skip
    terms = torch.cat([t_quanta, offsets, torch.stack([c.double() for c in columns], -1)], -1).float()
    sums = torch.cat([w8.sum(-1, dtype=torch.int32).unsqueeze(-1), t8.sum(-1, dtype=torch.int32)], -1)
    rows = torch.cat([_blocks(w8), _blocks(t8).transpose(1, 2).flatten(1, 2)], 1)
    return rows, -cpp.library().int8_offset * sums, terms


def _marginal(own: _Whitened, kept: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B = L^-1 (Q^T W~)^T (k, R, p) with L L^T = I + W~^T W~; A A^T = I - (L L^T)^-1; where they are known; and what
    rounding can do to them, (k,)."""
    features, rank = own.means.shape[1], own.loadings.shape[1]
    identity = torch.eye(rank, dtype=own.means.dtype).expand(len(own.means), rank, rank)
    gram = own.loadings @ own.loadings.mT
    cholesky, failed = torch.linalg.cholesky_ex(gram + identity)
    usable = (failed == 0) & cholesky.flatten(1).isfinite().all(-1)
    cholesky = torch.where(usable[:, None, None], cholesky, identity)
    inverse = _inverse(cholesky)
    # tau (README.md, "Rounding"): what rounding is multiplied by when loadings are nearly collinear.
    sizes = 1 + gram.diagonal(dim1=-2, dim2=-1)
    tau = (sizes * inverse.square().sum(1)).sum(-1)
    rounding = stage_0_rounding(features, rank, kept) * tau
    usable &= rounding < _USABLE
    b = torch.where(usable[:, None, None], inverse @ own.inside, 0)
    return b, identity - inverse @ inverse.mT, usable, torch.where(usable, rounding, 0)


def _nu(rest: Tensor, b: Tensor, means: Tensor, inside: Tensor, spread: Spread) -> Tensor:
    """The nu that makes bounds of tokens at random about as high as they can be, larger than |rest|_2."""
    largest = _largest_eigenvalue(rest)
    explained = (b @ inside.unsqueeze(-1)).square().sum((1, 2)) + ((b @ spread.inside) * b).sum((1, 2))
    outside = means.square().sum(-1) - inside.square().sum(-1) + spread.outside
    ratio = explained / outside.clamp_min(1e-3)  # none where Q has all coordinates
    return (largest + BALANCE * (largest * ratio).sqrt()).maximum(largest * 1.01) + 1e-9


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (..., D) in int8, their quanta (...) as float32 holds them, and what is lost (..., D); float64."""
    quanta = (rows.abs().amax(-1) / _MOST).float().double()
    quanta = torch.where(quanta > 1e-30, quanta, 0)
    near = (rows / quanta.unsqueeze(-1)).nan_to_num(0, 0, 0).round().clamp(-_MOST, _MOST)
    return near.to(torch.int8), quanta, rows - near * quanta.unsqueeze(-1)


def _norm(rows: Tensor) -> Tensor:
    """|rows|_2 (k,) of (k, R, p), at least."""
    products = rows @ rows.mT
    off = 1e-12 * products.diagonal(dim1=-2, dim2=-1).sum(-1)  # the rounding of the products
    return (_largest_eigenvalue(products) + off).sqrt()


def _largest_eigenvalue(products: Tensor) -> Tensor:
    """At least that of symmetric matrices (k, R, R), none of whose eigenvalues are far below 0; at most R^(1/64) times
    as much: by powers of the matrix.

    PyTorch finds eigenvalues of one matrix after another, and meets its threads at each. That takes seconds where
    another process has a core.
    """
    size = products.flatten(1).norm(dim=-1)
    power = products / torch.where(size > 0, size, 1)[:, None, None]
    for _ in range(_SQUARINGS):
        power = power @ power
    return size * power.flatten(1).norm(dim=-1) ** (0.5**_SQUARINGS) * (1 + 1e-9)


def _inverse(lower: Tensor) -> Tensor:
    """Of lower triangular matrices (k, R, R), row by row of all at once, for the same reason."""
    rank = lower.shape[-1]
    inverse = torch.eye(rank, dtype=lower.dtype).repeat(len(lower), 1, 1)
    for row in range(rank):
        if row:
            inverse[:, row] -= (lower[:, row, None, :row] @ inverse[:, :row]).squeeze(1)
        inverse[:, row] /= lower[:, row, row, None]
    return inverse


def _blocks(rows: Tensor) -> Tensor:
    """(..., D) -> (..., D/64, 64), with zeros at the end."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))

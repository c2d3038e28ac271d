"""Gradients of the tokens that overflow, which have more active pairs than slots: with all components, by GEMMs.

Symbols   y = (x - c) lam and m_k = (mu_k - c) lam for a centre c among the tokens, t = A_k (y - m_k), weights w (n, K).
          With noise per component lam_k cannot leave the sum over k: then y = x - c, m_k = mu_k - c, A_k is A_k lam_k.
Never materialised: n x K x R or K x R x D. A block of components stays in cache from its projections t to its finished
          gradients; the gradients are added in place.
Exact     no pair is left out. y - m_k is expanded under the sums, which cancels only where a token lies much nearer to
          its component than both lie to c: such tokens go pair by pair, from the differences.
Floor     4 n K (R + 1) D flops, 6 with the gradient of x. Derivation: README.md. Measured by bench/bench_step.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision
from mfa_kernels.ops.common.products import product
from mfa_kernels.ops.pairs.op import accumulate_gradients
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.woodbury.portable import CHUNK
from mfa_kernels.ops.woodbury.types import Woodbury, unpack_rows

BLOCK = 1 << 20
"""Largest number of values of a block's temporaries on a CPU, where they should stay in cache; CHUNK elsewhere."""

DENSITY, OVERHEAD = 0.3, 90
"""GEMMs for n tokens are taken to cost as much as K (DENSITY n + OVERHEAD) pairs: fitted by eye to timings on one
machine. Where it is off, the choice costs time and changes no result."""

CANCELLATION = 2.0
"""Largest (|y|^2 + |m|^2) / |y - m|^2 of a token and its heaviest component: the factor on the rounding errors."""


def backward(x: Tensor, tokens: Tensor, weight: Tensor, woodbury: Woodbury, gradients: list[Tensor | None]) -> None:
    """Adds the gradients of the tokens x[tokens] with every component, each token by GEMM or by pairs.

    Args:
        x: (N, D), contiguous.
        tokens: (n,) int64, ascending and unique.
        weight: (n, K), the upstream gradient of every logit.
        woodbury: in any layout.
        gradients: [x (N, D), means (K, D), loadings (K, D, R), noise (D,) or (K, D), log_weights (K,)], contiguous;
            None is not computed.
    """
    *gradients, grad_log_weights = gradients
    if grad_log_weights is not None:
        grad_log_weights += weight.sum(0)
    components = weight.shape[1]
    counts = weight.count_nonzero(-1)
    whole = (counts > DENSITY * components).nonzero().squeeze(-1)
    own = x[tokens[whole]].to(woodbury.scale.dtype)
    center = own.mean(0)
    kept = _well_centered(own, weight[whole], woodbury, center)
    whole, own = whole[kept], own[kept]
    if counts[whole].sum() <= components * (DENSITY * whole.numel() + OVERHEAD):
        whole, own = whole[:0], own[:0]
    rest, columns = weight.index_fill(0, whole, 0).nonzero(as_tuple=True)
    pairs = Pairs(x, tokens[rest], columns.int())
    accumulate_gradients(pairs, weight[rest, columns].contiguous(), woodbury, [*gradients, None])
    if whole.numel():
        grad_x, *parameters = gradients
        moved = None if grad_x is None else torch.zeros_like(own)
        with full_precision(x):
            accumulate(own, weight[whole], woodbury, center, [moved, *parameters])
        if grad_x is not None and moved is not None:
            grad_x.index_add_(0, tokens[whole], moved)


def _rows(woodbury: Woodbury, components: Tensor | slice, begin: int, end: int) -> Tensor:
    """Rows begin, ..., end - 1 of these components, (k, end - begin, D), in the portable layout."""
    axis = woodbury.rows.dim() - 2
    return unpack_rows(woodbury.rows.narrow(axis, begin, end - begin)[components], woodbury.scale.shape[0])


def _well_centered(x: Tensor, weight: Tensor, woodbury: Woodbury, center: Tensor) -> Tensor:
    """True where expanding y - m keeps the digits, (n,), judged at the component with the largest weight.

    The components that share a token's responsibility are about equally far from it, so one of them tells.
    """
    heaviest, rank = weight.abs().argmax(-1), woodbury.cholesky.shape[-1]
    scale = _rows(woodbury, heaviest, rank + 1, rank + 2).squeeze(1) if woodbury.per_component else woodbury.scale
    y, m = (x - center) * scale, (_rows(woodbury, heaviest, 0, 1).squeeze(1) - center) * scale
    return y.square().sum(-1) + m.square().sum(-1) <= CANCELLATION * (y - m).square().sum(-1)


def accumulate(x: Tensor, weight: Tensor, woodbury: Woodbury, center: Tensor, gradients: list[Tensor | None]) -> None:
    """Adds sum_nk w_nk d logit_nk to [x, means, loadings, noise], those that are not None, by GEMMs.

    Args:
        x: (n, D), in the dtype of the Woodbury terms.
        weight: (n, K).
        woodbury: in any layout.
        center: c (D,), near the tokens.
        gradients: (n, D), (K, D), (K, D, R), (D,) or (K, D); contiguous.
    """
    grad_x, grad_means, grad_loadings, grad_noise = gradients
    if all(g is None for g in gradients):
        return
    scale = woodbury.scale  # 1 with noise per component
    rank = woodbury.cholesky.shape[-1]
    y = (x - center) * scale
    features_first = y.t().contiguous()  # [D, n]
    squares = y.square().double()
    # For x: sum_k w lam_k^2 and sum_k w (lam_k^2 m + A^T t).
    mass = torch.zeros_like(y) if woodbury.per_component else weight.sum(1, keepdim=True)
    pull = torch.zeros_like(y)
    bound = BLOCK if x.device.type == "cpu" else CHUNK
    step = max(1, bound // ((rank + 1) * max(x.shape)))
    # Fresh memory costs more than the arithmetic on it: what blocks need they share, and the rest is done in place.
    buffers = [x.new_empty(min(step, weight.shape[1]), rank, x.shape[1]) for _ in range(2)]
    for begin in range(0, weight.shape[1], step):
        k = slice(begin, begin + step)
        m = (_rows(woodbury, k, 0, 1).squeeze(1) - center) * scale
        a, change = (buffer[: m.shape[0]] for buffer in buffers)
        a.copy_(_rows(woodbury, k, 1, rank + 1))
        precision = torch.ones_like(m)  # lam_k^2
        if woodbury.per_component:
            own_scale = _rows(woodbury, k, rank + 1, rank + 2)
            precision = own_scale.squeeze(1).square()
            a *= own_scale
        w = weight[:, k].t().contiguous()  # [k, n]
        s = w.sum(-1, keepdim=True)
        first = product(w, features_first) - s * m  # [k, D] sum w (y - m)
        explained = first.unsqueeze(1) @ a.mT  # [k, 1, R] sum w t; a row against a matrix is the fast way round
        if grad_means is not None:
            grad_means[k].addcmul_(precision * first - (explained @ a).squeeze(1), scale)
        if grad_x is None and grad_loadings is None and grad_noise is None:
            continue
        wt = product(a.flatten(0, 1), y).view(a.shape[0], rank, x.shape[0])  # [k, R, n] w t
        wt.sub_((m.unsqueeze(1) @ a.mT).mT).mul_(w.unsqueeze(1))
        if grad_x is not None:
            if woodbury.per_component:
                mass.addmm_(w.t(), precision)
            pull.addmm_(w.t(), precision * m).addmm_(wt.flatten(0, 1).t(), a.flatten(0, 1))
        if grad_loadings is None and grad_noise is None:
            continue
        cross = product(wt.flatten(0, 1), features_first).view_as(a)
        cross.addcmul_(explained.mT, m.unsqueeze(1), value=-1)  # [k, R, D] sum w t (y - m)
        moment = cross @ a.mT  # [k, R, R] sum w t t
        if woodbury.per_component:
            cross *= precision.unsqueeze(1)
        moment.diagonal(dim1=-2, dim2=-1).add_(s)
        torch.baddbmm(cross, moment, a, alpha=-1, out=change)  # sum w t q - s A
        if grad_noise is not None:
            # sum w q^2 = sum w (y - m)^2 - A sum w t (y - m) - A sum w t q
            # (the first sum in float64: little is left of it, and products differ in the order in which they sum)
            if woodbury.per_component:
                square = (w.double() @ squares).to(w.dtype).sub_(m * (2 * first + s * m)).mul_(precision.square())
                square.sub_(s * precision).sub_(cross.add_(change).mul_(a).sum(1))
                grad_noise[k] += square.mul_(0.5 * scale.square())
            else:  # of all components together, sum w y^2 takes no product
                square = w.sum(0, dtype=torch.float64) @ squares - (m * (2 * first + s * m)).sum(0, dtype=torch.float64)
                square.sub_(s.sum(dtype=torch.float64)).sub_(cross.add_(change).mul_(a).sum((0, 1)))
                grad_noise += square.mul_(0.5 * scale.double().square())
        if grad_loadings is not None:
            torch.bmm(_inverse(woodbury.cholesky[k]).mT, change, out=cross)
            grad_loadings[k].addcmul_(cross.mT, scale.unsqueeze(-1))
    if grad_x is not None:
        grad_x.addcmul_(pull - y * mass, scale)


def _inverse(cholesky: Tensor) -> Tensor:
    identity = torch.eye(cholesky.shape[-1], dtype=cholesky.dtype, device=cholesky.device)
    return torch.linalg.solve_triangular(cholesky, identity.expand_as(cholesky), upper=False)

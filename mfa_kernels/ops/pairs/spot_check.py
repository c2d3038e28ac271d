"""How far latents, gradients and decoded tokens are from float64: what `mfa_kernels.ops.common.first_use` asks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mfa_kernels.ops.common.first_use import spread, worst
from mfa_kernels.ops.pairs import portable
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.woodbury.portable import explained, residuals
from mfa_kernels.ops.woodbury.types import Woodbury

_ALLOWED = 256 * 2.0**-23  # of the sum of the norms of what is added up
_PAIRS = 2048  # of the component that is computed again, where there is one with no more


def some_components(woodbury: Woodbury, components: Tensor) -> Woodbury:
    """The terms of a few components, in float64."""
    rows, cholesky = woodbury.rows[components].double(), woodbury.cholesky[components].double()
    return Woodbury.without_log_det(
        rows, cholesky, woodbury.scale.double(), woodbury.center.double(), woodbury.per_component
    )


def busiest(components: Tensor, counted: Tensor, count: int) -> tuple[int, Tensor]:
    """A component with many pairs, but not more than can be checked at once, and their numbers; of pairs (P,) that are
    `counted`."""
    held = (counted & (components >= 0) & (components < count)).nonzero().squeeze(-1)
    owned = components[held].long().bincount(minlength=count)
    few = torch.where(owned <= _PAIRS, owned, 0)
    k = int(few.argmax() if int(few.max()) else owned.where(owned > 0, owned.max()).argmin())
    return k, held[components[held] == k]


def of_latents(found: Tensor, pairs: Pairs, woodbury: Woodbury) -> float | None:
    """The largest error of latents (P, R) over what is allowed, on some of the pairs."""
    held = ((pairs.components >= 0) & (pairs.components < len(woodbury.rows))).nonzero().squeeze(-1)
    held = held[spread(len(held), held.device)]
    if not len(held):
        return None
    x, own = pairs.x[pairs.tokens[held]].double(), torch.arange(len(held), device=held.device)
    terms = some_components(woodbury, pairs.components[held].long())
    expected = portable.latents(x, own, own, terms)
    allowed = _ALLOWED * (1 + residuals(x, own, terms).norm(dim=-1, keepdim=True))
    finite = x.isfinite().all(1)
    return worst(found[held][finite], expected[finite], allowed[finite]) if finite.any() else None


def of_gradients(
    pairs: Pairs, weights: Tensor, woodbury: Woodbury, gradients: Sequence[Tensor | None],
    before: Sequence[Tensor | None],
) -> float | None:  # fmt: skip
    """The largest error of gradients [x, means, loadings, noise, log_weights] over what is allowed: of the parameters
    of one component, and of a few tokens; `before` is what they were added to."""
    added = [
        g if g is None or old is None else g.double() - old.double() for g, old in zip(gradients, before, strict=True)
    ]
    counted = (weights != 0) & (pairs.components >= 0) & (pairs.components < len(woodbury.rows))
    if not counted.any() or not weights.isfinite().all():
        return None
    errors = [_of_one_component(pairs, weights, woodbury, added, counted)]
    if added[0] is not None:
        errors.append(_of_some_tokens(pairs, weights, woodbury, added[0], counted))
    return max(errors, key=_nan_is_largest)


def _of_one_component(
    pairs: Pairs, weights: Tensor, woodbury: Woodbury, added: Sequence[Tensor | None], counted: Tensor
) -> float:
    x, tokens, components = pairs
    k, own = busiest(components, counted, len(woodbury.rows))
    _, means, loadings, noise, log_weights = added
    wanted = [None, means, loadings, noise if woodbury.per_component else None, log_weights]
    terms, zero = some_components(woodbury, torch.full_like(own[:1], k)), torch.zeros_like(own)
    part = Pairs(x[tokens[own]].double(), torch.arange(len(own), device=own.device), zero)
    expected = [None if g is None else torch.zeros_like(g[k : k + 1], dtype=torch.float64) for g in wanted]
    portable.backward(part, weights[own].double(), terms, expected)
    lam, size = _largest_scale(terms), _size(part, weights[own], terms)
    farthest = 1 + float(residuals(part.x, zero, terms).norm(dim=-1).max())
    # Of means and loadings lam q and lam q z^T, of noise lam^2 q^2 / 2, of log weights 1.
    sizes = 0.0, lam * size, lam * size, lam**2 * size * farthest, float(weights[own].abs().double().sum())
    errors = [
        float((g[k].double() - exact[0]).norm()) / (_ALLOWED * (largest + 1e-30))
        for g, exact, largest in zip(wanted, expected, sizes)
        if g is not None and exact is not None
    ]
    return max(errors, default=0.0, key=_nan_is_largest)


def _of_some_tokens(pairs: Pairs, weights: Tensor, woodbury: Woodbury, added: Tensor, counted: Tensor) -> float:
    x, tokens, components = pairs
    held = counted.nonzero().squeeze(-1)
    chosen = tokens[held][spread(len(held), held.device, 4)].unique()
    own = held[torch.isin(tokens[held], chosen)]
    terms = some_components(woodbury, components[own].long())
    part = Pairs(x[chosen].double(), torch.searchsorted(chosen, tokens[own]), torch.arange(len(own), device=own.device))
    expected = torch.zeros_like(part.x)
    portable.backward(part, weights[own].double(), terms, [expected, None, None, None, None])
    allowed = _ALLOWED * (_largest_scale(terms) * _size(part, weights[own], terms) + 1e-30)
    return float((added[chosen].double() - expected).norm()) / allowed


def _nan_is_largest(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _largest_scale(terms: Woodbury) -> float:
    return float((terms.rows[:, -1] if terms.per_component else terms.scale).abs().max())


def _size(pairs: Pairs, weights: Tensor, terms: Woodbury) -> float:
    """sum_p |w_p| |v_p| (1 + |t_p|): no gradient of a pair is longer, in units of the scale."""
    v = residuals(pairs.x[pairs.tokens], pairs.components, terms)
    t = explained(v, pairs.components, terms)
    return float((weights.abs().double() * (1 + v.norm(dim=-1)) * (1 + t.norm(dim=-1))).sum())


def of_decoded(
    found: Tensor, components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor
) -> float | None:
    """The largest error of decoded tokens (N, D) over what is allowed, on some of them."""
    few = spread(len(components), components.device)
    if not len(few):
        return None
    index, own, mu, w, size = _few(few, components, responsibilities, latents, means, loadings)
    expected = portable.decode(index, own, latents[few].double(), mu, w)
    return worst(found[few], expected, _ALLOWED * (1e-30 + size.sum(1)).unsqueeze(1))


def of_decoded_gradients(
    found: Sequence[Tensor], grad: Tensor, components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor,
    loadings: Tensor,
) -> float | None:  # fmt: skip
    """The largest error of the gradients of responsibilities and latents over what is allowed, on some tokens."""
    few = spread(len(components), components.device)
    if not len(few):
        return None
    index, own, mu, w, size = _few(few, components, responsibilities, latents, means, loadings)
    g = grad[few].double()
    expected = portable.decode_backward(g, index, own, latents[few].double(), mu, w)
    length = g.norm(dim=-1, keepdim=True)
    unit = size / own.abs().clamp_min(1e-30)
    reach = 1e-30 + length * unit.nan_to_num(0)
    widest = float(w.flatten(1).norm(dim=-1).max()) if w.numel() else 0.0
    allowed = (length * own.abs().amax(1, keepdim=True) * widest + 1e-30).unsqueeze(-1)
    return max(
        worst(found[0][few], expected[0], _ALLOWED * reach),
        worst(found[1][few], expected[1], _ALLOWED * allowed.expand_as(expected[1])),
    )


def _few(
    few: Tensor, components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor
) -> tuple[Tensor, ...]:
    """The slots of some tokens with components of their own in float64, and the length of what each slot adds."""
    chosen = components[few]
    held = (chosen >= 0) & (chosen < len(means))
    k = torch.where(held, chosen, 0).long()
    numbers = torch.arange(k.numel(), device=k.device).view_as(k)
    mu, w, r = means[k].double(), loadings[k].double(), responsibilities[few].double()
    along = torch.einsum("ncdr,ncr->ncd", w, latents[few].double())
    size = torch.where(held, r.abs() * (mu.norm(dim=-1) + along.norm(dim=-1)), 0)
    return torch.where(held, numbers, -1), r, mu.flatten(0, 1), w.flatten(0, 1), size

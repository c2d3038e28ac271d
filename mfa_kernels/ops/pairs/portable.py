"""Stage 2 in plain PyTorch: the closed forms of csrc/cpu/pairs.h, on chunks of pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.woodbury.portable import CHUNK, explained, residuals
from mfa_kernels.ops.woodbury.types import Woodbury


def latents(x: Tensor, tokens: Tensor, components: Tensor, woodbury: Woodbury) -> Tensor:
    """E[z | x_n, k] for pairs, (P, R)."""
    step = max(1, CHUNK // woodbury.rows[0].numel())
    out = [x.new_empty(0, woodbury.cholesky.shape[-1])]
    for n, k in zip(tokens.split(step), components.split(step)):
        t = explained(residuals(x[n], k, woodbury), k, woodbury).unsqueeze(-1)
        out.append(torch.linalg.solve_triangular(woodbury.cholesky[k].mT, t, upper=True).squeeze(-1))
    return torch.cat(out)


def latents_backward(
    grad: Tensor,
    latents: Tensor,
    pairs: Pairs,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    cholesky: Tensor,
    needs: Sequence[bool] = (True,) * 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `latents` to x, means, loadings and noise, of size 0 where not needed: grad and latents (P, R),
    pairs in chunks.

    With u = x - mu, h = M^-1 grad and Lam = Psi^-1:  d x = -d mu = Lam W h,  d W = Lam (u - W z) h^T - Lam W h z^T,
    d Psi = -Lam^2 (W h) (u - W z).
    """
    x, tokens, components = pairs
    grads = [
        means.new_zeros(t.shape if needed else 0) for t, needed in zip((x, means, loadings, noise_variance), needs)
    ]
    grad_x, grad_means, grad_loadings, grad_noise = grads
    held = (components != -1).nonzero().squeeze(-1)
    for pair in held.split(max(1, CHUNK // max(1, loadings[0].numel()))):
        n, k, z = tokens[pair], components[pair].long(), latents[pair]
        w, precision = loadings[k], noise_variance.expand_as(means)[k].reciprocal()
        h = torch.cholesky_solve(grad[pair].unsqueeze(-1), cholesky[k]).squeeze(-1)
        wh = torch.einsum("pdr,pr->pd", w, h)
        left = x[n].to(means.dtype) - means[k] - torch.einsum("pdr,pr->pd", w, z)  # u - W z
        pull = precision * wh
        # index_put_ sorts where it would otherwise add in any order: index_add_ on a GPU is not deterministic.
        if needs[0]:
            grad_x.index_put_((n,), pull, accumulate=True)
        if needs[1]:
            grad_means.index_put_((k,), -pull, accumulate=True)
        if needs[2]:
            change = (precision * left).unsqueeze(-1) * h.unsqueeze(1) - pull.unsqueeze(-1) * z.unsqueeze(1)
            grad_loadings.index_put_((k,), change, accumulate=True)
        if needs[3]:
            change = -precision * pull * left
            if noise_variance.dim() == 2:
                grad_noise.index_put_((k,), change, accumulate=True)
            else:
                grad_noise += change.sum(0)
    return grad_x.to(x.dtype), grad_means, grad_loadings, grad_noise


def decode(components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor) -> Tensor:
    """sum_c r_c (mu_c + W_c z_c), (N, D), one slot at a time."""
    out = means.new_zeros(components.shape[0], means.shape[1])
    for slot in range(components.shape[1]):
        index = components[:, slot].long()
        held = (index >= 0).nonzero().squeeze(-1)
        for token in held.split(max(1, CHUNK // max(1, loadings[0].numel()))):
            k = index[token]
            point = means[k] + torch.einsum("pdr,pr->pd", loadings[k], latents[token, slot])
            out[token] += responsibilities[token, slot].unsqueeze(-1) * point
    return out.masked_fill(responsibilities.isnan().any(-1, keepdim=True), torch.nan)


def decode_backward(
    grad: Tensor, components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor,
    needs: Sequence[bool] = (True, True),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `decode` to responsibilities and latents and, of size 0 where not needed, to means and loadings:
    grad (N, D), pairs in chunks."""
    grad_r, grad_z = torch.zeros_like(responsibilities), torch.zeros_like(latents)
    grad_means, grad_loadings = (t.new_zeros(t.shape if n else 0) for t, n in zip((means, loadings), needs))
    tokens, columns = (components >= 0).nonzero(as_tuple=True)
    step = max(1, CHUNK // max(1, means.shape[1] * (1 + loadings.shape[2])))
    for n, c in zip(tokens.split(step), columns.split(step)):
        k, g, r, z = components[n, c].long(), grad[n], responsibilities[n, c].unsqueeze(-1), latents[n, c]
        back = torch.einsum("pdr,pd->pr", loadings[k], g)
        grad_r[n, c] = (g * means[k]).sum(-1) + (back * z).sum(-1)
        grad_z[n, c] = r * back
        if needs[0]:
            grad_means.index_add_(0, k, r * g)
        if needs[1]:
            grad_loadings.index_add_(0, k, (r * g).unsqueeze(-1) * z.unsqueeze(1))
    return grad_r, grad_z, grad_means, grad_loadings


def backward(pairs: Pairs, weights: Tensor, woodbury: Woodbury, gradients: list[Tensor | None]) -> None:
    """Adds sum_p w_p d logit_p to [x, means, loadings, noise, log_weights], those that are not None."""
    grad_x, grad_means, grad_loadings, grad_noise, grad_log_weights = gradients
    x, tokens, components = pairs
    features, rank = x.shape[1], woodbury.cholesky.shape[-1]
    order = torch.argsort(components, stable=True)
    for chunk in order.split(max(1, CHUNK // (features * (rank + 1)))):
        k, n, w = components[chunk], tokens[chunk], weights[chunk]
        a = woodbury.rows[k, 1 : rank + 1]
        scale = woodbury.rows[k, -1] if woodbury.per_component else woodbury.scale
        v = residuals(x[n], k, woodbury)
        t = explained(v, k, woodbury)
        q = v - torch.einsum("prd,pr->pd", a, t)
        weighted = w.unsqueeze(-1) * scale * q
        if grad_log_weights is not None:
            grad_log_weights.index_add_(0, k, w)
        if grad_means is not None:
            grad_means.index_add_(0, k, weighted)
        if grad_x is not None:
            grad_x.index_add_(0, n, -weighted)
        if grad_loadings is not None:
            chol = woodbury.cholesky[k]
            z = torch.linalg.solve_triangular(chol.mT, t.unsqueeze(-1), upper=True).squeeze(-1)
            prior = torch.linalg.solve_triangular(chol.mT, a, upper=True)  # (A^T L^-1)^T
            change = q.unsqueeze(-1) * z.unsqueeze(1) - prior.mT
            scaled = scale.unsqueeze(-1) if woodbury.per_component else scale.unsqueeze(-1).unsqueeze(0)
            grad_loadings.index_add_(0, k, w[:, None, None] * scaled * change)
        if grad_noise is not None:
            change = 0.5 * w.unsqueeze(-1) * scale.square() * (q.square() - 1 + a.square().sum(1))
            if woodbury.per_component:
                grad_noise.index_add_(0, k, change)
            else:
                grad_noise += change.sum(0)

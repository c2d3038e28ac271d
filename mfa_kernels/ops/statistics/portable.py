"""EM's sufficient statistics in plain PyTorch: pairs sorted by component, in chunks, summed in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mfa_kernels.ops.statistics.types import Sums
from mfa_kernels.ops.woodbury.portable import CHUNK, explained, residuals
from mfa_kernels.ops.woodbury.types import Woodbury


def accumulate(x: Tensor, components: Tensor, weights: Tensor, woodbury: Woodbury, out: Sums) -> None:
    """Adds the sums over the pairs in the slots of components (N, S) to `out`."""
    features, rank = x.shape[1], woodbury.cholesky.shape[-1]
    tokens, columns = ((components >= 0) & (weights != 0)).nonzero(as_tuple=True)
    order = components[tokens, columns].argsort(stable=True)
    tokens, columns = tokens[order], columns[order]
    for n, c in zip(*(t.split(max(1, CHUNK // (features * (rank + 2)))) for t in (tokens, columns))):
        k = components[n, c].long()
        w = weights[n, c].double().unsqueeze(-1)
        v = residuals(x[n], k, woodbury)
        t = explained(v, k, woodbury).unsqueeze(-1)
        z = torch.linalg.solve_triangular(woodbury.cholesky[k].mT, t, upper=True).squeeze(-1).double()
        y = (v / (woodbury.rows[k, -1] if woodbury.per_component else woodbury.scale)).double()
        owners, counts = k.unique_consecutive(return_counts=True)
        posterior = torch.cholesky_inverse(woodbury.cholesky[owners].double()).repeat_interleave(counts, 0)  # M^-1
        firsts = counts.cumsum(0) - counts
        _add(out.mass, w, owners, firsts)
        _add(out.shift, w * y, owners, firsts)
        _add(out.latent, w * z, owners, firsts)
        _add(out.second, w.unsqueeze(-1) * (z.unsqueeze(-1) * z.unsqueeze(1) + posterior), owners, firsts)
        _add(out.cross, (w * z).unsqueeze(-1) * y.unsqueeze(1), owners, firsts)
        if woodbury.per_component:
            _add(out.squares, w * y.square(), owners, firsts)
        else:
            out.squares.add_((w * y.square()).sum(0))


def _add(out: Tensor, terms: Tensor, owners: Tensor, firsts: Tensor) -> None:
    """Adds terms (P, ...), sorted by owner, to out[owners]; those of owner i begin at firsts[i].

    One writer per component and pairs in order: an index_add_ would not be deterministic on a GPU.
    """
    if terms.numel():
        index = torch.arange(len(terms), device=terms.device)
        out[owners] += embedding_bag(index, terms.flatten(1), firsts, mode="sum").view(-1, *out.shape[1:])

"""The components that a token without candidates looks at first, registered: ``torch.ops.mfa_kernels.top_scores``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mfa_kernels.ops.common import backends, cpp, trust
from mfa_kernels.ops.common.products import product
from mfa_kernels.ops.common.register import operator

_VALUES = 1 << 22  # that plain PyTorch holds at once


def top_scores(
    y: Tensor, right: Tensor, offsets: Tensor, count: int, starts: Tensor | None = None, lists: Tensor | None = None
) -> Tensor:
    """Returns the components with the largest scores of each token, without gradients.

    With p = right and o = offsets, the score of component k is o_k0 + y . p_k0 + 1/2 sum_s (o_ks + y . p_ks)^2: that
    of a normal distribution whose precision is 1 less S directions, but for what all components share. On the CPU the
    rows of y and right are read as multiples of a 63rd of their largest entry, alike on every processor: the products
    are of int8, and with a row that is not all finite there is no score.

    Args:
        y: (N, F), float32 or float64; on the CPU at most 65,536 coordinates.
        right: (K, 1 + S, F) in the same dtype.
        offsets: (K, 1 + S) in the same dtype; -inf in the first column leaves a component out.
        count: C, components of each token.
        starts: (G + 1,) int64, from 0 to K: group g holds the components from starts[g] to starts[g + 1]. None: each
            token looks at all components.
        lists: (N, P) int32, the groups that each token looks at, none of them twice; -1 is none.

    Returns:
        (N, C) int32, largest score first and then lowest index; -1 where no score is left, NaN being none.
    """
    found: Tensor = torch.ops.mfa_kernels.top_scores(y, right, offsets, count, starts, lists)
    return found


@operator(
    "top_scores",
    "-> Tensor",
    {
        "y": "real(N, F)", "right": "y(K, Q, F)", "offsets": "y(K, Q)", "count": "positive", "starts": "int64(J)",
        "lists": "int32(N, P)",
    },
    optional=("starts", "lists"),
    where={"right": "Q > 0", "starts": "J > 0"},
    fake=lambda given: given.y.new_empty(len(given.y), given.count, dtype=torch.int32),
)  # fmt: skip
def _top_scores(
    y: Tensor, right: Tensor, offsets: Tensor, count: int, starts: Tensor | None = None, lists: Tensor | None = None
) -> Tensor:
    if (starts is None) != (lists is None):
        raise ValueError("top_scores: starts and lists come together")
    if backends.serving(right, 0) == "cpp":
        groups = [None if t is None else t.contiguous() for t in (starts, lists)]
        return cpp.library().top_scores(y.contiguous(), right.contiguous(), offsets.contiguous(), count, *groups)
    parts = y.split(max(1, _VALUES // max(1, offsets.numel())))
    groups_of = [None] * len(parts) if lists is None else lists.split(len(parts[0]) or 1) if parts else []
    found = [y.new_empty(0, count, dtype=torch.int32)]
    for part, own in zip(parts, groups_of):
        values = offsets + product(part, right.flatten(0, 1)).view(len(part), *offsets.shape)
        scores = (values[..., 0] + values[..., 1:].square().sum(-1) / 2).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        if own is not None and starts is not None:
            scores.masked_fill_(~_looks(own, starts), -torch.inf)
        best, index = scores.sort(dim=1, descending=True, stable=True)
        index = torch.where(best[:, :count] > -torch.inf, index[:, :count], -1).int()
        found.append(pad(index, (0, count - index.shape[1]), value=-1))
    return torch.cat(found)


def _looks(lists: Tensor, starts: Tensor) -> Tensor:
    """Which components the tokens of `lists` look at, (n, K)."""
    trust.check_range("top_scores", "lists", lists, -1, len(starts) - 1)
    if int(starts[0]) != 0 or (starts.diff() < 0).any():
        raise ValueError(f"top_scores: starts must not fall from 0, got {starts.tolist()}")
    listed = torch.zeros(len(lists), len(starts), dtype=torch.bool, device=lists.device)  # the last column: none
    listed.scatter_(1, torch.where(lists < 0, len(starts) - 1, lists).long(), True)
    return listed[:, :-1].repeat_interleave(starts.diff(), 1)

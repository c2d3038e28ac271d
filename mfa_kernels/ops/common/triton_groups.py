"""Pairs grouped by component on the device: a component has one writer, and its rows are read once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Groups(NamedTuple):
    """Pairs sorted by component and cut into blocks that belong to one component each.

    Attributes:
        order: (P,) int64, the pairs by component and, within one, by position; those without
            a component come first, or last.
        starts: (K + 1,) int32: the pairs of component k are order[starts[k] : starts[k + 1]].
        blocks: (K + 1,) int32: the blocks of component k are blocks[k], ..., blocks[k + 1] - 1.
        grid: an upper bound on blocks[K], known without asking the device.
    """

    order: Tensor
    starts: Tensor
    blocks: Tensor
    grid: int


def group(components: Tensor, count: int, block: int) -> Groups:
    """Groups pairs by component. Nothing waits for the device, so a CUDA graph can hold it.

    Args:
        components: (P,) int32, P < 2^31; a value outside [0, K) marks a slot without a pair, which no group holds.
        count: K.
        block: the most pairs of a block.
    """
    ordered, order = torch.sort(components, stable=True)
    edges = torch.arange(count + 1, dtype=components.dtype, device=components.device)
    starts = torch.searchsorted(ordered, edges, out_int32=True)
    lengths = (starts.diff() + (block - 1)) // block
    blocks = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    pairs = components.shape[0]
    grid = (pairs + (block - 1) * min(count, pairs)) // block  # every non-empty component can leave one block ragged
    return Groups(order, starts, blocks, grid)


@triton.jit
def load_range(p_starts, i_k):
    """The first pair of component i_k in the order, and the first that is not its own."""
    return tl.load(p_starts + i_k), tl.load(p_starts + i_k + 1)


@triton.jit
def load_pairs(p_order, i, last, BP: tl.constexpr):
    """The pairs at i, ..., i + BP - 1 in the order, and True for those before `last`: [BP, 1, 1] each."""
    o_i = i + tl.arange(0, BP)[:, None, None]
    m_i = o_i < last
    return tl.load(p_order + o_i, mask=m_i, other=0), m_i


@triton.jit
def put(p_out, b_value, m_out, ADD: tl.constexpr):
    """Writes a tile, or adds it to what is there; its program is the only one that does."""
    if ADD:
        b_value += tl.load(p_out, mask=m_out)
    tl.store(p_out, b_value, mask=m_out)

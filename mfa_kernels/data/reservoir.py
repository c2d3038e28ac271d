"""A uniform sample of a stream that is read once, in the memory of the sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_integer, check_iterable
from mfa_kernels.common.modes import door, read
from mfa_kernels.data.source import as_rows, as_source


def reservoir(batches: Iterable[Tensor], rows: int, *, seed: int = 0) -> Tensor:
    """Returns at most `rows` of the rows of a stream, each subset of that size as likely as another.

    Every row draws a number, and the rows with the smallest numbers stay. Memory holds the sample and one batch; the
    sample is in the order of the stream, and the same however the stream is cut into batches. `kmeans` takes such a
    sample of an iterator.

    Args:
        batches: activations (..., D) of one width: tensors, arrays, or tuples that begin with one.
        rows: most rows of the sample.
        seed: seed of the numbers.

    Returns:
        (min(rows, N), D), in the dtype of the batches (float32 for halves) and on their device.

    Raises:
        TypeError, ValueError: naming the argument, also for a stream without rows.
    """
    return numbered(batches, rows, seed)[0]


@door
@torch.no_grad()
def numbered(batches: Iterable[Any], rows: int, seed: int, name: str = "batches") -> tuple[Tensor, Tensor]:
    """Returns a `reservoir`, and the numbers of its rows in the stream, (n,) int64 on the CPU."""
    rows = check_integer(rows, "rows", 1)
    check_iterable(batches, name, "an iterable of batches (B, D)")
    generator = torch.Generator().manual_seed(check_integer(seed, "seed"))
    parts: list[Tensor] = []  # the rows kept, in the order of their slots
    drawn = torch.empty(0, dtype=torch.float64)
    numbers = torch.empty(0, dtype=torch.long)
    seen = 0
    for i, batch in enumerate(read(batches)):
        x = as_rows(batch, f"{name}[{i}]")
        if not len(x):
            continue
        source = as_source(x, f"{name}[{i}]")
        if parts and source.n_features != parts[0].shape[1]:
            raise ValueError(f"{name}[{i}] has width {source.n_features}, but {name}[0] has width {parts[0].shape[1]}")
        held = len(drawn)
        mine = torch.rand(len(source), dtype=torch.float64, generator=generator)
        # Few rows of a late batch stay; only those are read, and written over those that they replace.
        new = torch.arange(len(mine)) if held < rows else (mine < drawn.max()).nonzero().squeeze(1)
        every = torch.cat([drawn, mine[new]])
        stays = torch.ones(len(every), dtype=torch.bool)
        stays[every.topk(max(0, len(every) - rows)).indices] = False
        new, free = new[stays[held:]], (~stays[:held]).nonzero().squeeze(1)
        if len(new):
            rest = source.rows(new)
            if len(free):
                parts = [torch.cat(parts)] if len(parts) > 1 else parts
                parts[0][free.to(parts[0].device)] = rest[: len(free)].to(parts[0])
                rest = rest[len(free) :]
            if len(rest):
                parts.append(rest.to(parts[0]) if parts else rest)
            slots = torch.cat([free, torch.arange(held, held + len(new) - len(free))])
            drawn = torch.cat([drawn, drawn.new_empty(len(new) - len(free))])
            numbers = torch.cat([numbers, numbers.new_empty(len(new) - len(free))])
            drawn[slots], numbers[slots] = mine[new], seen + new
        seen += len(source)
    if not parts:
        raise ValueError(f"{name} is an iterable without batches that hold rows (an iterator can be read only once)")
    order = numbers.argsort()
    return torch.cat(parts)[order.to(parts[0].device)], numbers[order]

"""Meaning of positions= ("all", "prompt", "generated", "last", slices, masks), pass by pass."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.checks import check_choice, check_integer, check_tensor
from mfa_kernels.steering.tracking import Pass

Positions: TypeAlias = "str | slice | Tensor"

_NAMES = ("all", "prompt", "generated", "last")


def check_positions(positions: Any) -> Positions:
    """Returns `positions` if it is of a kind that `choose` takes.

    Raises:
        TypeError, ValueError: naming the argument and the kinds.
    """
    if isinstance(positions, str):
        return check_choice(positions, _NAMES, "positions")
    if isinstance(positions, slice):
        bounds = {name: getattr(positions, name) for name in ("start", "stop", "step")}
        least = {"start": 0, "stop": 0, "step": 1}  # they count from the first token
        return slice(*(b if b is None else check_integer(b, f"positions.{n}", least[n]) for n, b in bounds.items()))
    if is_several(positions):
        positions = check_tensor(positions, "positions")
        if positions.dtype != torch.bool or positions.dim() not in (1, 2) or not positions.numel():
            raise ValueError(
                "positions: a mask must be a bool tensor of shape (T,) or (B, T), "
                f"got {positions.dtype} of shape {tuple(positions.shape)}"
            )
        return positions
    raise TypeError(f"positions must be one of {', '.join(_NAMES)}, a slice or a bool mask, got {positions!r}")


def choose(positions: Positions, now: Pass, batch: int, device: torch.device) -> bool | Tensor:
    """Returns the tokens of a pass that are chosen: all (True), none (False), or a mask (B or 1, T); never padding."""
    if isinstance(positions, str):
        chosen = _named(positions, now, device)
    elif isinstance(positions, slice):
        chosen = _sliced(positions, now.positions(device))
    else:
        chosen = _masked(positions, now.positions(device), batch)
    if now.real is None or chosen is False:
        return chosen
    real = now.real.to(device)
    return real if chosen is True else real & chosen


def _named(name: str, now: Pass, device: torch.device) -> bool | Tensor:
    if name == "all":
        return True
    if name == "prompt":
        inverse = _from_column(now.prompt_end, now, device)
        return ~inverse if isinstance(inverse, Tensor) else not inverse
    if name == "generated":
        return _from_column(now.prompt_end, now, device)
    # "last": the prompt's last token, and every token after it (each was the last one when it was read).
    if now.real is None or now.end < now.prompt_end:
        return _from_column(now.prompt_end - 1, now, device)
    prompt = now.real.to(device) & (now.columns(device) < now.prompt_end)
    is_last = prompt & (prompt.flip(1).cumsum(1).flip(1) == 1)
    return is_last | (now.columns(device) >= now.prompt_end)


def _from_column(column: int, now: Pass, device: torch.device) -> bool | Tensor:
    """Returns the columns >= `column`, as `choose` does."""
    if now.start >= column:
        return True
    if now.end <= column:
        return False
    return now.columns(device) >= column


def _sliced(positions: slice, at: Tensor) -> Tensor:
    start, step = positions.start or 0, positions.step or 1
    chosen = at >= start
    if positions.stop is not None:
        chosen = chosen & (at < positions.stop)
    return chosen if step == 1 else chosen & ((at - start) % step == 0)


def _masked(mask: Tensor, at: Tensor, batch: int) -> Tensor:
    """Returns the mask at absolute positions, False past its end."""
    rows = mask.reshape(-1, mask.shape[-1]).to(at.device)
    if batch % len(rows):
        raise ValueError(f"positions: a mask for {len(rows)} batch rows does not fit a batch of {batch}")
    rows = rows.repeat_interleave(batch // len(rows), 0)
    inside = (at >= 0) & (at < rows.shape[1])
    at = at.clamp(0, rows.shape[1] - 1).expand(batch, -1)
    return rows.gather(1, at) & inside

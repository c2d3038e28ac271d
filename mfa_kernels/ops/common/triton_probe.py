"""Whether the matrix units of a chip sum as the bounds assume: each addition of fp16 products loses at most 2^-23 of a
partial sum (`triton_fp16.sum_error`).

True of all units that are known, with two to four times to spare. An accumulator of 14 bits, as fp8 has on some chips,
would be off by a hundred times the bound, and nothing else would notice: so it is tried, once on each device.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mfa_kernels.ops.common.triton_fp16 import FEATURES, sum_error

_TOKENS, _ROWS = 128, 64
_SMALL = (2.0**-12, 2.0**-10, 2.0**-7, 2.0**-6)  # roots of what is added to 1: below and above a unit of the sum


@triton.jit
def products_kernel(p_x, p_rows, p_out, D, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    n, k, d = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BD)
    b_sum = tl.zeros((BN, BK), dtype=tl.float32)
    for first in range(0, D, BD):
        b_x = tl.load(p_x + n[:, None] * D + first + d[None, :])
        b_rows = tl.load(p_rows + k[:, None] * D + first + d[None, :])
        b_sum = tl.dot(b_x, tl.trans(b_rows), b_sum)
    tl.store(p_out + n[:, None] * BK + k[None, :], b_sum)


def vectors(features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x (128, D) and rows (64, D) in fp16, whose sums lose what they can lose: one product of 1, and many small ones of
    either sign, of which each is nearly a unit of the last place or far more. D is a multiple of 64."""
    token, row = torch.arange(_TOKENS).unsqueeze(1), torch.arange(_ROWS).unsqueeze(1)
    d = torch.arange(features).unsqueeze(0)
    small = torch.tensor(_SMALL)
    x = small[token % len(_SMALL)].expand(-1, features).clone()
    rows = small[row % len(_SMALL)].expand(-1, features) * (1 - 2.0**-10)
    # Signs: all alike, by turns, or by halves.
    turns = torch.stack([torch.ones_like(d[0]), 1 - 2 * (d[0] % 2), torch.where(d[0] < features // 2, 1, -1)])
    rows = rows * turns[(row.squeeze(1) // len(_SMALL)) % 3]
    # The 1 stands first, in the middle or last: sums meet it early or late.
    at = torch.tensor([0, features // 2, features - 1])[(token.squeeze(1) // len(_SMALL)) % 3]
    x[torch.arange(_TOKENS), at] = 1
    rows[:, [0, features // 2, features - 1]] = 1
    return x.half().to(device), rows.half().to(device)


def error(found: Tensor, x: Tensor, rows: Tensor) -> float:
    """The largest error of the products x rows^T over the bound: more than 1 breaks it."""
    exact = x.double() @ rows.double().T
    allowed = sum_error(x.shape[1]) * x.double().norm(dim=1, keepdim=True) * rows.double().norm(dim=1)
    return float(((found.double() - exact).abs() / allowed).nan_to_num(torch.inf).max())


def of_device(device: torch.device, features: int) -> float:
    """`error` of a device's own products, for sums of so many features; tried once."""
    return _of_device(device, max(FEATURES, triton.next_power_of_2(features)))


@functools.cache
def _of_device(device: torch.device, features: int) -> float:
    x, rows = vectors(features, device)
    return error(products(x, rows), x, rows)


def products(x: Tensor, rows: Tensor) -> Tensor:
    """x rows^T of `vectors`, by the matrix units, (128, 64) float32."""
    out = torch.empty(len(x), len(rows), device=x.device)
    with torch.cuda.device_of(x):
        products_kernel[(1,)](x, rows, out, x.shape[1], BN=_TOKENS, BK=_ROWS, BD=FEATURES)
    return out

"""Matrix products on a CPU by the faster library, and the yardstick that scans are measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""oneDNN's product on plain tensors, which torch.compile calls; without it, tensors are copied to oneDNN's and back."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for a (M, I), b (J, I).

    In float32 on a CPU by oneDNN: MKL leaves half the vector units of other vendors' processors idle.
    """
    onednn = a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not (onednn and a.numel() and b.numel()):
        return a @ b.mT
    if _LINEAR is not None:
        return _LINEAR(a, b, None, "none", [], "")
    return torch.nn.functional.linear(a.to_mkldnn(), b).to_dense()


def yardsticks(tokens: int, columns: int, features: int) -> dict[str, Callable[[], Tensor]]:
    """The product [tokens, features] x [features, columns] in float32, by torch.mm and by oneDNN's linear.

    Neither is the faster on all processors, so a scan is measured against the faster of the two.
    """
    left, right = torch.randn(tokens, features), torch.randn(columns, features)
    across = right.t().contiguous()
    return {"torch.mm": lambda: torch.mm(left, across), "oneDNN": lambda: product(left, right)}

"""What stage 0 hands on: the precomputed terms of the components."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mfa_kernels.ops.common import backends


@dataclass(frozen=True)
class Woodbury:
    """What stages 1 and 2 need of the parameters, in one dtype and on one device.

    Attributes:
        rows: the backend's own layout of {mu_k, A_k}: (K, R+1, D) in plain PyTorch (a further row
            lam_k when every component has its own noise), (K, D/V, R+1, V) for the C++ kernels.
        cholesky: L_k, (K, R, R).
        log_det: log|C_k|, (K,).
        scale: lam = Psi^-1/2 (D,), or ones where the noise is per component (its lam is in the rows).
        center: (D,), for backends that expand the square; those that form x - mu need none.
        per_component: whether the noise is per component.
        scan: what the GPU scan reads instead of the rows (woodbury/triton_rows.py); of size 0 on other backends.
    """

    rows: Tensor
    cholesky: Tensor
    log_det: Tensor
    scale: Tensor
    center: Tensor
    per_component: bool
    scan: tuple[Tensor, ...] = ()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Those that operators take, as `FACTORS` names them in a schema."""
        return self.rows, self.cholesky, self.log_det, self.scale, self.center

    @property
    def is_cpp(self) -> bool:
        """Whether the rows are those of the C++ kernels."""
        return self.rows.dim() == 4

    @property
    def is_triton(self) -> bool:
        """Whether the Triton kernels serve the rows."""
        return not self.is_cpp and backends.serving(self.rows, self.cholesky.shape[-1]) == "triton"

    def constants(self, log_weights: Tensor) -> Tensor:
        """log pi_k - (D log 2 pi + log|C_k|) / 2, (K,)."""
        return log_weights - 0.5 * (self.center.shape[0] * math.log(2 * math.pi) + self.log_det)


WOODBURY = "Tensor rows, Tensor cholesky, Tensor log_det, Tensor scale, Tensor center"


def unpack_rows(rows: Tensor, features: int) -> Tensor:
    """Any layout of the rows as (K, R+1, D) or (K, R+2, D)."""
    return rows if rows.dim() == 3 else rows.transpose(1, 2).flatten(2)[..., :features]


class ScanRows(NamedTuple):
    """The scan's view of the factors.

    Attributes:
        rows: (tiles, G, 64, D') fp16: component k is row k % 64 of tile k // 64; G = R + 1 (R + 2 with w, for noise
            per component). D' is D rounded up to a multiple of 64; what pads D and K is zero.
        scales: (3, tiles 64): the powers of two that B, w m and w were divided by.
        offsets: (tiles, R, 64): B m, divided like B.
        squares: (K,) float64: sum_d w m^2.
        bounds: (7, tiles 64): M1, M2, E1, E2, E3, N1, N2 of the rounding bound (scan/triton_scan.py), made of
            eps_m >= |w m - row|, mu >= |w m|, eps_B >= |B - rows|_F, phi >= |B|_F, eps_w >= max_d |w - row|,
            omega >= max_d w, and the error g of a sum of D' products.
        worst: (5,): over the components, the largest M1 / M2, E1, E2, E3 / M2 and N1 / N2.
        scale: s, (D,).
    """

    rows: Tensor
    scales: Tensor
    offsets: Tensor
    squares: Tensor
    bounds: Tensor
    worst: Tensor
    scale: Tensor

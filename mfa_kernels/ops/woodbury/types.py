"""The parameters of a mixture, and the terms that stage 0 computes from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from mfa_kernels.ops.common import backends

TRITON_RANK = 32
"""The largest rank of stage 0 in Triton: beyond, M and L do not fit into the registers of a program."""


class Parameters(NamedTuple):
    """A mixture of factor analyzers: p(x) = sum_k exp(log_weights_k) N(x; mu_k, W_k W_k^T + diag(Psi)).

    Attributes:
        means: mu, (K, D), float32 or float64 as the others.
        loadings: W, (K, D, R).
        noise_variance: Psi, (D,), or (K, D) for noise per component.
        log_weights: log pi, (K,).
    """

    means: Tensor
    loadings: Tensor
    noise_variance: Tensor
    log_weights: Tensor


@dataclass(frozen=True)
class Woodbury:
    """The precomputed terms that stages 1 and 2 read, in one dtype and on one device.

    Attributes:
        rows: the backend's own layout of {mu_k, A_k}: (K, R+1, D) in plain PyTorch (a further row
            lam_k when every component has its own noise), (K, D/V, R+1, V) for the C++ kernels.
        cholesky: L_k, (K, R, R).
        log_det: log|C_k|, (K,).
        scale: lam = Psi^-1/2 (D,), or ones where the noise is per component (its lam is in the rows).
        center: (D,), for backends that expand the square; those that form x - mu need none.
        per_component: whether the noise is per component.
        scan: what the GPU scan reads instead of the rows (woodbury/triton_rows.py); of size 0 on other backends.
        int8: the tensors of an `Int8Rows`, for the first level of the scan on a CPU; of size 0 where there is none.
    """

    rows: Tensor
    cholesky: Tensor
    log_det: Tensor
    scale: Tensor
    center: Tensor
    per_component: bool
    scan: tuple[Tensor, ...] = ()
    int8: tuple[Tensor, ...] = ()

    @classmethod
    def of_tensors(cls, rows: Tensor, cholesky: Tensor, log_det: Tensor, scale: Tensor, center: Tensor) -> Woodbury:
        """The same from `tensors` alone, as an operator is given them: the rest shows in their sizes."""
        return cls(rows, cholesky, log_det, scale, center, rows.size(-2) == cholesky.size(-1) + 2)

    @classmethod
    def without_log_det(
        cls, rows: Tensor, cholesky: Tensor, scale: Tensor, center: Tensor, per_component: bool
    ) -> Woodbury:
        """The terms for what needs no log-determinants."""
        return cls(rows, cholesky, cholesky.new_empty(0), scale, center, per_component)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors that operators take."""
        return self.rows, self.cholesky, self.log_det, self.scale, self.center

    @cached_property
    def backend(self) -> str:
        """ "cpp", "triton" or "portable": the kernels that serve the rows. Only those of the C++ kernels are tiled."""
        return "cpp" if self.rows.dim() == 4 else backends.serving(self.rows, self.cholesky.shape[-1])

    @property
    def is_cpp(self) -> bool:
        """True where the C++ kernels serve the rows."""
        return self.backend == "cpp"

    def constants(self, log_weights: Tensor) -> Tensor:
        """log pi_k - (D log 2 pi + log|C_k|) / 2, (K,)."""
        return log_weights - 0.5 * (self.center.shape[0] * math.log(2 * math.pi) + self.log_det)


def unpack_rows(rows: Tensor, features: int) -> Tensor:
    """Any layout of the rows as (K, R+1, D) or (K, R+2, D)."""
    return rows if rows.dim() == 3 else rows.transpose(1, 2).flatten(2)[..., :features]


class ScanRows(NamedTuple):
    """The terms in the layout that the GPU scan reads.

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

    @classmethod
    def of_tensors(
        cls, rows16: Tensor, scales: Tensor, offsets: Tensor, squares: Tensor, bounds: Tensor, worst: Tensor,
        reference: Tensor,
    ) -> ScanRows:  # fmt: skip
        """The same from the tensors of an operator, which has other names for the first and the last."""
        return cls(rows16, scales, offsets, squares, bounds, worst, reference)


class Int8Rows(NamedTuple):
    """The terms that the first level of the scan on a CPU reads (csrc/cpu/int8/rows.h, scan/README.md).

    Attributes:
        rows: (K, D'/4, R, 4) int8; D' is D rounded up to whole vectors.
        means: (K, 1, D') float32: m; (K, 2, D') with rho where the noise is per component.
        starts: (K, R) int32.
        terms: (K, 2 R + 5) float32: a quantum and B m for each row; |B|, |E|, the rounding of B m, |m|,
            the largest rho.
        scale: s, (D,).
    """

    rows: Tensor
    means: Tensor
    starts: Tensor
    terms: Tensor
    scale: Tensor

    @classmethod
    def of_tensors(cls, rows8: Tensor, means8: Tensor, starts8: Tensor, terms8: Tensor, scale8: Tensor) -> Int8Rows:
        """The same from the tensors of an operator, which has other names for them."""
        return cls(rows8, means8, starts8, terms8, scale8)

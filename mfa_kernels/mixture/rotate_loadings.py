"""Rotations of the loadings, W_k <- W_k Q_k: the density keeps, single latents become readable.

W_k W_k^T, and with it every likelihood and responsibility, is the same for every orthogonal Q_k, so that the columns of
W_k mean nothing by themselves until one Q_k is chosen. Both choices here end with the entry of largest magnitude of
each column positive, as do what clusters and `fit` give: the same W_k W_k^T does not come back with other signs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mfa_kernels.common.modes import door
from mfa_kernels.common.progress import progress_bar

_CHUNK_BYTES = 64 << 20  # of temporaries


@door
@torch.no_grad()
def varimax(loadings: Tensor, iterations: int = 50, tol: float = 1e-6, *, progress: bool = True) -> Tensor:
    """Columns that load on few features: maximises, per component, the variance of the squared loadings.

        V(Q) = sum_r [ mean_d L_dr^4 - (mean_d L_dr^2)^2 ],   L = W Q,   Q orthogonal

    (Kaiser 1958), without his normalisation of the rows, by fixed-point steps Q <- polar factor of the gradient of V
    at Q. The maximum found is a local one; V is never below that of the loadings given.

    Args:
        loadings: W, (K, D, R), float. Half precisions compute in float32.
        iterations: most steps per component, at least 1.
        tol: a component is done when a step raises V by less than this fraction.
        progress: show a bar when it takes more than two seconds.

    Returns:
        (K, D, R), a new tensor; rank 0 and 1 have nothing to rotate, but their sign.
    """
    _check(loadings)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations!r}")
    if not tol >= 0:
        raise ValueError(f"tol must be >= 0, got {tol!r}")
    rotations = functools.partial(_varimax_rotations, iterations=iterations, tol=tol)
    return _rotated(loadings, rotations, "varimax", progress)


def _varimax_rotations(rows: Tensor, iterations: int, tol: float) -> Tensor:
    """Q^T (K, R, R) for W^T (K, R, D)."""
    # Fourth powers: to magnitude one, or they leave float32. V has its maximum at the same Q.
    rows = rows / rows.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    components, rank, _ = rows.shape
    best = torch.eye(rank, dtype=rows.dtype, device=rows.device).repeat(components, 1, 1)
    criterion = torch.full((components,), -torch.inf, dtype=torch.float64, device=rows.device)
    active, candidate = torch.arange(components, device=rows.device), best
    for _ in range(iterations + 1):  # the first pass measures Q = I
        rotated = candidate @ rows
        squares = rotated.square()
        rotated *= squares - squares.mean(dim=2, keepdim=True)
        gradient = rotated @ rows.mT
        value = (candidate * gradient).sum(dim=(1, 2), dtype=torch.float64)  # D V(candidate)
        before = criterion[active]
        better = value > before
        best[active[better]], criterion[active[better]] = candidate[better], value[better]
        going = value - before > tol * value
        if not going.any():
            break
        if not going.all():
            active, gradient, rows = active[going], gradient[going], rows[going]
        u, _, vh = torch.linalg.svd(gradient.double())  # R x R: cheap, and Q is orthogonal to the last digit
        candidate = (u @ vh).to(rows.dtype)
    return best


@door
@torch.no_grad()
def principal(loadings: Tensor, *, progress: bool = True) -> Tensor:
    """Orthogonal columns, in the order of the variance they explain (the eigenvalues of W^T W, falling).

    Args:
        loadings: W, (K, D, R), float. Half precisions compute in float32.
        progress: show a bar when it takes more than two seconds.

    Returns:
        (K, D, R), a new tensor; rank 0 and 1 have nothing to rotate, but their sign.
    """
    _check(loadings)
    return _rotated(loadings, _principal_rotations, "principal", progress)


def _principal_rotations(rows: Tensor) -> Tensor:
    """Q^T (K, R, R) for W^T (K, R, D)."""
    wide = rows.double()
    _, vectors = torch.linalg.eigh(wide @ wide.mT)  # rising
    return vectors.flip(-1).mT.to(rows.dtype)


def _check(loadings: Tensor) -> None:
    if loadings.dim() != 3:
        raise ValueError(f"loadings must have shape (K, D, R), got {tuple(loadings.shape)}")
    if not loadings.is_floating_point():
        raise TypeError(f"loadings must have a floating-point dtype, got {loadings.dtype}")


def _rows(chunk: Tensor) -> Tensor:
    """W^T (K, R, D), contiguous: products with D x R matrices of so few columns are several times slower."""
    if not chunk.isfinite().all():
        raise ValueError("loadings must be finite: a rotation of NaN or infinite loadings is undefined")
    return chunk.to(torch.promote_types(chunk.dtype, torch.float32)).mT.contiguous()


@torch.no_grad()
def sign_(loadings: Tensor) -> None:
    """Makes the entry of largest magnitude of each column of W (K, D, R) positive, in place: no density changes."""
    for part in loadings.split(max(1, _CHUNK_BYTES // (16 * max(1, loadings[0].numel())))) if len(loadings) else ():
        part.copy_(_signed(part.mT).mT)


def _signed(rows: Tensor) -> Tensor:
    """With the entry of largest magnitude of each row positive."""
    largest = rows.gather(2, rows.abs().argmax(dim=2, keepdim=True))
    return rows * torch.where(largest < 0, -1, 1).to(rows.dtype)


def _rotated(loadings: Tensor, rotations: Callable[[Tensor], Tensor], description: str, progress: bool) -> Tensor:
    """W Q (K, D, R), where `rotations` gives Q^T for W^T, with bounded memory for half a dozen temporaries."""
    rotated = loadings.clone()
    components, features, rank = loadings.shape
    if rank < 2:
        sign_(rotated)
        return rotated
    step = max(1, _CHUNK_BYTES // (6 * 8 * features * rank))
    with progress_bar(total=components, desc=description, unit="component", delay=2, progress=progress) as bar:
        for part in rotated.split(step) if components else ():
            rows = _rows(part)
            part.copy_(_signed(rotations(rows) @ rows).mT)
            bar.update(len(part))
    return rotated

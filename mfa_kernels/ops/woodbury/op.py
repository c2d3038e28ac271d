"""Stage 0 registered: ``torch.ops.mfa_kernels.factors`` and its gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision
from mfa_kernels.ops.common import backends, cpp, cuda, first_use, trust
from mfa_kernels.ops.common.out_of_memory import explain_out_of_memory
from mfa_kernels.ops.common.register import operator
from mfa_kernels.ops.woodbury import int8, spot_check
from mfa_kernels.ops.woodbury.portable import portable
from mfa_kernels.ops.woodbury.types import TRITON_RANK, Woodbury, unpack_rows


def scale_of(noise_variance: Tensor) -> Tensor:
    """lam (D,): ones where each component has its own noise."""
    return noise_variance.rsqrt() if noise_variance.dim() == 1 else torch.ones_like(noise_variance[0])


def factorize(means: Tensor, loadings: Tensor, noise_variance: Tensor, center: Tensor) -> Woodbury:
    """Runs stage 0 outside autograd: the gradients of stages 1 and 2 reach the parameters in closed form.

    Args:
        means: (K, D).
        loadings: (K, D, R).
        noise_variance: (D,) or (K, D).
        center: (D,).
    """
    if center.shape != means.shape[1:]:
        raise ValueError(f"center must have shape (D,) = ({means.shape[1]},), got {tuple(center.shape)}")
    with torch.no_grad():
        rows, cholesky, log_det = torch.ops.mfa_kernels.factors(means, loadings, noise_variance)
        scale, center = scale_of(noise_variance).contiguous(), center.to(means).contiguous()
        per_component = noise_variance.dim() == 2
        terms = rows, cholesky, scale, center, per_component
        scan, rows8 = torch.ops.mfa_kernels.scan_rows(*terms), torch.ops.mfa_kernels.int8_rows(*terms)
        return Woodbury(rows, cholesky, log_det, scale, center, per_component, tuple(scan), tuple(rows8))


def _gradients(
    saved: Sequence[Tensor], grad_rows: Tensor, grad_cholesky: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    means, loadings, noise, rows, cholesky = saved
    features, rank = loadings.shape[1:]
    scale = noise.rsqrt().expand_as(means)  # lam_k
    grad_rows = unpack_rows(grad_rows, features)
    a, grad_a = unpack_rows(rows, features)[:, 1 : rank + 1], grad_rows[:, 1 : rank + 1]
    whitened = loadings * scale.unsqueeze(-1)
    # A = L^-1 W~^T, L = chol(M), M = I + W~^T W~ (Murray, arXiv 1602.07527, for the Cholesky step)
    solve = torch.linalg.solve_triangular
    upstream = solve(cholesky.mT, grad_a, upper=True)  # L^-T dA, (K, R, D)
    inner = cholesky.mT @ (grad_cholesky - upstream @ a.mT).tril()
    inner = inner.tril() - 0.5 * torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    grad_gram = solve(cholesky.mT, solve(cholesky.mT, inner.mT, upper=True).mT, upper=True)
    identity = torch.eye(rank, dtype=a.dtype, device=a.device).expand_as(cholesky)
    inverse = torch.cholesky_solve(identity, cholesky)  # M^-1 = d log|M| / d M
    symmetric = grad_gram + grad_gram.mT + 2 * grad_log_det[:, None, None] * inverse
    grad_whitened = upstream.mT + whitened @ symmetric
    grad_loadings = grad_whitened * scale.unsqueeze(-1)
    grad_scale = (grad_whitened * loadings).sum(-1)
    if noise.dim() == 2:
        grad_scale = grad_scale + grad_rows[:, rank + 1]
    grad_noise = -0.5 * grad_scale * scale**3 + grad_log_det.unsqueeze(-1) * scale.square()
    if noise.dim() == 1:
        grad_noise = grad_noise.sum(0)
    return grad_rows[:, 0], grad_loadings, grad_noise


def _fake_factors(given):
    means, (components, features, rank) = given.means, given.loadings.shape
    row_count = rank + given.noise_variance.dim()
    if backends.serving(means, rank) != "cpp":
        rows = means.new_empty(components, row_count, features)
    else:
        width = cpp.library().vector_bytes // means.element_size()
        rows = means.new_empty(components, -(-features // width), row_count, width)
    return rows, means.new_empty(components, rank, rank), means.new_empty(components)


def _backward(saved, needs, *gradients):
    with full_precision(gradients[0]):
        return _gradients(saved, *gradients)


@operator(
    "factors",
    "-> (Tensor rows, Tensor cholesky, Tensor log_det)",
    trust.PARAMETERS,
    fake=_fake_factors,
    gradient=_backward,
    saves=lambda inputs, output: (*inputs, *output[:2]),
)
def _factors(means: Tensor, loadings: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with full_precision(means), _room(means, loadings.shape[2], 2):
        serving, given = backends.serving(means, loadings.shape[2]), (means, loadings, noise_variance)
        if serving == "cpp":
            return cpp.library().woodbury(*(t.contiguous() for t in given))
        has_library, fits = serving == "triton" and cuda.library() is not None, _fits_triton(loadings)
        if serving != "triton" or not (has_library or fits):
            return portable(*given)
        trial = first_use.Trial(
            lambda: _on_gpu(*given),
            lambda: portable(*given),
            lambda found, before: spot_check.of_factors(found, *given),
            careful=has_library and fits,  # without the library, by Triton
        )
        shape = *loadings.shape[1:], noise_variance.dim(), has_library
        return first_use.served("factors", means, shape, trial)


def _fits_triton(loadings: Tensor) -> bool:
    """On a GPU; to interpret the kernel takes longer than what it does, which plain PyTorch does as well."""
    return loadings.device.type == "cuda" and 0 < loadings.shape[2] <= TRITON_RANK


def _on_gpu(means: Tensor, loadings: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the CUDA library where there is one that may be used, else by Triton."""
    library, given = cuda.library_in_use(), (means, loadings, noise_variance)
    if library is not None:
        return library.woodbury(*(t.contiguous() for t in given))
    from mfa_kernels.ops.woodbury import triton_woodbury

    return triton_woodbury.woodbury(*given)


def _room(means: Tensor, rank: int, copies: int) -> contextlib.AbstractContextManager[None]:
    """Explains an out-of-memory error by the size of the terms."""
    components, features = means.shape
    what = f"the factors of {components} components of rank {rank}"
    size = copies * components * (rank + 1) * features
    return explain_out_of_memory(
        what, size, means.element_size(), "a smaller n_components or rank, or float32, takes less"
    )


_TERMS = {"rows": trust.ROWS, "cholesky": "real(K, R, R)", "scale": "cholesky(D)", "center": "cholesky(D)"}


def _fake_scan_rows(given):
    if Woodbury.without_log_det(*vars(given).values()).backend != "triton":
        return _none(given.rows, 7)
    from mfa_kernels.ops.woodbury import triton_rows

    return tuple(triton_rows.allocate(given.rows, given.cholesky.shape[-1], given.per_component))


@operator(
    "scan_rows",
    "-> (Tensor rows16, Tensor scales, Tensor offsets, Tensor squares, Tensor bounds, Tensor worst, Tensor reference)",
    _TERMS,
    last=("rows",),
    fake=_fake_scan_rows,
)
def _scan_rows(
    rows: Tensor, cholesky: Tensor, scale: Tensor, center: Tensor, per_component: bool
) -> tuple[Tensor, ...]:
    woodbury = Woodbury.without_log_det(rows, cholesky, scale, center, per_component)
    if woodbury.backend != "triton":
        return _none(rows, 7)
    from mfa_kernels.ops.woodbury import triton_rows

    # What the rows are worth, a scan says, which makes its own where there are none.
    trial = first_use.Trial(
        lambda: tuple(triton_rows.scan_rows(woodbury)), lambda: _none(rows, 7), lambda found, before: 0.0
    )
    with _room(rows[:, 0], cholesky.shape[-1], 1):
        return first_use.served("rows of the scan", rows, (*rows.shape[1:], per_component), trial)


def _fake_int8_rows(given):
    woodbury = Woodbury.without_log_det(*vars(given).values())
    return tuple(int8.allocate(woodbury)) if int8.pays(woodbury) else _none(given.rows, 5)


@operator(
    "int8_rows",
    "-> (Tensor rows8, Tensor means8, Tensor starts8, Tensor terms8, Tensor scale8)",
    _TERMS,
    last=("rows",),
    fake=_fake_int8_rows,
)
def _int8_rows(
    rows: Tensor, cholesky: Tensor, scale: Tensor, center: Tensor, per_component: bool
) -> tuple[Tensor, ...]:
    woodbury = Woodbury.without_log_det(rows, cholesky, scale, center, per_component)
    if not int8.pays(woodbury):
        return _none(rows, 5)
    with _room(center.expand(len(rows), -1), cholesky.shape[-1], 1):
        return tuple(int8.int8_rows(woodbury))


def _none(like: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) for _ in range(count))

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.woodbury import reference
from mfa_kernels.ops.woodbury.types import unpack_rows
from tests.helpers.mixtures import Mixture, mixture

SHAPES = [(1, 1, 1), (3, 7, 0), (5, 16, 1), (4, 33, 5), (67, 71, 10), (3, 130, 17), (2, 40, 40)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_formula(backend, shape, per_component, dtype):
    m = mixture(*shape, per_component=per_component, dtype=dtype)
    rows, cholesky, log_det = torch.ops.mfa_kernels.factors(*m[:3])
    wide = m.to(torch.float64)
    a, lower, wanted_log_det = reference.woodbury(wide.loadings, wide.noise_variance)
    rank, tolerance = shape[2], 1e-12 if dtype == torch.float64 else 2e-5
    unpacked = unpack_rows(rows, shape[1])
    scale = wide.noise_variance.rsqrt()
    torch.testing.assert_close(unpacked[:, 1 : rank + 1].double(), a, rtol=tolerance, atol=tolerance)
    assert torch.equal(unpacked[:, 0], m.means)
    if per_component:
        torch.testing.assert_close(unpacked[:, -1].double(), scale, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(cholesky.double(), lower, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_det.double(), wanted_log_det, rtol=tolerance, atol=tolerance * shape[1])
    if rows.dim() == 4:  # the padding is what the kernels rely on
        assert rows.transpose(1, 2).flatten(2)[..., shape[1] :].abs().sum() == 0


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_gradcheck(backend, per_component):
    m = mixture(3, 6, 2, per_component=per_component, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in m[:3]]
    assert torch.autograd.gradcheck(torch.ops.mfa_kernels.factors, leaves)


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_opcheck(backend, per_component):
    m = mixture(3, 21, 2, per_component=per_component)
    leaves = [t.clone().requires_grad_() for t in m[:3]]
    torch.library.opcheck(torch.ops.mfa_kernels.factors.default, leaves)


def test_strided_parameters(backend):
    m = mixture(5, 19, 3)
    expected = torch.ops.mfa_kernels.factors(*m[:3])
    strided = (
        m.means.t().contiguous().t(),
        m.loadings.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([m.noise_variance, m.noise_variance])[:, ::1][0],
    )
    found = torch.ops.mfa_kernels.factors(*strided)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_tiny_noise_and_large_loadings(backend):
    m = mixture(4, 50, 3, dtype=torch.float32)
    m = m._replace(noise_variance=m.noise_variance * 1e-6, loadings=m.loadings * 1e2)
    _, _, log_det = torch.ops.mfa_kernels.factors(*m[:3])
    wide = m.to(torch.float64)
    covariance = wide.loadings @ wide.loadings.mT + torch.diag(wide.noise_variance)
    torch.testing.assert_close(log_det.double(), torch.logdet(covariance), rtol=1e-5, atol=1e-3)


def test_nearly_collinear_loadings(backend):
    """Products in the dtype alone lose the definiteness of M; what is found must be what float64 finds."""
    m = mixture(3, 64, 4, dtype=torch.float64)
    base = m.loadings[..., :1]
    loadings = 1e3 * (base + 1e-3 * m.loadings)
    m = m._replace(loadings=loadings).to(torch.float32)
    _, _, log_det = torch.ops.mfa_kernels.factors(*m[:3])
    _, _, wanted = reference.woodbury(m.loadings.double(), m.noise_variance.double())
    torch.testing.assert_close(log_det.double(), wanted, rtol=1e-5, atol=1e-2)


def collinear(dtype: torch.dtype, length: float) -> Mixture:
    """Among ordinary components, some with a column twice, one of zeros, and one that is almost another."""
    m = mixture(9, 64, 4, dtype=torch.float64)
    m.loadings[::2, :, 1] = m.loadings[::2, :, 0]
    m.loadings[2, :, 2] = 0
    m.loadings[4, :, 3] = m.loadings[4, :, 2] * (1 + 1e-6)
    m.loadings[::2] *= length
    return m.to(dtype)


def log_det_by_singular_values(m: Mixture) -> Tensor:
    """sum log Psi + sum log(1 + s^2): nothing cancels in float64."""
    wide = m.to(torch.float64)
    values = torch.linalg.svdvals(wide.loadings * wide.noise_variance.rsqrt().unsqueeze(-1))
    return wide.noise_variance.log().sum() + torch.log1p(values.square()).sum(-1)


@pytest.mark.parametrize("length", [1.0, 1e3, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_formula_of_collinear_loadings(dtype, length):
    """M, as it is rounded, may have no Cholesky factor, in one order of summation or in another."""
    m = collinear(dtype, length)
    a, lower, log_det = reference.woodbury(m.loadings, m.noise_variance)
    unit = torch.finfo(dtype).eps
    # A pivot near 1 is off by what `length` is off by, or by what its square is off by where that is little.
    allowed = 32 * unit * (100 + length) + min(64 * reference._LOST, 64 * unit * length**2)
    torch.testing.assert_close(log_det.double(), log_det_by_singular_values(m), rtol=32 * unit, atol=allowed)
    whitened = m.loadings.double() * m.noise_variance.double().rsqrt().unsqueeze(-1)
    # A = L^-1 W~^T, and A A^T = I - M^-1: no row is longer than 1.
    torch.testing.assert_close(lower.double() @ a.double(), whitened.mT, rtol=1e3 * unit, atol=1e3 * unit * length)
    assert (a.norm(dim=-1) <= 1 + 64 * unit).all()
    assert (lower.diagonal(dim1=-2, dim2=-1) >= 1 - 64 * unit).all()
    assert torch.equal(lower, lower.tril())


def test_both_ways_of_the_formula_are_one(monkeypatch):
    m = mixture(5, 33, 3, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in m[1:3]]
    pull = [torch.randn_like(t) for t in reference.woodbury(*leaves)]

    def gradients() -> tuple[list[Tensor], list[Tensor]]:
        found = list(reference.woodbury(*leaves))
        return found, list(torch.autograd.grad(found, leaves, pull))

    by_cholesky = gradients()
    for way in ("all", "some"):
        monkeypatch.setattr(reference, "_LOST", 0.0 if way == "all" else 2.0**-50)
        for found, wanted in zip(gradients(), by_cholesky):
            for a, b in zip(found, wanted):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(lambda *args: reference.woodbury(*args), leaves)


def test_gradients_of_collinear_loadings():
    m = collinear(torch.float32, 1e3)
    found, wanted = [], []
    for dtype, gradients in ((torch.float32, found), (torch.float64, wanted)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in m[1:3]]
        gradients += torch.autograd.grad(reference.woodbury(*leaves)[2].sum(), leaves)
    for a, b in zip(found, wanted):
        assert ((a.double() - b).norm() / b.norm()).item() < 64 * torch.finfo(torch.float32).eps * 1e3


@pytest.mark.parametrize("length", [1e3, 1e7, 1e9])
def test_no_component_is_lost_to_collinear_loadings(backend, length):
    """A determinant that float64 does not have is off by nats, on every machine; nothing is NaN on any."""
    m = collinear(torch.float32, length)
    rows, cholesky, log_det = torch.ops.mfa_kernels.factors(*m[:3])
    assert rows.isfinite().all()
    assert cholesky.isfinite().all()
    assert (cholesky.diagonal(dim1=-2, dim2=-1) >= 1).all()
    wanted = log_det_by_singular_values(m)
    torch.testing.assert_close(log_det.double(), wanted, rtol=1e-5, atol=1e-3 if length == 1e3 else 0.05 * length**0.5)
    torch.testing.assert_close(log_det[1::2].double(), wanted[1::2], rtol=1e-6, atol=1e-4)

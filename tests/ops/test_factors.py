from __future__ import annotations

import pytest
import torch

from mfa_kernels.ops.factors import reference
from mfa_kernels.ops.factors.op import unpack_rows
from tests.mixtures import mixture

SHAPES = [(1, 1, 1), (3, 7, 0), (5, 16, 1), (4, 33, 5), (67, 71, 10), (3, 130, 17), (2, 40, 40)]


def inputs(m):
    return m.means, m.loadings, m.noise_variance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.usefixtures("poisoned")
def test_matches_the_formula(backend, shape, per_component, dtype):
    m = mixture(*shape, per_component=per_component, dtype=dtype)
    rows, cholesky, log_det = torch.ops.mfa_kernels.factors(*inputs(m))
    wide = m.to(torch.float64)
    a, lower, wanted_log_det = reference.factors(wide.loadings, wide.noise_variance)
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
    leaves = [t.clone().requires_grad_() for t in inputs(m)]
    assert torch.autograd.gradcheck(torch.ops.mfa_kernels.factors, leaves)


@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_opcheck(backend, per_component):
    m = mixture(3, 21, 2, per_component=per_component)
    leaves = [t.clone().requires_grad_() for t in inputs(m)]
    torch.library.opcheck(torch.ops.mfa_kernels.factors.default, leaves)


def test_strided_parameters(backend):
    m = mixture(5, 19, 3)
    expected = torch.ops.mfa_kernels.factors(*inputs(m))
    strided = (
        m.means.t().contiguous().t(),
        m.loadings.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([m.noise_variance, m.noise_variance])[:, ::1][0],
    )
    for found, wanted in zip(torch.ops.mfa_kernels.factors(*strided), expected, strict=True):
        assert torch.equal(found, wanted)


def test_tiny_noise_and_large_loadings(backend):
    m = mixture(4, 50, 3, dtype=torch.float32)
    m = m._replace(noise_variance=m.noise_variance * 1e-6, loadings=m.loadings * 1e2)
    _, _, log_det = torch.ops.mfa_kernels.factors(*inputs(m))
    wide = m.to(torch.float64)
    covariance = wide.loadings @ wide.loadings.mT + torch.diag(wide.noise_variance)
    torch.testing.assert_close(log_det.double(), torch.logdet(covariance), rtol=1e-5, atol=1e-3)


def test_nearly_collinear_loadings(backend):
    """Products in the dtype alone lose the definiteness of M; what is found must be what float64 finds."""
    m = mixture(3, 64, 4, dtype=torch.float64)
    base = m.loadings[..., :1]
    loadings = 1e3 * (base + 1e-3 * m.loadings)
    m = m._replace(loadings=loadings).to(torch.float32)
    if backend == "portable":
        pytest.skip(
            "not applicable: plain PyTorch factorises in the dtype of the parameters, and says so where it fails"
        )
    _, _, log_det = torch.ops.mfa_kernels.factors(*inputs(m))
    _, _, wanted = reference.factors(m.loadings.double(), m.noise_variance.double())
    torch.testing.assert_close(log_det.double(), wanted, rtol=1e-5, atol=1e-2)

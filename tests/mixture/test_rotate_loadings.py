"""Varimax and principal rotations: the density keeps, the criterion rises, planted structure is found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA, fit, kmeans
from mfa_kernels.fitting import start_from_clusters
from mfa_kernels.mixture import rotate_loadings
from mfa_kernels.mixture.rotate_loadings import principal, sign_, varimax
from tests.helpers.mixtures import mixture, tokens

ROTATIONS = [varimax, principal]


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _orthogonal(components: int, rank: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(_normal(components, rank, rank, seed=seed))[0]


def _sparse(components: int, features: int, rank: int, seed: int = 2) -> Tensor:
    """Every feature loads on one column alone."""
    owner = torch.randint(rank, (components, features, 1), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(components, features, rank, dtype=torch.float64).scatter_(
        2, owner, _normal(components, features, 1, seed=seed).sign() + 0.1 * _normal(components, features, 1, seed=3)
    )


def _criterion(loadings: Tensor) -> Tensor:
    squares = loadings.square()
    return (squares.square().mean(1) - squares.mean(1).square()).sum(-1)


def _varimax_by_planes(loadings: Tensor, sweeps: int = 60) -> Tensor:
    """Kaiser's own algorithm for one component: the best angle in each plane of two columns, in turn."""
    rotated = loadings.clone()
    features, rank = rotated.shape
    for _ in range(sweeps):
        for i in range(rank):
            for j in range(i + 1, rank):
                x, y = rotated[:, i], rotated[:, j]
                u, v = x * x - y * y, 2 * x * y
                numerator = 2 * (u @ v - u.sum() * v.sum() / features)
                denominator = (u @ u - v @ v) - (u.sum() ** 2 - v.sum() ** 2) / features
                angle = math.atan2(numerator, denominator) / 4
                cosine, sine = math.cos(angle), math.sin(angle)
                rotated[:, i], rotated[:, j] = cosine * x + sine * y, cosine * y - sine * x
    return rotated


@pytest.mark.parametrize("rotate", ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_covariance_is_kept(rotate, dtype):
    loadings = _normal(5, 37, 6, dtype=dtype)
    rotated = rotate(loadings)
    assert rotated.dtype == dtype
    assert not torch.allclose(rotated, loadings, atol=0.1)
    error = (rotated.double() @ rotated.double().mT - loadings.double() @ loadings.double().mT).abs().amax()
    assert error < 300 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_half_precision_and_views(rotate):
    wide = _normal(3, 4, 20, dtype=torch.float32)
    half = wide.bfloat16().mT  # not contiguous
    assert rotate(half).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(half).float(), rotate(half.float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rotate", ROTATIONS)
@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_to_rotate(rotate, rank):
    loadings = _normal(3, 8, rank)
    rotated = rotate(loadings)
    assert torch.equal(rotated.abs(), loadings.abs())
    assert rank == 0 or rotated.data_ptr() != loadings.data_ptr()


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_signs(rotate):
    rotated = rotate(_normal(4, 30, 5))
    largest = rotated.gather(1, rotated.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(rotate(-_normal(4, 30, 5)), rotated)


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_chunks_equal_the_whole(rotate, monkeypatch):
    loadings = _normal(7, 24, 4)
    whole = rotate(loadings)
    monkeypatch.setattr(rotate_loadings, "_CHUNK_BYTES", 3 * 6 * 8 * 24 * 4)  # three components, then three, then one
    parts = []
    measure = rotate_loadings._signed
    monkeypatch.setattr(rotate_loadings, "_signed", lambda chunk: (parts.append(len(chunk)), measure(chunk))[1])
    torch.testing.assert_close(rotate(loadings), whole, rtol=1e-9, atol=1e-9)
    assert parts == [3, 3, 1]


@pytest.mark.parametrize("iterations", [1, 2, 5, 50])
def test_varimax_criterion_never_falls(iterations):
    loadings = _normal(64, 9, 5)  # few features: many local maxima
    before, after = _criterion(loadings), _criterion(varimax(loadings, iterations))
    assert (after >= before * (1 - 1e-12)).all()
    if iterations == 50:
        assert (after > 1.1 * before).float().mean() > 0.9


def test_varimax_equals_kaisers_planes():
    loadings = _sparse(4, 60, 5) @ _orthogonal(4, 5) + 0.2 * _normal(4, 60, 5, seed=7)
    ours = _criterion(varimax(loadings, 500, 1e-12))
    planes = _criterion(torch.stack([_varimax_by_planes(w) for w in loadings]))
    torch.testing.assert_close(ours, planes, rtol=1e-6, atol=0)


def test_varimax_recovers_planted_loadings():
    planted = _sparse(6, 80, 5)
    found = varimax(planted @ _orthogonal(6, 5))
    overlap = (planted.mT @ found).abs() / planted.norm(dim=1).unsqueeze(2)
    overlap = overlap / found.norm(dim=1).unsqueeze(1)  # |cosine| of planted and found columns
    assert (overlap.amax(2) > 0.9999).all()
    assert (overlap.amax(1) > 0.9999).all()  # a permutation: every found column is one of the planted
    assert overlap.sum().item() < 1.2 * 6 * 5


def test_varimax_of_any_magnitude():
    loadings = _normal(1, 40, 4, dtype=torch.float32)
    scales = torch.tensor([1e-20, 1.0, 1e15]).view(3, 1, 1)
    unscaled = varimax(loadings * scales) / scales
    torch.testing.assert_close(unscaled, unscaled[1:2].expand(3, -1, -1), rtol=1e-4, atol=1e-4)


def test_varimax_of_zeros_beside_others():
    loadings = _normal(3, 20, 4)
    alone = varimax(loadings[2:])
    loadings[0] = 0
    loadings[1, :, 1:] = 0
    rotated = varimax(loadings)
    assert (rotated[0] == 0).all()
    torch.testing.assert_close(rotated[1] @ rotated[1].mT, loadings[1] @ loadings[1].mT)
    torch.testing.assert_close(rotated[2:], alone)


def test_principal_columns():
    loadings = _normal(5, 30, 6)
    rotated = principal(loadings @ _orthogonal(5, 6))
    gram = rotated.mT @ rotated
    variance = gram.diagonal(dim1=1, dim2=2)
    assert (gram - torch.diag_embed(variance)).abs().amax() < 1e-10
    torch.testing.assert_close(variance, torch.linalg.svdvals(loadings).square())  # falling
    torch.testing.assert_close(rotated, principal(loadings))  # a canonical form


def test_same_bits():
    loadings = _normal(5, 30, 6, dtype=torch.float32)
    for rotate in ROTATIONS:
        assert torch.equal(rotate(loadings), rotate(loadings))


@pytest.mark.parametrize("method", ["varimax", "principal"])
def test_mfa_rotate_keeps_the_density(method):
    m = mixture(5, 16, 4, dtype=torch.float64)
    mfa = MFA.from_parameters(*m[:3], m.log_weights.exp())
    x = tokens(m, 40)
    with torch.no_grad():
        before, loadings = mfa.log_prob(x), mfa.loadings.clone()
        assert mfa.rotate(method) is mfa
        assert not torch.allclose(mfa.loadings, loadings, atol=1e-2)
        torch.testing.assert_close(mfa.log_prob(x), before, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_bad_loadings(rotate):
    with pytest.raises(ValueError, match=r"loadings must have shape \(K, D, R\), got \(4, 3\)"):
        rotate(torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"loadings must have a floating-point dtype, got torch.int64"):
        rotate(torch.zeros(2, 4, 3, dtype=torch.int64))
    loadings = _normal(3, 8, 2)
    loadings[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match="loadings must be finite"):
        rotate(loadings)


def test_bad_settings():
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        varimax(_normal(1, 4, 2), 0)
    with pytest.raises(ValueError, match="tol must be >= 0, got nan"):
        varimax(_normal(1, 4, 2), tol=math.nan)


@pytest.mark.parametrize("noise", ["shared", "per_component"])
@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_latents_of_a_fit_have_the_sign_of_their_largest_loading(method: str, noise: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(800, 6, generator=g) @ torch.randn(6, 9, generator=g)
    clusters = kmeans(x, 5, progress=False).centroids
    made = [start_from_clusters(x, clusters, 3, noise, init=init, progress=False) for init in ("pca", "random")]
    made.append(fit(x, 5, 3, method=method, noise=noise, epochs=2, progress=False))
    for mfa in made:
        w = mfa.loadings.detach()
        assert (w.gather(1, w.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.usefixtures("backend")
def test_signs_change_no_bit_of_a_density() -> None:
    m = mixture(7, 33, 4, per_component=False, spread=0.5)
    mfa, x = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()), tokens(m, 50)
    before, held = mfa.log_prob(x), mfa.loadings.detach().clone()
    sign_(mfa.loadings)
    assert not torch.equal(mfa.loadings, held)
    assert torch.equal(mfa.loadings.abs(), held.abs())
    assert torch.equal(mfa.log_prob(x), before)

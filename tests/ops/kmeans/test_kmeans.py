from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels.ops.kmeans import basis as basis_module
from mfa_kernels.ops.kmeans import op, portable, reference
from mfa_kernels.ops.kmeans.basis import fitting_width, leading_directions
from mfa_kernels.ops.kmeans.op import cluster_sums, nearest, screened
from mfa_kernels.ops.kmeans.types import ClusterSums
from tests.helpers import budgets
from tests.helpers.threads import threads

# (N, K, D): rows in tasks of 32 and tiles of 8, centroids in tiles of 48 (24 in float64), features in vectors of 16
# and sums of 256
SHAPES = [(1, 1, 1), (101, 3, 5), (107, 150, 40), (130, 400, 97), (69, 53, 800), (9, 48, 16)]


def rows(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def clustered(n: int, clusters: int, d: int, dtype: torch.dtype = torch.float32, spread: float = 0.3):
    """Rows whose variance falls off along the features, their centroids, and a centre."""
    scale = torch.arange(1, d + 1, dtype=torch.float64).rsqrt()
    centroids = rows(clusters, d, 1, torch.float64) * scale
    x = centroids[torch.arange(n) % clusters] + spread * rows(n, d, 2, torch.float64) * scale
    center = rows(1, d, 3, torch.float64)[0] * 10
    return (x + center).to(dtype), centroids.to(dtype), center.to(dtype)


def axes(features: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A basis that is no better than another: any is allowed."""
    return torch.linalg.qr(rows(features, features, 4, torch.float64)).Q[:, :width].to(dtype)


def check(x: Tensor, centroids: Tensor, center: Tensor, owner: Tensor, distance: Tensor) -> None:
    """The owners are those of float64, or as near but for the rounding of a distance by difference."""
    v = x - center  # the rows, as the dtype has them
    gaps = (v.double().unsqueeze(1) - centroids.double()).square()
    exact = gaps.sum(-1)
    best = exact.min(1).values
    chosen = exact.gather(1, owner.unsqueeze(1)).squeeze(1)
    error = budgets.ROUNDINGS * torch.finfo(x.dtype).eps * best
    assert ((chosen - best) <= 2 * error).all()
    assert ((distance.double() - chosen).abs() <= error).all()
    separate = (exact.topk(min(2, len(centroids)), largest=False).values.diff(dim=1) > 2 * error.unsqueeze(1)).any(1)
    separate |= torch.tensor(len(centroids) == 1)
    assert torch.equal(owner[separate], exact.argmin(1)[separate])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.usefixtures("poisoned")
def test_nearest_is_the_definition(backend, shape, dtype, monkeypatch):
    monkeypatch.setitem(portable.TILE_ELEMENTS, "cpu", 1)  # tiles of 64 rows
    n, k, d = shape
    x, centroids, center = clustered(n, k, d, dtype, spread=2.0)
    owner, distance = nearest(x, centroids, center)
    assert (owner.dtype, distance.dtype) == (torch.int64, dtype)
    if dtype == torch.float64:
        expected, least = reference.nearest(x, centroids, center)
        assert torch.equal(owner, expected)
        torch.testing.assert_close(distance, least, rtol=1e-12, atol=1e-12)
    elif backend == "cpp":
        check(x, centroids, center, owner, distance)
    else:  # the expanded square decides: its rounding is that of the norms
        _, least = reference.nearest(x.double(), centroids.double(), center.double())
        torch.testing.assert_close(distance.double(), least, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [16, 32, 48, 96, 112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.usefixtures("poisoned", "needs_cpp")
def test_a_basis_changes_nothing_but_the_pairs(width, dtype):
    x, centroids, center = clustered(333, 200, 130, dtype)
    owner, distance, pairs = screened(x, centroids, center)
    check(x, centroids, center, owner, distance)
    assert pairs < 1.1 * len(x)
    for basis in (axes(130, width, dtype), torch.eye(130, dtype=dtype)[:, :width]):
        found = screened(x, centroids, center, basis)
        assert torch.equal(found[0], owner)
        assert torch.equal(found[1], distance)
        assert len(x) <= found[2] <= len(x) * len(centroids)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("width", [None, 16])
@pytest.mark.usefixtures("needs_cpp")
def test_where_the_expanded_square_would_fail(offset, width):
    """Centroids far from the origin, some of them almost the same, rows on top of them."""
    _, centroids, _ = clustered(1, 90, 70)
    centroids = centroids + offset
    centroids[60:] = centroids[:30] * (1 + 2e-7 * torch.arange(30).unsqueeze(1))
    x = centroids[torch.arange(400) % 90] + 1e-3 * rows(400, 70)
    x[:90] = centroids
    basis = None if width is None else axes(70, width)
    owner, distance, _ = screened(x, centroids, torch.zeros(70), basis)
    check(x, centroids, torch.zeros(70), owner, distance)
    assert (distance[:90] == 0).all()


@pytest.mark.usefixtures("needs_cpp")
def test_outlier_features_and_a_huge_centroid():
    x, centroids, center = clustered(300, 100, 64)
    x[:, 7] *= 1e4
    centroids[:, 7] *= 1e4
    centroids[13] = 1e19
    for basis in (None, axes(64, 32)):
        owner, distance, _ = screened(x, centroids, center, basis)
        keep = torch.arange(100) != 13
        check(x, centroids[keep], center, owner - (owner > 13).long(), distance)
    huge = torch.full((1, 64), 1e19) + center
    owner, _, _ = screened(huge, centroids, center, axes(64, 32))  # |x|^2 is past float32, the distance is not
    assert owner.tolist() == [13]


def test_equal_distances_go_to_the_first(backend):
    centroids = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).repeat(30, 1)
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
    owner, distance = nearest(x, centroids)
    assert owner.tolist() == [1, 1, 0]
    assert distance.tolist() == [1, 0, 16]


def test_rows_that_are_not_finite(backend):
    x, centroids, center = clustered(80, 60, 50)
    clean, least = nearest(x, centroids, center)
    x[3, 49], x[40, 0], x[79] = torch.nan, torch.inf, torch.nan
    owner, distance = nearest(x, centroids, center)
    lost = torch.tensor([3, 40, 79])
    clean[lost], least[lost] = 60, torch.nan
    assert torch.equal(owner, clean)
    torch.testing.assert_close(distance, least, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("needs_cpp")
def test_the_same_bits_whatever_the_threads_and_the_batch():
    x, centroids, center = clustered(500, 100, 96)
    whole = screened(x, centroids, center, axes(96, 32))
    weights = rows(500, 1, dtype=torch.float64)[:, 0].abs()

    def sums() -> ClusterSums:
        out = ClusterSums.zeros(centroids)
        cluster_sums(x, center, whole[0], whole[1], weights, out)
        return out

    before = sums()
    with threads(torch.get_num_threads() + 2):
        again, after = screened(x, centroids, center, axes(96, 32)), sums()
    assert all(torch.equal(a, b) for a, b in zip((*whole[:2], *before), (*again[:2], *after)))
    assert whole[2] == again[2]
    parts = [nearest(part, centroids, center) for part in x.split(77)]
    assert torch.equal(torch.cat([owner for owner, _ in parts]), whole[0])
    assert torch.equal(torch.cat([distance for _, distance in parts]), whole[1])


def test_no_rows_strides_and_halves(backend):
    x, centroids, center = clustered(50, 20, 33)
    owner, distance = nearest(x[:0], centroids, center)
    assert owner.shape == distance.shape == (0,)
    wide = torch.stack([x, x], dim=2)[:, :, 0]
    assert torch.equal(nearest(wide, centroids.t().contiguous().t(), center)[0], nearest(x, centroids, center)[0])
    half = x.bfloat16()
    assert torch.equal(nearest(half, centroids, center)[0], nearest(half.float(), centroids, center)[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_cluster_sums(backend, weighted):
    x, _, center = clustered(301, 7, 37)
    owner = torch.arange(301) % 11  # of 9 clusters: 9 own the last two kinds of row
    owner[owner == 4] = 5  # one owns nothing
    owner.clamp_(max=9)
    x[owner == 9] = torch.nan
    distance = torch.where(owner < 9, rows(301, 1)[:, 0].square(), 0)
    weights = rows(301, 1, 5, torch.float64)[:, 0].square() if weighted else None
    out = ClusterSums(torch.ones(9, 37).double(), torch.ones(9).double(), torch.ones(9).double())
    cluster_sums(x, center, owner, distance, weights, out)
    ones = torch.ones(301, dtype=torch.float64) if weights is None else weights
    expected = reference.cluster_sums(x.double(), center.double(), owner, distance.double(), ones, 9)
    for found, sums in zip(out, expected):
        torch.testing.assert_close(found - 1, sums, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("needs_cpp")
def test_leading_directions():
    x, centroids, center = clustered(600, 40, 200)
    x[5] = torch.nan
    basis = leading_directions(x, center)
    assert basis.shape == (200, 96)
    torch.testing.assert_close(basis.T @ basis, torch.eye(96), atol=1e-5, rtol=0)
    values = torch.linalg.eigvalsh(torch.cat([x[:5], x[6:]]).sub(center).T.cov().double())
    share = (torch.cat([x[:5], x[6:]]).sub(center) @ basis[:, :16]).var(0).sum() / values.sum()
    assert share > 0.97 * values[-16:].sum() / values.sum()
    chosen = fitting_width(basis, x, centroids, center)
    assert chosen is None or chosen.shape[1] in basis_module.WIDTHS
    assert leading_directions(x[:, :20], center[:20]) is None, "too few features"
    assert leading_directions(x[:50], center) is None, "too few rows"


@pytest.mark.usefixtures("needs_cpp")
def test_a_basis_is_used_where_it_pays():
    x, centroids, center = clustered(3000, 500, 256, spread=0.1)
    assert fitting_width(leading_directions(x, center), x, centroids, center) is not None
    noise, points = rows(600, 256), rows(500, 256, 1)  # all directions alike: nothing to gain
    assert fitting_width(axes(256, 96), noise, points, torch.zeros(256)) is None


def test_opcheck(backend):
    x, centroids, center = clustered(9, 4, 20)
    torch.library.opcheck(torch.ops.mfa_kernels.nearest.default, (x, centroids, center, axes(20, 16)))
    owner, distance = nearest(x, centroids, center)
    out = ClusterSums.zeros(centroids)
    torch.library.opcheck(torch.ops.mfa_kernels.cluster_sums.default, (x, center, owner, distance, None, *out))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"centroids": torch.zeros(0, 5)}, ValueError, r"centroids must have shape \(K, D\) with K >= 1, got \(0, 5\)"),
        ({"centroids": torch.zeros(3, 5).half()}, TypeError, "centroids must be float32 or float64, got torch.float16"),
        ({"x": torch.zeros(4, 6)}, ValueError, r"x must have shape \(N, D\) = \(N, 5\), got \(4, 6\)"),
        ({"center": torch.zeros(4)}, ValueError, r"center must have shape \(D,\) = \(5,\), got \(4,\)"),
        ({"basis": torch.zeros(4, 2)}, ValueError, r"basis must have shape \(D, P\) = \(5, P\), got \(4, 2\)"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        op.nearest(**{"x": torch.zeros(4, 5), "centroids": torch.zeros(3, 5), **arguments})

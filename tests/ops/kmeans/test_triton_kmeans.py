"""K-means on a GPU: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from mfa_kernels import kmeans
from mfa_kernels.ops.common import configs
from mfa_kernels.ops.kmeans import op, portable, triton_clusters, triton_nearest
from mfa_kernels.ops.kmeans import reference as oracle
from mfa_kernels.ops.kmeans.types import ClusterSums
from tests.helpers import budgets

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps

# (N, K, D): with the tiles below, rows, centroids, centroids of a band and features take three tiles and a ragged tail.
SHAPES = [(53, 103, 50), (53, 5, 50), (50, 1, 50), (17, 40, 1), (1, 103, 50)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_nearest, "BANDS", 2)
    monkeypatch.setattr(triton_nearest, "_EVERY", {"BN": 2, "BK": 2, "BD": 16})
    monkeypatch.setattr(triton_nearest, "_LARGEST_BLOCK", 16)
    monkeypatch.setattr(triton_clusters, "_FEATURES", 16)
    monkeypatch.setattr(triton_clusters, "_WARPS", 1)
    monkeypatch.setattr(triton_clusters, "_ROWS", 4)
    with configs.override(configs.Nearest(16, 16, 16, 4, 2, swizzle=2)):
        yield


@pytest.fixture
def overflows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of each call were compared with every centroid."""
    counts: list[int] = []
    kernel = triton_nearest.every_kernel

    class Counting:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                counts.append(int(arguments[4]))
                return kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(triton_nearest, "every_kernel", Counting())
    return counts


def rows(shape: tuple[int, int, int], spread: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Rows, centroids and a centre; a row lies about one unit from its own centroid."""
    count, clusters, features = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    centroids, center = spread * normal(clusters, features), 3 * normal(features)
    x = centroids[torch.randint(clusters, (count,), generator=generator)] + normal(count, features) + center
    return x.to(DEVICE, dtype), centroids.to(DEVICE), center.to(DEVICE)


def check(x: Tensor, centroids: Tensor, center: Tensor) -> Tensor:
    """Nobody is nearer than the owner, but for the rounding of float32 differences; distances are as good as theirs."""
    owner, distance = triton_nearest.nearest(x, centroids, center)
    assert (owner.dtype, distance.dtype) == (torch.int64, torch.float32)
    gap = x.double().unsqueeze(1) - center.double() - centroids.double()
    exact = gap.square().sum(-1)  # (N, K)
    each = torch.arange(len(x), device=x.device)
    # y = x - center is rounded once: what that moves a distance by
    moved = ((x.double() - center.double()).abs() * gap[each, owner].abs()).sum(1)
    terms = exact[each, owner] + moved
    assert (exact[each, owner] - exact.amin(1) <= 2 * budgets.ROUNDINGS * EPS * terms).all()
    budgets.check(distance, exact[each, owner], terms)
    return owner


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_the_definition(shape):
    x, centroids, center = rows(shape, 3.0)
    plain, _ = portable.nearest(x, centroids, center)
    assert torch.equal(check(x, centroids, center), plain)


@pytest.mark.usefixtures("poisoned")
def test_clusters_that_overlap(overflows):
    check(*rows((17, 103, 50), 0.3))
    assert overflows == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_it_reads_halves(dtype):
    check(*rows((17, 40, 50), dtype=dtype))


def test_without_tensor_descriptors():
    case = rows((17, 40, 50))
    expected = triton_nearest.nearest(*case)
    with configs.override(configs.Nearest(16, 16, 16, 4, 2, swizzle=2, descriptors=False)):
        found = triton_nearest.nearest(*case)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.usefixtures("poisoned")
def test_closer_than_half_precision_can_tell(overflows):
    """Pairs of centroids that differ by 1e-5 of their length: the exact distances decide, for few rows or all."""
    x, centroids, center = rows((30, 26, 50), 3.0)
    generator = torch.Generator().manual_seed(7)
    twins = centroids * (1 + 1e-5 * torch.randn(centroids.shape, generator=generator).to(DEVICE))
    owner = check(x, torch.cat([centroids, twins]), center)
    assert 5 < int((owner < 26).sum()) < 25, "the twin is nearer about as often"
    assert overflows == [0]


@pytest.mark.parametrize("k", [29, 3])
@pytest.mark.usefixtures("poisoned")
def test_more_contenders_than_there_is_room_for(overflows, k, monkeypatch):
    """All centroids within 1e-4 of one another: every row is compared with each."""
    monkeypatch.setattr(triton_nearest, "CONTENDERS", 2)
    x, centroids, center = rows((7, k, 50), 1e-4)
    check(x, centroids + 1, center)
    assert overflows == [7]


def test_of_equal_distances_the_lowest_index(overflows):
    x, centroids, center = rows((7, 10, 50), 3.0)
    expected = triton_nearest.nearest(x, centroids, center)
    found = triton_nearest.nearest(x, centroids.repeat(3, 1), center)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert overflows == [0, 0]
    found, _ = triton_nearest.nearest(x, centroids[:1].repeat(20, 1), center)
    assert (found == 0).all()
    assert overflows[-1] == 7


def test_a_row_that_is_a_centroid():
    _, centroids, center = rows((1, 40, 50), 3.0)
    center = torch.zeros_like(center)
    owner, distance = triton_nearest.nearest(centroids, centroids, center)
    assert owner.tolist() == list(range(40))
    assert (distance == 0).all()


def test_lengths_of_all_magnitudes(overflows):
    """A few rows and centroids are 1e4 times as long as the rest, some are zero: bounds stay tight for the others."""
    x, centroids, center = rows((20, 40, 50), 3.0)
    center = torch.zeros_like(center)
    scale = torch.ones(40, 1, device=DEVICE)
    scale[3], scale[7], scale[11] = 1e4, 0, 1e-4
    x[5], x[6], x[8] = 1e4 * centroids[3], 0, 1e18
    check(x, scale * centroids, center)
    assert overflows == [0]


@pytest.mark.usefixtures("poisoned")
def test_rows_that_are_not_finite(overflows):
    x, centroids, center = rows((20, 40, 50))
    expected = triton_nearest.nearest(x, centroids, center)
    bad = torch.zeros(20, dtype=torch.bool, device=DEVICE)
    bad[[4, 9, 19]] = True
    x[4, 7], x[9], x[19, 0] = math.nan, math.inf, 1e30  # the last: its square overflows
    owner, distance = triton_nearest.nearest(x, centroids, center)
    assert (owner[bad] == 40).all()
    assert distance[bad].isnan().all()
    assert torch.equal(owner[~bad], expected[0][~bad])
    assert torch.equal(distance[~bad], expected[1][~bad])
    assert overflows == [0, 0], "nothing is gained by comparing them with every centroid"
    plain, _ = portable.nearest(x, centroids, center)
    assert torch.equal(plain[bad], owner[bad])


def test_no_rows():
    x, centroids, center = rows((3, 5, 50))
    owner, distance = triton_nearest.nearest(x[:0], centroids, center)
    assert (owner.shape, distance.shape) == ((0,), (0,))


# Sums by cluster


def outputs(k: int, d: int) -> ClusterSums:
    """Filled: the kernel adds."""
    generator = torch.Generator().manual_seed(9)
    shapes = (k, d), (k,), (k,)
    return ClusterSums(*(torch.randn(*s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_cluster_sums(weighted, dtype):
    """Cluster 0 owns most rows, 2 none, and two rows are nobody's."""
    x, _, center = rows((40, 7, 50), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    owner = torch.randint(3, 7, (40,), generator=generator).to(DEVICE)
    owner[::2], owner[1], owner[[3, 8]] = 0, 1, 7
    distance = torch.rand(40, generator=generator).to(DEVICE)
    distance[[3, 8]] = math.nan
    weights = torch.rand(40, generator=generator, dtype=torch.float64).to(DEVICE) if weighted else None
    before, found = outputs(7, 50), outputs(7, 50)
    triton_clusters.cluster_sums(x, center, owner, distance, weights, found)
    w = torch.ones(40, dtype=torch.float64, device=DEVICE) if weights is None else weights
    one_hot = torch.nn.functional.one_hot(owner, 8)[:, :7].double()
    y = x.double() - center.double()
    exact = [(one_hot * w[:, None]).T @ y, one_hot.T @ w, one_hot.T @ (w * distance.double().nan_to_num(0))]
    terms = (one_hot * w[:, None]).T @ y.abs()
    change = [f - b for f, b in zip(found, before)]
    assert ((change[0] - exact[0]).abs() <= 3 * EPS * terms + 1e-14).all()
    torch.testing.assert_close(change[1:], exact[1:], rtol=1e-12, atol=1e-13)
    assert torch.equal(found[0][2], before[0][2])


def test_cluster_sums_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    x, _, center = rows((4, 3, 20))
    owner, distance = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.zeros(4, device=DEVICE)
    out = outputs(3, 20)
    for name, arguments, error in (
        ("owner", (x, center, owner[:3], distance, None, out), ValueError),
        ("weights", (x, center, owner, distance, out.mass, out), ValueError),
        ("sums", (x, center, owner, distance, None, out._replace(sums=out.sums[:, :19])), ValueError),
        ("mass", (x, center, owner, distance, None, out._replace(mass=out.mass.float())), TypeError),
        ("inertia", (x, center, owner, distance, None, out._replace(inertia=out.inertia[:2])), ValueError),
    ):
        with pytest.raises(error, match=f"^cluster_sums: {name} must"):
            op.cluster_sums(*arguments)


# Both as operators


def test_opcheck(monkeypatch):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    x, centroids, center = rows((3, 2, 5))
    torch.library.opcheck(torch.ops.mfa_kernels.nearest.default, (x, centroids, center))
    owner, distance = op.nearest(x, centroids, center)
    expected, _ = oracle.nearest(x, centroids, center)
    assert torch.equal(owner, expected)
    operator = torch.ops.mfa_kernels.cluster_sums.default
    torch.library.opcheck(operator, (x, center, owner, distance, None, *outputs(2, 5)))


def test_same_bits_twice():
    case = rows((17, 20, 20), 0.3)
    runs = []
    for _ in range(2):
        owner, distance = triton_nearest.nearest(*case)
        sums = outputs(20, 20)
        triton_clusters.cluster_sums(case[0], case[2], owner, distance, None, sums)
        runs.append([owner, distance, *sums])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_k_means_as_a_whole(monkeypatch):
    """The same clusters as on plain PyTorch, in float32."""
    x, centroids, _ = rows((30, 4, 20), 3.0)
    options = {"init": centroids, "iterations": 2, "progress": False}
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "portable")
    expected = kmeans(x, 4, **options)
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    found = kmeans(x, 4, **options)
    assert torch.equal(found.assignment, expected.assignment)
    torch.testing.assert_close(found.centroids, expected.centroids, rtol=1e-5, atol=1e-5)


def test_with_the_tiles_of_a_gpu(monkeypatch):
    monkeypatch.undo()
    architecture = 80 if DEVICE == "cpu" else 10 * torch.cuda.get_device_capability()[0]
    with configs.override(configs.default(configs.Nearest, architecture, 16384, 8192)):
        x, centroids, center = rows((390, 1100, 70), 3.0)
        owner = check(x, centroids, center)
    owner, sums, before = owner[:40] % 3, outputs(3, 70), outputs(3, 70)
    triton_clusters.cluster_sums(x[:40], center, owner, torch.ones(40, device=DEVICE), None, sums)
    y = x[:40].double() - center.double()
    for k in range(3):
        torch.testing.assert_close((sums[0] - before[0])[k], y[owner == k].sum(0), rtol=1e-5, atol=1e-4)

"""A mixture from clusters: the paper's random loadings, or probabilistic PCA of every cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common import checks
from mfa_kernels.common.modes import door
from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.data.source import as_source
from mfa_kernels.fitting.kmeans import KMeansResult
from mfa_kernels.fitting.kmeans.lloyd import Partition, Rows, chunks, partition
from mfa_kernels.fitting.row_weights import check_weights
from mfa_kernels.fitting.start_from_mixture import blank_mixture
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.mixture.rotate_loadings import sign_
from mfa_kernels.mixture.sharded import part_of
from mfa_kernels.ops.common.segments import segment_sums

INITS = ("pca", "random")
_NOISE_FLOOR = 1e-6  # share of the median noise variance that is left to constant dimensions, for a density
_LEAST_UNIQUE = 0.01  # share of a dimension's variance within clusters that is noise at least
_PRIOR_ROWS = 30  # rows that the pooled noise is worth in that of a component (the best of 10 to 100, held out)
_ROWS_PER_CLUSTER = 4096  # rows that the PCA of a cluster reads at most
_GROUP_ELEMENTS = 1 << 23  # numbers in the rows of the clusters whose PCA runs at once
_OVERSAMPLING = 8
_POWER_ITERATIONS = 3
_PADDING = 0.1  # norm, in units of the noise, of the random columns where a cluster shows no direction


@door
@torch.no_grad()
def start_from_clusters(
    activations: Any,
    clusters: KMeansResult | Tensor,
    rank: int = 10,
    noise: str = "shared",
    *,
    init: str = "pca",
    precision: str = "exact",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
    processes: Processes = ALONE,
    weights: Tensor | None = None,
    assignment: Tensor | None = None,
) -> MFA:
    """A mixture with one region per cluster: what `fit` begins with, and worth many steps by itself.

    Means and weights are those of the clusters (a weight is (n_k + 1) / (N + K), never 0). With "pca", the loadings
    are the leading directions of each cluster, whitened by the variance within clusters, their eigenvalues less the
    noise and shrunk for the rows they were estimated from; n rows show at most n / 2 directions, and the columns left
    over are small random ones. The noise is the variance within clusters that the loadings leave. With "random", the
    loadings are random, of unit expected norm in units of the noise: the paper's start.

    Args:
        activations: (N, D), of any kind that `as_source` takes; rows that are not finite are left out.
        clusters: a `KMeansResult`, or centroids (K, D); rows go to their nearest centroid.
        rank: R.
        noise: "shared" or "per_component".
        init: "pca" or "random".
        precision: of the mixture.
        dtype: of the parameters; that of the centroids when None.
        device: of the mixture; that of the centroids when None.
        seed: of the random columns and of the randomised PCA.
        progress: show a progress bar.
        weights: (N,), finite and non-negative: a row of weight 2 counts as two rows, one of weight 0 not at all.
        assignment: the cluster of each row, (N,) int64; None: that of the nearest centroid.
        processes: processes that share the components: each calls this with the same arguments, all rows among them,
            and gets its own part (`Processes.span`), which `mfa_kernels.mixture.sharded.ShardedMFA` takes. For "pca"
            alone.

    Raises:
        TypeError, ValueError: naming the argument; activations that are all equal among it.
    """
    checks.check_choice(init, INITS, "init")
    if init == "random" and processes.count > 1:
        raise ValueError("init must be 'pca' where processes share the components, got 'random'")
    seed, progress = checks.check_integer(seed, "seed"), checks.check_flag(progress, "progress")
    device = None if device is None else checks.check_device(device)
    if device is not None and device.type == "meta":
        raise ValueError("device must hold values, got meta")
    dtype = None if dtype is None else checks.check_dtype(dtype)
    source = as_source(activations)
    centroids = centroids_of(clusters, source.n_features)
    centroids = centroids.to(device=device or centroids.device, dtype=source.dtype)
    first, stop = part_of(len(centroids), processes)
    shape = stop - first, source.n_features, rank, noise
    mfa = blank_mixture(*shape, precision, centroids.device, dtype or centroids.dtype)
    generator = torch.Generator().manual_seed(seed)

    center = centroids.mean(0)
    if weights is not None:
        weights = check_weights(weights, len(source), "weights").to(centroids.device)
    rows = Rows(source, center, weights, processes)
    if assignment is not None:
        _check_assignment(assignment, len(source), len(centroids))
    part = partition(rows, centroids - center, dtype=mfa.means.dtype, owner_of=assignment)
    if weights is not None:
        part.owner.masked_fill_(weights == 0, len(centroids))
    mass = part.mass
    total = float(mass.sum())
    if not total:
        raise ValueError(f"activations have no finite row among {len(source)}")
    means = torch.where(mass.unsqueeze(1) > 0, part.sums / mass.unsqueeze(1), (centroids - center).double())
    data_mean = part.sums.sum(0) / total
    means = means.to(centroids)
    variance, own_variance = _residual_variance(rows, part, means, noise == "per_component")
    between = float(((means - data_mean).square() * mass.unsqueeze(1)).sum()) / (total * source.n_features)
    varying = variance[variance > 0]
    level = float(varying.median()) if len(varying) else between
    if not level > 0:
        raise ValueError(
            f"activations do not vary: all the {int(total)} finite rows are equal, or differ by less than what "
            f"{means.dtype} can square: look at their scale"
        )
    floor = _NOISE_FLOOR * level
    variance = variance.clamp_min(2 * floor)
    if init == "pca" and rank:
        try:
            loadings = _cluster_pca(rows, part, means, variance, rank, generator, progress)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"activations are too small or too large for {means.dtype}: look at their scale"
            ) from error
        psi = _noise(variance, own_variance, loadings, mass, 2 * floor, processes)
    else:
        loadings = torch.randn(mfa.loadings.shape, generator=generator).to(centroids)
        loadings *= (variance / source.n_features).sqrt().unsqueeze(-1)
        psi = _noise(variance, own_variance, None, mass, 2 * floor, processes)

    mfa.noise_floor = floor
    mfa.means.copy_(means[first:stop] + center)
    mfa.loadings.copy_(loadings)
    sign_(mfa.loadings)
    mfa.log_noise.copy_((psi - floor).log())
    mfa.weight_logits.copy_(((mass[first:stop] + 1) / (total + len(mass))).log())
    mfa.center.copy_(data_mean + center)
    return mfa


def _check_assignment(assignment: Tensor, rows: int, clusters: int) -> None:
    found = checks.check_tensor(assignment, "assignment")
    if found.dtype != torch.long or found.shape != (rows,):
        raise ValueError(f"assignment must be int64 of shape (N,) = ({rows},), got {found.dtype} {tuple(found.shape)}")
    if not 0 <= int(found.min()) <= int(found.max()) < clusters:
        raise ValueError(f"assignment must be in [0, {clusters}), got {int(found.min())} to {int(found.max())}")


def centroids_of(clusters: KMeansResult | Tensor, n_features: int, n_components: int | None = None) -> Tensor:
    """The centroids (K, D) of clusters; raises where they do not fit."""
    centroids = checks.check_centroids(clusters, "clusters")
    expected = (len(centroids) if n_components is None else n_components, n_features)
    if tuple(centroids.shape) != expected:
        raise ValueError(f"clusters must have centroids (K, D) = {expected}, got {tuple(centroids.shape)}")
    return checks.check_finite(centroids, "clusters")


def _residuals(rows: Rows, part: Partition, means: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A process's rows less the mean of their cluster (n, D), and their clusters (n,), by chunks; those that are owned.

    Times the root of their weights: their products are then what so many rows add up to.
    """
    source, center, weights, processes = rows
    for start, stop in chunks(source, len(means), means.device, processes):
        owner = part.owner[start:stop]
        x = source.chunk(start, stop).to(means)
        owned = owner < len(means)
        if not owned.all():
            x, owner = x[owned], owner[owned]
        gap = (x - center).sub_(means[owner])
        if weights is not None:
            gap *= weights[start:stop][owned].sqrt().to(gap).unsqueeze(1)
        yield gap, owner


def _residual_variance(rows: Rows, part: Partition, means: Tensor, per_component: bool) -> tuple[Tensor, Tensor | None]:
    """Variance within the clusters: pooled (D,), and of each of the process's own clusters (K, D) where wanted."""
    clusters = len(means)
    squares = torch.zeros((clusters if per_component else 1, means.shape[1]), dtype=torch.float64, device=means.device)
    for gap, owner in _residuals(rows, part, means):
        gap.square_()
        squares += segment_sums(gap, owner, clusters) if per_component else gap.sum(0, keepdim=True)
    rows.processes.sum_(squares)
    mass = part.mass.unsqueeze(1)
    total = float(mass.sum())
    # Of weights, unlike of rows, a cluster may have next to none too many.
    least = 1.0 if rows.weights is None else total / 2
    pooled = squares.sum(0) / max(least, total - int((mass > 0).sum()))
    if not per_component:
        return pooled.to(means), None
    own = slice(*rows.processes.span(clusters))
    return pooled.to(means), torch.where(mass[own] > 1, squares[own] / _freedom(mass[own]), pooled).to(means)


def _freedom(mass: Tensor) -> Tensor:
    """Degrees of freedom of the variance of so many rows about their mean; of weights, at least half of them."""
    return torch.maximum(mass - 1, mass / 2)


def _noise(
    variance: Tensor, own_variance: Tensor | None, loadings: Tensor | None, mass: Tensor, least: float,
    processes: Processes,
) -> Tensor:  # fmt: skip
    """The noise variance (D,) or (K, D): what the loadings, where there are any, leave of the variance in clusters.

    That of one component is its own as far as its rows outnumber a prior of the pooled noise: a few rows lie all along
    their leading directions.
    """
    mass = mass.to(variance)
    own = slice(*processes.span(len(mass)))
    share, mass = (mass / mass.sum())[own], mass[own]
    pooled = variance
    if loadings is not None:
        explained = torch.einsum("k,kdr,kdr->d", share, loadings, loadings)
        processes.sum_(explained)
        pooled = torch.maximum(variance - explained, variance * _LEAST_UNIQUE)
    if own_variance is None:
        return pooled.clamp_min(least)
    unique = own_variance
    if loadings is not None:
        unique = torch.maximum(unique - loadings.square().sum(-1), unique * _LEAST_UNIQUE)
    rows = mass.unsqueeze(1)
    return ((rows * unique + _PRIOR_ROWS * pooled) / (rows + _PRIOR_ROWS)).clamp_min(least)


def _groups(counts: Tensor, features: int) -> Iterator[Tensor]:
    """Clusters of at least 3 rows, by size, few enough that their padded rows stay within a bound."""
    order = counts.argsort(descending=True, stable=True)[: int((counts >= 3).sum())]
    sizes = counts[order].tolist()
    start = 0
    while start < len(sizes):
        stop = start + max(1, _GROUP_ELEMENTS // (sizes[start] * features))
        yield order[start:stop]
        start = stop


def _cluster_pca(
    rows: Rows, part: Partition, means: Tensor, variance: Tensor, rank: int, generator: torch.Generator, bars: bool
) -> Tensor:
    """Loadings (K, D, R) of the process's own clusters, by randomised PCA of the rows of each, whitened by
    `variance`."""
    source, center, weights, processes = rows
    like: dict[str, Any] = {"dtype": means.dtype, "device": means.device}
    order = part.owner.argsort(stable=True)
    totals = part.owner.bincount(minlength=len(means) + 1)
    own = slice(*processes.span(len(means)))
    firsts, totals = (totals.cumsum(0) - totals)[own], totals[own]
    means, mass = means[own], part.mass[own]
    clusters, features = means.shape
    counts = totals.clamp_max(_ROWS_PER_CLUSTER)
    width = min(rank + _OVERSAMPLING, features)
    probe = torch.randn(features, width, generator=generator).to(**like)
    directions = torch.zeros(clusters, features, rank, **like)
    eigenvalues = torch.zeros(clusters, rank, **like)
    trace = torch.zeros(clusters, **like)
    observed = counts.double()  # rows, or what they weigh
    scale = variance.rsqrt()
    with progress_bar(total=clusters, desc="cluster PCA", unit="cluster", progress=bars) as bar:
        for group in _groups(counts, features):
            numbers = torch.arange(int(counts[group[0]]), device=order.device)
            is_row = numbers < counts[group].unsqueeze(1)
            # A cluster with more rows than are read is sampled evenly.
            within = torch.where(is_row, numbers * totals[group].unsqueeze(1) // counts[group].unsqueeze(1), 0)
            index = order[firsts[group].unsqueeze(1) + within]
            x = source.rows(index.flatten()).to(means).view(*index.shape, features)
            x = (x - (means[group] + center).unsqueeze(1)) * scale
            x.masked_fill_(~is_row.unsqueeze(-1), 0)
            if weights is not None:
                weight = weights[index].masked_fill(~is_row, 0)
                x *= weight.sqrt().to(x).unsqueeze(-1)
                observed[group] = weight.sum(1)
            freedom = _freedom(observed[group]).to(x)
            found, values = leading(x, probe, rank)
            directions[group] = found
            eigenvalues[group] = values / freedom.unsqueeze(1)
            trace[group] = x.square().sum((1, 2)) / freedom
            bar.update(len(group))
        bar.update(clusters - bar.n)

    freedom = _freedom(observed).clamp_min(1).to(means).unsqueeze(1)
    # At most one direction for two rows: the others of a small cluster are its rows themselves.
    shown = torch.arange(rank, device=means.device) < counts.unsqueeze(1) // 2
    eigenvalues = eigenvalues * shown
    rest = (trace - eigenvalues.sum(1)).clamp_min(0) / max(1, features - rank)
    rest = (rest * mass.to(rest)).sum()
    processes.sum_(rest)
    level = float(rest / part.mass.sum()) or 1.0  # the noise of the whitened rows
    # In double: where clusters hold few distinct rows, next to nothing is left, and squares of the ratio overflow.
    strength = (_shrink(eigenvalues.double() / level, features / freedom.double()) * level).to(means)
    strong = strength > _PADDING**2 * level
    directions *= strength.sqrt().unsqueeze(1)
    cluster, column = (~strong).nonzero(as_tuple=True)
    noise = torch.randn(rank, features, generator=generator).to(**like)  # for all clusters: the columns of each differ
    directions[cluster, :, column] = noise[column] * (_PADDING * math.sqrt(level / features))
    return directions * variance.sqrt().unsqueeze(-1)


def leading(x: Tensor, probe: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading directions (g, D, R) and eigenvalues (g, R) of x^T x for each of x (g, n, D): randomised, with powers."""
    basis = probe.expand(len(x), -1, -1)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(x.mT @ (x @ basis)).Q
    projected = x @ basis
    # In double: rows that are one row, but for rounding, leave numbers at which LAPACK's float gives up, or gives NaN.
    values, vectors = (found.to(x) for found in torch.linalg.eigh((projected.mT @ projected).double()))
    return (basis @ vectors.flip(-1))[..., :rank], values.flip(-1)[..., :rank].clamp_min(0)


def _shrink(eigenvalues: Tensor, aspect: Tensor) -> Tensor:
    """Variance beyond the noise along sample eigenvectors, in units of the noise.

    A sample of n rows in D dimensions spreads the eigenvalues of pure noise up to (1 + sqrt(D / n))^2, and tilts the
    eigenvectors. Inverts the one and discounts by the other (spiked covariance, Frobenius loss: Donoho, Gavish and
    Johnstone, arXiv 1311.0851).

    Args:
        eigenvalues: of the sample covariance, in units of the noise variance.
        aspect: D / n.
    """
    shifted = eigenvalues + 1 - aspect
    spike = (shifted + (shifted.square() - 4 * eigenvalues).clamp_min(0).sqrt()) / 2
    above = spike - 1
    visible = eigenvalues > (1 + aspect.sqrt()).square()
    cosine = (1 - aspect / above.square()) / (1 + aspect / above)
    return torch.where(visible, above * cosine, 0).clamp_min(0)

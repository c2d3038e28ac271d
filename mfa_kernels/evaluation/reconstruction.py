"""Scores of a mixture: likelihood, reconstruction beside K-means, live regions, speed."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mfa_kernels.common.checks import check_activations, check_centroids, check_finite, check_flag
from mfa_kernels.common.modes import door
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.data.source import as_source
from mfa_kernels.mixture.base import Mixture
from mfa_kernels.mixture.decomposition import Decomposition, check_decomposition
from mfa_kernels.ops.common.finite import finite_rows

_BATCH = 8192


@dataclass(frozen=True)
class Evaluation:
    """Averages over the rows that are finite, which are those that `fit` takes (`mfa_kernels.ops.common.finite`).

    Attributes:
        rows: rows evaluated.
        skipped: rows left out: not finite in the mixture's dtype, or so far out that it holds no density of theirs.
        nll: mean negative log-likelihood, nats per token; None for a decomposition that has no density.
        mse: mean squared error of the reconstruction, per value.
        fvu: fraction of variance unexplained, mse / variance around the mean of the rows. None where they do not vary,
            as a single one does not: there is no variance to explain.
        kmeans_mse, kmeans_fvu: the same for the nearest of the given centroids; None without centroids.
        kmeans_live: number of these that are the nearest of at least one row; None without centroids.
        live: components that are the most responsible one of at least one row.
        active: mean number of active components per row (all others weigh less than the rounding of the dtype).
        tokens_per_second: rows per second through `MFA.log_prob`; None for a decomposition that has no density.
    """

    rows: int
    skipped: int
    nll: float | None
    mse: float
    fvu: float | None
    kmeans_mse: float | None
    kmeans_fvu: float | None
    kmeans_live: int | None
    live: int
    active: float
    tokens_per_second: float | None

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers by the names above, as in evaluation.json."""
        return asdict(self)


_NOTES = """\
A region owns the activations that it is the most responsible for; it is active where its
responsibility is more than rounding. Variance is around the mean of these activations.
On activations that a mixture was fitted to, these numbers are better than on others."""


def score_table(
    score: Evaluation, components: int, of: str, kmeans_seconds: float | None = None, fit_seconds: float | None = None
) -> str:
    """Returns an evaluation as a table for people: numbers with units, and which direction is better.

    Args:
        score: of a mixture or another decomposition, and of K-means if it has numbers of it.
        components: K.
        of: what was evaluated, such as "held-out activations".
        kmeans_seconds, fit_seconds: that K-means took, and that the fit took which began with its centroids.
    """
    compared = score.kmeans_mse is not None

    def share(value: float | None) -> str:
        return "they do not vary" if value is None else f"{value:.1%}"

    def owners(count: int | None) -> str:
        return f"{count} of {components}"

    def number(value: float | None, format: str) -> str:
        return "" if value is None else f"{value:{format}}"

    rows = [
        ("negative log-likelihood, nats per token", "", number(score.nll, ".2f"), "less"),
        ("squared error of reconstruction, per feature", f"{score.kmeans_mse or 0:.4g}", f"{score.mse:.4g}", "less"),
        ("variance unexplained", share(score.kmeans_fvu), share(score.fvu), "less"),
        ("regions that own any", owners(score.kmeans_live), owners(score.live), "more"),
        ("active regions per token, mean", "", f"{score.active:.2f}", ""),
        ("tokens per second through log p(x)", "", number(score.tokens_per_second, ",.0f"), "more"),
    ]
    if kmeans_seconds is not None and fit_seconds is not None:
        both = kmeans_seconds + fit_seconds
        rows.append(("seconds to fit (MFA: with the K-means before)", f"{kmeans_seconds:.1f}", f"{both:.1f}", "less"))
    if score.skipped:
        rows.append(("left out, not finite or without a density", "", f"{score.skipped:,}", ""))
    rows.insert(0, (f"{score.rows:,} {of}", "K-means", "MFA", "better"))
    shown = [row if compared else (row[0], *row[2:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown)]
    lines = []
    for name, *values, better in shown:
        numbers = "  ".join(f"{value:>{width}}" for value, width in zip(values, widths[1:]))
        lines.append(f"{name:<{widths[0]}}  {numbers}  {better}".rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], _NOTES])


@door
@torch.no_grad()
def evaluate(mfa: Decomposition, activations: Any, centroids: Any = None, *, progress: bool = True) -> Evaluation:
    """Evaluates a mixture on activations it was not fitted to.

    Args:
        mfa: the mixture; or another decomposition, such as what `kmeans` returned, which may have no density.
        activations: anything `fit` takes, (N, D).
        centroids: (K', D) of a K-means to compare with, or what `kmeans` returned.
        progress: show a bar when it takes more than two seconds.

    Raises:
        ValueError: the width does not fit, or no row is left.
    """
    check_decomposition(mfa)
    check_flag(progress, "progress")
    source = as_source(activations)
    if centroids is not None:
        centroids = check_centroids(centroids)
        check_finite(check_activations(centroids, mfa.n_features, centroids.device, "centroids"), "centroids")
    if source.n_features != mfa.n_features:
        raise ValueError(f"activations have {source.n_features} features, but the mixture has {mfa.n_features}")
    like, density = mfa.directions(0), getattr(mfa, "log_prob", None)
    device = like.device
    sums = {name: 0.0 for name in ("nll", "error", "kmeans", "active")}
    total, square = torch.zeros(mfa.n_features).double(), 0.0
    owners = torch.zeros(mfa.n_components, dtype=torch.bool, device=device)
    nearest_of: set[int] = set()
    rows = skipped = 0
    seconds = 0.0
    center = None
    if isinstance(mfa, Mixture):
        mfa.woodbury()  # stage 0 is paid once, not per token
    with progress_bar(
        total=len(source), desc="evaluate", unit=" tokens", unit_scale=True, delay=2, progress=progress
    ) as bar:
        for start in range(0, len(source), _BATCH):
            every = source.rows(torch.arange(start, min(start + _BATCH, len(source)))).to(device)
            bar.update(len(every))
            x = every[finite_rows(every, like.dtype)]
            if density is not None:
                started = time.perf_counter()
                log_prob = density(x)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds += time.perf_counter() - started
                has_density = ~log_prob.isnan()
                if not has_density.all():
                    x, log_prob = x[has_density], log_prob[has_density]
                sums["nll"] -= log_prob.double().sum().item()
            rows += len(x)
            skipped += len(every) - len(x)
            if not len(x):
                continue
            code = mfa.code(x, top_k=None)
            sums["active"] += (code.components >= 0).sum().item()
            owned = code.components[:, 0]
            owners[owned[owned >= 0]] = True
            sums["error"] += (mfa.decode(code) - x).double().square().sum().item()
            if centroids is not None:
                centroids = centroids.to(x)
                nearest = torch.cdist(x, centroids, compute_mode="use_mm_for_euclid_dist").argmin(-1)
                nearest_of.update(nearest.tolist())
                sums["kmeans"] += (x - centroids[nearest]).double().square().sum().item()
            center = x[0].double() if center is None else center  # keeps the digits of the variance
            total += (x.double() - center).sum(0).cpu()
            square += (x.double() - center).square().sum().item()
    if not rows:
        raise ValueError(f"activations: no row is finite and has a density under the mixture, of {skipped}")
    values = rows * mfa.n_features
    variance = max(square - total.square().sum().item() / rows, 0.0)
    kmeans = None if centroids is None else sums["kmeans"]
    return Evaluation(
        rows=rows,
        skipped=skipped,
        nll=None if density is None else sums["nll"] / rows,
        mse=sums["error"] / values,
        fvu=sums["error"] / variance if variance else None,
        kmeans_mse=None if kmeans is None else kmeans / values,
        kmeans_fvu=kmeans / variance if variance and kmeans is not None else None,
        kmeans_live=None if centroids is None else len(nearest_of),
        live=int(owners.sum()),
        active=sums["active"] / rows,
        tokens_per_second=None if density is None else rows / seconds,
    )

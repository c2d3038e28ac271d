"""Two pictures of a mixture: a map of its regions, and one region from the inside. Needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfa_kernels.common import checks
from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.files import StrPath, atomic_write_bytes, check_writable
from mfa_kernels.common.places import FIGURE, check_place
from mfa_kernels.common.precision import full_precision
from mfa_kernels.interpret.contexts import (
    Assignments,
    check_tokenizer,
    ensure_assignments,
    region_latents,
    show_text,
    show_token,
)
from mfa_kernels.interpret.regions import RegionSummary

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore
    from mfa_kernels.mixture.mfa import MFA

# Okabe and Ito's palette, told apart by colour-blind readers too.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_GREY = "#9A9A9A"
_INK = "#222222"
KINDS = ("word after a space", "other word or piece", "number", "punctuation", "space", "mixed or special")
_MAP_REGIONS = 1000  # more dots than this are no map
_MAP_INK = 20000  # square points that all dots cover together, of about 300000
_MAP_SIZE = (560.0, 440.0)  # points
_POINTS = 4000
_DISTANCES = (2, 10, 20, 32, 46, 62)  # between a label and its dot, in points


def token_kind(token: str) -> str:
    """Returns the one of KINDS that a token is, given the result of `show_token`."""
    text = token.strip("·⏎␍⇥")
    if not text:
        return "space"
    if text.isdigit():
        return "number"
    if text.replace("'", "").isalpha():
        return "other word or piece" if token.startswith(text) else "word after a space"
    return "mixed or special" if any(c.isalnum() for c in text) else "punctuation"


def on_map(counts: Tensor, labelled: Collection[int]) -> list[int]:
    """The regions that a map has room for: of those with rows the labelled ones, then the largest.

    Args:
        counts: rows of each region, (K,).
        labelled: components.
    """
    rank = counts.clone()
    rank[list(set(labelled))] += counts.max()
    order = rank.argsort(descending=True, stable=True)
    return order[counts[order] > 0][:_MAP_REGIONS].tolist()


def regions_map(
    mfa: MFA,
    summaries: Sequence[RegionSummary],
    path: StrPath,
    *,
    labelled: Collection[int] = (),
    title: str = "Regions of the mixture",
) -> Path:
    """A map on which regions with near centroids are near: each a dot, its area the region's share of the rows.

    The layout is a t-SNE of the centroids begun at their two principal components: distances within a neighbourhood
    can be read, those across the map cannot. The colour is the kind of the region's most telling token.

    Args:
        mfa: the mixture.
        summaries: what `region_summaries` returned (contexts are not needed); beyond 1000 regions, the largest are
            drawn, and those that are labelled.
        path: of the PNG file; one that is there is replaced, and nothing else is.
        labelled: components to label, by their most telling token and number.
        title: of the figure.

    Returns:
        The path.
    """
    path = _check_picture(path)
    checks.check_mixture(mfa)
    summaries = list(checks.check_iterable(summaries, "summaries", "what `region_summaries` returned"))
    for i, summary in enumerate(summaries):
        if not isinstance(summary, RegionSummary):
            raise TypeError(f"summaries[{i}] must be a RegionSummary, got {checks.shown(summary)}")
        checks.check_component(summary.component, mfa.n_components, f"summaries[{i}].component")
    labelled = checks.check_components(labelled, mfa.n_components, "labelled")
    checks.check_text(title, "title")
    drawn = sorted((s for s in summaries if s.rows), key=lambda s: (s.component not in labelled, -s.rows))
    drawn = drawn[:_MAP_REGIONS]
    if len(drawn) < 3:
        raise ValueError(f"summaries must hold at least 3 regions with rows, got {len(drawn)}")
    figure, axes = _figure(10, 7.5)
    axes.set_title(title, pad=24, parse_math=False)
    axes.text(
        0.5, 1.01, "a dot is a region, its area the share of the tokens it owns", transform=axes.transAxes,
        ha="center", va="bottom", fontsize=9, color="#555555",
    )  # fmt: skip
    axes.set_xlabel("t-SNE of the centroids, 1")
    axes.set_ylabel("t-SNE of the centroids, 2")
    axes.set_xticks([])
    axes.set_yticks([])
    total = sum(s.rows for s in drawn)
    area = [min(900.0, max(8.0, _MAP_INK * s.rows / total)) for s in drawn]
    radii = torch.tensor(area).div(math.pi).sqrt()
    means = mfa.means.detach().cpu().double()[[s.component for s in drawn]]
    with full_precision(means):
        places = _separate(tsne(means), radii).numpy()
    kinds = [token_kind(s.tokens[0].token) if s.tokens else KINDS[-1] for s in drawn]
    for kind, color in zip(KINDS, (*_COLORS[: len(KINDS) - 1], _GREY)):
        of_kind = [i for i, found in enumerate(kinds) if found == kind]
        if of_kind:
            sizes = [area[i] for i in of_kind]
            axes.scatter(
                *places[of_kind].T, s=sizes, c=color, alpha=0.75, linewidths=0.5, edgecolors="white", label=kind
            )
    legend = axes.legend(title="most telling token", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([50])
    named = [i for i, s in enumerate(drawn) if s.component in labelled and s.tokens]
    texts = [f"{_cut(drawn[i].tokens[0].token)}  #{drawn[i].component}" for i in named]
    axes.scatter(*places[named].T, s=[area[i] for i in named], facecolors="none", edgecolors=_INK, linewidths=1.2)
    _label(axes, named, texts, torch.from_numpy(places), radii)
    return _save(figure, path)


def region_scatter(
    mfa: MFA,
    store: ActivationStore,
    component: int,
    path: StrPath,
    *,
    axes: tuple[int, int] = (0, 1),
    tokenizer: Any,
    labels: int = 12,
    assigned: Assignments | None = None,
    title: str | None = None,
    progress: bool = True,
) -> Path:
    """The rows of one region in two of its latents, with the tokens at the edge.

    Args:
        mfa: the mixture, of rank 2 at least.
        store: activations with their tokens.
        component: the region; up to 4000 of its rows are drawn, evenly spread over the store.
        path: of the PNG file; one that is there is replaced, and nothing else is.
        axes: the two latents, in prior standard deviations: z ~ N(0, I).
        tokenizer: the Hugging Face tokenizer of the store's tokens.
        labels: how many tokens to write out at most, with the one before, all different, the extremes first.
        assigned: what `assignments` returned; computed here when None.
        title: of the figure.
        progress: show a progress bar.

    Returns:
        The path.
    """
    path, k = _check_picture(path), checks.check_component(component, checks.check_mixture(mfa).n_components)
    check_tokenizer(tokenizer)
    if title is not None:
        checks.check_text(title, "title")
    if not is_several(axes) or len(axes) != 2:
        raise ValueError(f"axes must be two latents, got {checks.shown(axes)}")
    first, second = (checks.check_component(axis, mfa.rank, "axes") for axis in axes)
    labels = checks.check_integer(labels, "labels")
    if first == second:
        raise ValueError(f"axes must be two different latents, got {axes}")
    assigned = ensure_assignments(mfa, store, assigned, progress)
    rows = assigned.rows(k)
    if not len(rows):
        raise ValueError(f"component {k} is the most responsible for no row")
    z = region_latents(mfa, store, k, assigned)[:, [first, second]]
    title = title or f"Inside region {k}: {len(rows):,} tokens"
    return draw_region(store, tokenizer, rows, z, (first, second), path, labels, title)


def draw_region(
    store: ActivationStore,
    tokenizer: Any,
    rows: Tensor,
    z: Tensor,
    axes: tuple[int, int],
    path: StrPath,
    labels: int = 12,
    title: str = "",
) -> Path:
    """Draws `region_scatter` of the rows of a region (n,), given two of their latents (n, 2)."""
    first, second = axes
    count = len(rows)
    if count > _POINTS:
        kept = torch.linspace(0, count - 1, _POINTS).round().long()
        rows, z = rows[kept], z[kept]
    tokens = torch.tensor([store.token(row) for row in rows.tolist()])

    figure, plot = _figure(8, 6)
    plot.set_title(title, parse_math=False)
    plot.set_xlabel(f"latent z[{first}] (prior standard deviations)")
    plot.set_ylabel(f"latent z[{second}] (prior standard deviations)")
    plot.axhline(0, color="#DDDDDD", linewidth=0.8, zorder=0)
    plot.axvline(0, color="#DDDDDD", linewidth=0.8, zorder=0)
    plot.margins(0.12)
    size = 40 / max(1.0, (len(z) / 100) ** 0.4)
    ids, held = tokens.unique(return_counts=True)
    common = ids[held.argsort(descending=True, stable=True)[: len(_COLORS) - 1]]
    other = ~torch.isin(tokens, common)
    if other.any():
        plot.scatter(
            *z[other].T.numpy(), s=size, c=_GREY, alpha=0.6, linewidths=0, label=f" other  {int(other.sum()):,}"
        )
    for token, color in zip(common.tolist(), _COLORS):
        here = tokens == token
        # A label that began with an underscore would be left out of the legend.
        name = f" {_cut(show_token(tokenizer, token))}  {int(here.sum()):,}"
        plot.scatter(*z[here].T.numpy(), s=size, c=color, alpha=0.75, linewidths=0, label=name)
    handles, names = plot.get_legend_handles_labels()
    if other.any():  # last
        handles, names = [*handles[1:], handles[0]], [*names[1:], names[0]]
    legend = plot.legend(
        handles, names, title="token, how often", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
    )
    for handle in legend.legend_handles:
        handle.set_sizes([50])
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    named: dict[str, int] = {}
    for i in _spread(z, 3 * labels):
        ids, at = store.context(int(rows[i]), 1, 0)
        text = f"{_cut(show_text(tokenizer, ids[:at]).strip())}⟦{_cut(show_token(tokenizer, ids[at]))}⟧"
        if len(named) < labels:
            named.setdefault(text, i)
    _label(plot, list(named.values()), list(named), z, torch.full((len(z),), math.sqrt(size / math.pi)))
    return _save(figure, path)


def _check_picture(path: Any) -> Path:
    """`path` if a PNG file can be written to it; raises otherwise."""
    path = checks.check_path(path, "path")
    check_place(path, FIGURE, "path")
    if path.suffix.lower() not in ("", ".png"):
        raise ValueError(f"path must end in .png, as the file that is written is one, got {path}")
    check_writable(path, "path")
    return path


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure that no pyplot state knows, and its axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "mfa_kernels[report]"') from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: StrPath) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write_bytes(path, buffer.getvalue())
    return Path(path)


def _cut(text: str, length: int = 16) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _spread(points: Tensor, count: int) -> list[int]:
    """At most `count` of the points (n, 2), each the farthest from those before: extremes first, none too close."""
    points = (points - points.mean(0)) / (points.amax(0) - points.amin(0)).clamp_min(1e-12)
    distance = points.norm(dim=1)
    chosen: list[int] = []
    while len(chosen) < count and distance.max() > 0.06:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
    return chosen


def _label(axes: Any, chosen: Sequence[int], texts: Sequence[str], points: Tensor, radii: Tensor) -> None:
    """Writes texts next to the chosen dots, where they cover no other label and few dots.

    Args:
        points: of all dots, (n, 2), in data coordinates.
        radii: of all dots, (n,), in points (1/72 inch).
    """
    figure = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels stay where they are put
    renderer = figure.canvas.get_renderer()
    pixels = figure.dpi / 72
    frame = axes.get_window_extent(renderer)
    dots, reach = torch.from_numpy(axes.transData.transform(points.numpy())), radii * pixels
    middle = dots.mean(0)
    labels: list[Any] = []
    for i, text in zip(chosen, texts):
        radius = float(radii[i])
        note = axes.annotate(
            text, points[i].tolist(), (0, 0), textcoords="offset points", fontsize=9, color=_INK, parse_math=False,
            ha="center", va="center", zorder=5,
            bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.7},
            arrowprops={"arrowstyle": "-", "color": _INK, "linewidth": 0.6, "shrinkA": 0, "shrinkB": radius},
        )  # fmt: skip
        box = note.get_window_extent(renderer)
        width, height = box.width / 2 / pixels, box.height / 2 / pixels
        outwards = math.atan2(*(dots[i] - middle).flip(0).tolist())
        best, place, near = math.inf, (0.0, 0.0), True
        for distance in _DISTANCES:
            for turn in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6):
                angle = outwards + turn * math.pi / 6
                dx = math.cos(angle) * (radius + distance + width)
                dy = math.sin(angle) * (radius + distance + height)
                moved = box.translated(dx * pixels, dy * pixels)
                covered = ((dots[:, 0] - moved.x0 > -reach) & (dots[:, 0] - moved.x1 < reach)
                           & (dots[:, 1] - moved.y0 > -reach) & (dots[:, 1] - moved.y1 < reach))  # fmt: skip
                cost = 100 * (sum(_overlap(moved, other) for other in labels) + _area(moved) - _overlap(moved, frame))
                cost += float(covered.sum()) + distance / 30
                if cost < best:
                    best, place, near = cost, (dx, dy), distance == _DISTANCES[0]
        note.set_position(place)
        note.arrow_patch.set_visible(not near)
        labels.append(box.translated(place[0] * pixels, place[1] * pixels))


def _area(box: Any) -> float:
    return box.width * box.height


def _overlap(a: Any, b: Any) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)


def _separate(places: Tensor, radii: Tensor, steps: int = 100) -> Tensor:
    """Places (n, 2) on the map's plane, in points, dots that overlap pushed apart."""
    places = places / places.abs().amax(0).clamp_min(1e-12) * torch.tensor(_MAP_SIZE) / 2
    turn = 2.4 * torch.arange(len(places))
    places = places + 0.01 * torch.stack([turn.cos(), turn.sin()], 1)  # equal centroids are pushed apart too
    apart = radii[:, None] + radii + 1
    for _ in range(steps):
        distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
        push = 0.3 * (apart / distance.clamp_min(1e-3) - 1).clamp_min_(0).fill_diagonal_(0)
        if not push.any():
            break
        places = places + push.sum(1, keepdim=True) * places - push @ places
    return places


def tsne(points: Tensor, steps: int = 400) -> Tensor:
    """t-SNE (van der Maaten and Hinton, 2008) of (n, D) into (n, 2), exact, the same on every run."""
    n = len(points)
    points = points - points.mean(0)
    left, values, _ = torch.linalg.svd(points, full_matrices=False)
    start = left[:, :2] * values[:2]
    start = torch.nn.functional.pad(start, (0, 2 - start.shape[1]))
    squared = torch.cdist(points, points).square_()
    affinity = _affinity(squared, perplexity=min(20.0, (n - 1) / 3)).float()
    place = (start / start.std().clamp_min(1e-12)).float() * 1e-2
    velocity, gains = torch.zeros_like(place), torch.ones_like(place)
    for step in range(steps):
        early = step < steps // 4
        kernel = torch.cdist(place, place).square_().add_(1).reciprocal_().fill_diagonal_(0)
        force = (affinity * (12.0 if early else 1.0) - kernel / kernel.sum()) * kernel
        gradient = 4 * (force.sum(1, keepdim=True) * place - force @ place)
        agree = (gradient * velocity) > 0
        gains = torch.where(agree, gains * 0.8, gains + 0.2).clamp_min_(0.01)
        velocity = (0.5 if early else 0.8) * velocity - max(10.0, n / 12) * gains * gradient
        place = place + velocity
    return place - place.mean(0)


def _affinity(squared: Tensor, perplexity: float) -> Tensor:
    """Symmetric neighbour probabilities (n, n), each row's Gaussian as wide as its perplexity asks, by bisection."""
    n = len(squared)
    scale = squared.mean().clamp_min(1e-300)
    distances = (squared / scale).fill_diagonal_(torch.inf)
    low, high = torch.full((n, 1), -20.0, dtype=squared.dtype), torch.full((n, 1), 20.0, dtype=squared.dtype)
    for _ in range(30):
        middle = (low + high) / 2
        p = (-distances * middle.exp()).softmax(1)
        entropy = -(p * p.clamp_min(1e-300).log()).sum(1, keepdim=True)
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return (p + p.T) / (2 * n)

"""All about one region, for its page: contexts, histograms, latents, lens, the regions around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfa_kernels.explorer.texts import number
from mfa_kernels.interpret.contexts import region_latents
from mfa_kernels.interpret.neighbors import nearest as nearest_to

if TYPE_CHECKING:
    from mfa_kernels.explorer.explorer import Explorer
    from mfa_kernels.interpret.lens import LogitLens, TokenChange

ORDERS = ("responsibility", "distance", "spread")
_BINS = 32
_CONTEXTS = 20
_CANDIDATES = 5000  # rows of a region among which near-copies are looked for
_NEIGHBORS = 8
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_PER_QUANTILE = 3
_LENS_TOKENS = 10


def page(explorer: Explorer, k: int) -> dict[str, Any]:
    """Returns what the page of a region shows at once."""
    catalog, assigned = explorer.catalog, explorer.assigned
    rows = assigned.rows(k)
    label = explorer.labels.get(k)
    nearest, constellation = _around(explorer, k)
    return catalog.line(k) | {
        "explanation": "" if label is None else label.explanation,
        "genres": catalog.genres(k),
        "telling": catalog.telling(k),
        "contexts": contexts(explorer, k, "responsibility", 0, _CONTEXTS)["contexts"],
        "responsibilities": histogram(assigned.responsibilities[rows], 0.0, 1.0),
        "distances": histogram(assigned.distances[rows]),
        "latents": _latents(explorer, k),
        "neighbors": nearest,
        "constellation": constellation,
    }


def contexts(explorer: Explorer, k: int, by: str, offset: int, limit: int) -> dict[str, Any]:
    """Returns how many different contexts the first 5,000 rows of a region have, in an order, and a part of them.

    Args:
        k: the region.
        by: "responsibility", among equals the nearest to the centroid first; "distance", the farthest first; or
            "spread", in a random order that is always the same.
        offset, limit: which part.
    """
    rows = _in_order(explorer, k, by)[:_CANDIDATES]
    first, copies = explorer.texts.distinct(rows)
    shown = zip(first[offset : offset + limit].tolist(), copies[offset : offset + limit].tolist())
    found = [explorer.texts.context(row, explorer.assigned, folded=count - 1) for row, count in shown]
    return {"total": len(first), "contexts": found}


def _in_order(explorer: Explorer, k: int, by: str) -> Tensor:
    rows = explorer.assigned.rows(k)
    if by == "spread":
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(k))]
    distance = explorer.assigned.distances[rows]
    order = distance.argsort(stable=True, descending=by == "distance")
    if by == "responsibility":
        order = order[explorer.assigned.responsibilities[rows][order].argsort(descending=True, stable=True)]
    return rows[order]


def histogram(values: Tensor, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Counts of values in bins of equal width, NaN left out: {edges: n + 1 numbers, counts: n}."""
    values = values[values.isfinite()].float()
    if not len(values):
        return {"edges": [], "counts": []}
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    high = high if high > low else low + 1.0
    edges = torch.linspace(low, high, _BINS + 1)
    counts = torch.histc(values, _BINS, low, high)
    return {"edges": [round(edge, 6) for edge in edges.tolist()], "counts": counts.long().tolist()}


def _latents(explorer: Explorer, k: int) -> list[dict[str, Any]]:
    """The latents of a region, those along which it extends most first."""
    mfa = explorer.mfa
    if mfa.rank == 0:
        return []
    lengths = mfa.loadings[k].detach().float().norm(dim=0)
    z = region_latents(mfa, explorer.store, k, explorer.assigned)
    z = z[z.isfinite().all(1)]
    found = []
    for axis in lengths.argsort(descending=True).tolist():
        low, high = torch.tensor([-2.0, 2.0]) if not len(z) else z[:, axis].quantile(torch.tensor([0.05, 0.95]))
        entry = {"axis": axis, "length": number(lengths[axis]), "low": number(low), "high": number(high)}
        found.append(entry | {"histogram": histogram(z[:, axis])})
    return found


def latent(explorer: Explorer, k: int, axis: int) -> dict[str, Any]:
    """Returns contexts along one latent of a region, from its lowest values to its highest, and its lens."""
    rows = explorer.assigned.rows(k)
    z = region_latents(explorer.mfa, explorer.store, k, explorer.assigned)[:, axis]
    order = z.argsort(stable=True)
    quantiles = []
    for quantile in _QUANTILES if len(rows) else ():
        at = round(quantile * (len(rows) - 1))
        near = order[(torch.arange(len(rows)) - at).abs().argsort(stable=True)[: _PER_QUANTILE * 50]]
        first, copies = explorer.texts.distinct(rows[near])
        value = dict(zip(rows[near].tolist(), z[near].tolist()))
        shown = sorted(zip(first[:_PER_QUANTILE].tolist(), copies.tolist()), key=lambda pair: value[pair[0]])
        found = [
            explorer.texts.context(row, explorer.assigned, folded=count - 1, score=value[row]) for row, count in shown
        ]
        quantiles.append({"quantile": quantile, "value": float(z[order[at]]), "contexts": found})
    return {"axis": axis, "quantiles": quantiles, "lens": None if explorer.lens is None else lens(explorer, k, axis)}


def lens(explorer: Explorer, k: int, axis: int | None = None) -> dict[str, Any]:
    """Returns the tokens whose logits a centroid, or one of its latents, raises and lowers most."""
    assert explorer.lens is not None
    found: LogitLens = explorer.lens.read(k, axis, _LENS_TOKENS, explorer.tokenizer)

    def tokens(changes: list[TokenChange]) -> list[dict[str, Any]]:
        return [{"token": change.token, "change": number(change.change)} for change in changes]

    return {"raised": tokens(found.top), "lowered": tokens(found.bottom)}


def _around(explorer: Explorer, k: int) -> tuple[list[dict[str, Any]], list[int]]:
    """The nearest regions, and the constellation: those that count each other among their nearest, in two steps."""
    most = min(_NEIGHBORS, explorer.mfa.n_components - 1)
    if most < 1:
        return [], []

    def nearest(components: list[int]) -> tuple[list[list[int]], list[list[float]]]:
        index, distance = nearest_to(explorer.centroids, components, most, explorer.mfa)
        return index.tolist(), distance.tolist()

    (own,), (far,) = nearest([k])
    mutual = {j: back for j, back in zip(own, nearest(own)[0]) if k in back}
    found = {*mutual, *(i for back in mutual.values() for i in back)} - {k}
    lines = [
        {"component": j, "label": explorer.catalog.labels[j], "distance": number(distance)}
        for j, distance in zip(own, far)
    ]
    return lines, sorted(j for j in found if explorer.assigned.counts[j])

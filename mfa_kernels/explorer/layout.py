"""A map of all regions: two principal components at once, and t-SNE of the centroids as soon as it is there."""

from __future__ import annotations

import threading
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfa_kernels.interpret.figures import tsne

if TYPE_CHECKING:
    from mfa_kernels.explorer.cached import Cache

_EXACT = 1000  # regions, of more the distances of all pairs take too long
_COORDINATES = 50  # principal components that t-SNE looks at
PRINCIPAL, TSNE = "principal components", "t-SNE"


class Layout:
    """Places of regions on a map.

    Args:
        means: of the regions drawn, (n, D).
        cache: where a finished layout is kept; None keeps none.

    Attributes:
        name: how the places were found.
        places: (n, 2), within [-1, 1].
        is_final: False while better places are being computed, in a thread of its own.
    """

    def __init__(self, means: Tensor, cache: Cache | None = None) -> None:
        means = means.detach().cpu().float()
        self._cache, self._lock = cache, threading.Lock()
        self._thread: threading.Thread | None = None
        kept = None if cache is None else cache.read("layout")
        if kept is not None and len(kept["places"]) == len(means):
            self.name, self.places, self.is_final = TSNE, kept["places"], True
            return
        points = _principal(means)
        self.name, self.places, self.is_final = PRINCIPAL, _fitted(points[:, :2]), len(means) < 4
        self._points = points

    def refine(self) -> None:
        """Begins to compute better places, once."""
        with self._lock:
            if self.is_final or self._thread is not None:
                return
            self._thread = threading.Thread(target=self._compute, daemon=True)
            self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Waits until the places are final, or so long."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _compute(self) -> None:
        try:
            places = _fitted(_tsne(self._points))
            if self._cache is not None:
                self._cache.write("layout", {"places": places})
            self.places, self.name = places, TSNE
        except Exception as error:  # the map stays as it is, and says so
            warnings.warn(f"the map stays at its principal components: {error}", stacklevel=2)
        self.is_final = True


def _principal(means: Tensor) -> Tensor:
    """The first principal components of points (n, D): (n, at most 50)."""
    centered = (means - means.mean(0)).double()
    if len(means) < means.shape[1]:  # of the smaller of the two products
        squares, vectors = torch.linalg.eigh(centered @ centered.T)
        points = vectors * squares.clamp_min(0).sqrt()
    else:
        points = centered @ torch.linalg.eigh(centered.T @ centered)[1]
    points = points[:, -_COORDINATES:].flip(1)
    return torch.nn.functional.pad(points, (0, max(0, 2 - points.shape[1])))


def _tsne(points: Tensor) -> Tensor:
    """t-SNE of points (n, d) into (n, 2): by scikit-learn where there are many, exact where there are few."""
    if len(points) <= _EXACT:
        return tsne(points)
    if find_spec("sklearn") is None:
        raise RuntimeError(f"a map of {len(points):,} regions needs scikit-learn: pip install mfa_kernels[explore]")
    from sklearn.manifold import TSNE as ByTrees

    start = (points[:, :2] / points[:, 0].std() * 1e-4).float().numpy()
    found = ByTrees(2, init=start, perplexity=30.0, random_state=0).fit_transform(points.float().numpy())
    return torch.from_numpy(found)


def _fitted(places: Tensor) -> Tensor:
    """Places moved and scaled into [-1, 1], so that a few far ones do not press the others together."""
    if not len(places):
        return places.float()
    places = places.float() - places.float().median(0).values
    reach = places.abs().quantile(0.995).clamp_min(1e-12)
    places = places / reach
    radius = places.norm(dim=1, keepdim=True).clamp_min(1e-12)
    outside = (radius > 1).float()
    # Beyond the reach of nearly all, distance grows as its logarithm.
    places = places * (1 - outside) + places / radius * (1 + radius.log().clamp_min(0) * 0.2) * outside
    return places / places.abs().max().clamp_min(1.0)

"""Calls that launch every Triton kernel of the package, on tensors without memory: what bench/aot.py compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.ops.common import configs, triton_probe
from mfa_kernels.ops.common.triton_tokens import scan_tokens
from mfa_kernels.ops.intervene import triton_intervene
from mfa_kernels.ops.intervene.types import Edit, Mixture
from mfa_kernels.ops.kmeans import triton_clusters, triton_nearest
from mfa_kernels.ops.kmeans.types import ClusterSums
from mfa_kernels.ops.pairs import triton_backward, triton_decode, triton_pairs
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.scan import triton_pipeline
from mfa_kernels.ops.scan.triton_scan import scan_tiles
from mfa_kernels.ops.scan.types import ActivePairs, activity_threshold
from mfa_kernels.ops.screen import triton_screen
from mfa_kernels.ops.statistics import triton_statistics
from mfa_kernels.ops.statistics.types import Sums
from mfa_kernels.ops.woodbury import triton_woodbury
from mfa_kernels.ops.woodbury.triton_rows import scan_rows
from mfa_kernels.ops.woodbury.types import TRITON_RANK, Woodbury

SLOTS = 16


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has a shape and a dtype alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Calls:
    """What is launched for N tokens of a dtype, K components, D features and, in calls that do not name their own,
    rank R and noise per component or not."""

    def __init__(
        self, tokens: int, components: int, features: int, rank: int, dtype: str = "bfloat16", own: bool = False
    ) -> None:
        self.tokens, self.components, self.features, self.rank, self.own = tokens, components, features, rank, own
        self.x = empty(tokens, features, dtype=getattr(torch, dtype))
        self.constants, self.center = empty(components), empty(features)
        self.chosen = empty(tokens, SLOTS, dtype=torch.int32)  # components of the slots
        self.weights = empty(tokens, SLOTS)

    def woodbury(self, rank: int, per_component: bool = False) -> Woodbury:
        """The precomputed terms of a mixture, with the rows of the GPU scan."""
        count, features = self.components, self.features
        rows, cholesky = empty(count, rank + 1 + per_component, features), empty(count, rank, rank)
        bare = Woodbury(rows, cholesky, empty(count), empty(features), self.center, per_component)
        return Woodbury(rows, cholesky, *bare.tensors()[2:], per_component, scan_rows(bare))

    def factors(self, rank: int, per_component: bool) -> None:
        """Stage 0."""
        noise = (self.components, self.features) if per_component else (self.features,)
        means, loadings = empty(self.components, self.features), empty(self.components, self.features, rank)
        triton_woodbury.woodbury(means, loadings, empty(*noise))

    def scan(self, exact: bool = True, per_component: bool | None = None) -> None:
        """Stage 1."""
        woodbury = self.woodbury(self.rank, self.own if per_component is None else per_component)
        rows = triton_pipeline.ScanRows(*woodbury.scan)
        triton_pipeline.scan(self.x, woodbury, rows, self.constants, SLOTS, exact)

    def scan_of_rank(self, rank: int) -> None:
        """The scan's kernel alone."""
        woodbury = self.woodbury(rank)
        rows = triton_pipeline.ScanRows(*woodbury.scan)
        tokens = scan_tokens(self.x, rows.scale, woodbury.center, rows.rows.shape[-1], False)
        config = configs.configured(configs.Scan, self.x, self.tokens, self.components)
        scan_tiles(tokens, rows, self.constants, config, bounds=True)

    def screened(self) -> None:
        """Stage 1 through a screen of 64 coordinates."""
        woodbury, shape = self.woodbury(self.rank), (self.components, self.features)
        parameters = (empty(*shape), empty(*shape, self.rank), empty(self.features))
        screen = triton_screen.screen(*parameters, woodbury, empty(self.features, min(64, self.features)))
        threshold = activity_threshold(self.components, torch.float32)
        triton_screen.scan(self.x, woodbury, self.constants, screen, threshold, SLOTS)

    def statistics(self, rank: int, per_component: bool) -> None:
        """EM's sums."""
        count, features = self.components, self.features
        squares = (count, features) if per_component else (features,)
        shapes = ((count,), (count, features), (count, rank), (count, rank, rank), (count, rank, features), squares)
        sums = Sums(*(empty(*shape, dtype=torch.float64) for shape in shapes))
        triton_statistics.accumulate(self.x, self.chosen, self.weights, self.woodbury(rank, per_component), sums)

    def gradients(self) -> None:
        """The gradients of log p(x) from its pairs."""
        tokens = torch.arange(self.tokens, device="meta").repeat_interleave(SLOTS)
        shapes = ((self.tokens, self.features), (self.components, self.features))
        noise = (self.components, self.features) if self.own else (self.features,)
        shapes += ((self.components, self.features, self.rank), noise, (self.components,))
        gradients: list[Any] = [empty(*shape) for shape in shapes]
        pairs = Pairs(self.x, tokens, self.chosen.flatten())
        woodbury = self.woodbury(self.rank, self.own)
        triton_backward.backward(pairs, self.weights.flatten(), woodbury, gradients, add=False)

    def decode(self) -> None:
        """Decoding, and its gradients."""
        latents = empty(self.tokens, SLOTS, self.rank)
        parameters = (empty(self.components, self.features), empty(self.components, self.features, self.rank))
        triton_decode.decode(self.chosen, self.weights, latents, *parameters)
        grad = empty(self.tokens, self.features)
        triton_decode.decode_backward(grad, self.chosen, self.weights, latents, *parameters)

    def cluster_sums(self, weighted: bool) -> None:
        """K-means' update."""
        owner, distance = empty(self.tokens, dtype=torch.int64), empty(self.tokens)
        weights = empty(self.tokens, dtype=torch.float64) if weighted else None
        sums = ClusterSums.zeros(empty(self.components, self.features))
        triton_clusters.cluster_sums(self.x, self.center, owner, distance, weights, sums)

    def intervene(self, mixes: bool, spreads: bool, keeps_norm: bool) -> None:
        """Steering with one rule for all tokens, given as evidence the pairs of a scan."""
        woodbury, count, slots = self.woodbury(self.rank, self.own), self.tokens, self.chosen.shape
        integers = torch.int32
        rules = (empty(1, 1, 3), empty(1, 1, self.features), empty(1, 3, dtype=integers), empty(1))
        edit = Edit(*rules, keeps_norm, empty(1, 1, self.rank) if mixes else None, spreads)
        chosen = empty(1, count, dtype=torch.bool)
        pairs = ActivePairs(empty(count), self.chosen, empty(*slots), empty(count, dtype=integers))
        map_ = (empty(self.components, self.features), empty(self.components, self.features, self.rank))
        mixture = Mixture(*map_, woodbury.rows, woodbury.cholesky, woodbury.scale) if mixes else None
        triton_intervene.intervene(self.x[None], edit, chosen, None, pairs, mixture, self.own)

    def by_name(self) -> dict[str, Callable[[], Any]]:
        """Every call by the name that its kernels have in a table, most usual first."""
        woodbury, centroids = self.woodbury, empty(self.components, self.features)
        flat = self.chosen.flatten()
        call = functools.partial
        return {
            "": self.scan,
            "fast": call(self.scan, exact=False),
            "noise per component": call(self.scan, per_component=True),
            **{f"rank {rank}": call(self.scan_of_rank, rank) for rank in (5, 7, 16)},
            "screened": self.screened,
            **{
                f"factors, rank {rank}" + ", noise per component" * own: call(self.factors, rank, own)
                for rank in (3, 5, 10, 32)  # one of each padded size
                for own in (False, True)
            },
            "latents": lambda: triton_pairs.latents(Pairs(self.x, flat, flat), woodbury(self.rank)),
            "gradients": self.gradients,
            "decode": self.decode,
            "clusters": call(self.cluster_sums, False),
            "weighted": call(self.cluster_sums, True),
            "nearest": lambda: triton_nearest.nearest(self.x, centroids, self.center),
            **{
                f"rank {rank}" + ", noise per component" * own: call(self.statistics, rank, own)
                for rank in (10, 64)
                for own in (False, True)
            },
            "probe": lambda: triton_probe.products(*triton_probe.vectors(1024, torch.device("meta"))),
            "gate": call(self.intervene, False, False, False),
            "gate and norm": call(self.intervene, False, False, True),
            "mixture": call(self.intervene, True, False, False),
            "reconstruction and norm": call(self.intervene, True, True, True),
        }

    def of_variant(self) -> dict[str, Callable[[], Any]]:
        """The calls whose machine code depends on what a variant changes."""
        flat, call = self.chosen.flatten(), functools.partial
        found: dict[str, Callable[[], Any]] = {
            "": self.scan,
            "fast": call(self.scan, exact=False),
            "latents": lambda: triton_pairs.latents(Pairs(self.x, flat, flat), self.woodbury(self.rank, self.own)),
            "gradients": self.gradients,
            "decode": self.decode,
            "clusters": call(self.cluster_sums, False),
            "nearest": lambda: triton_nearest.nearest(self.x, empty(self.components, self.features), self.center),
            "statistics": call(self.statistics, self.rank, self.own),
            "mixture": call(self.intervene, True, False, False),
        }
        if self.rank <= TRITON_RANK:
            found["factors"] = call(self.factors, self.rank, self.own)
        return found if self.own else {**found, "screened": self.screened}


def calls(tokens: int, components: int, features: int, rank: int, *variant: Any) -> dict[str, Callable[[], Any]]:
    """The calls for N, K, D and R, as bench/aot.py takes them; of a variant, which has a dtype and a kind of noise,
    those that depend on it."""
    made = Calls(tokens, components, features, rank, *variant)
    return made.of_variant() if variant else made.by_name()

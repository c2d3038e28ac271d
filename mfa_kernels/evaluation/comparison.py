"""Localization by a mixture beside that by other features, of the same pairs at the same site.

full vector  the source's whole activation; nothing is learnt
random       k random directions; nothing is learnt
DAS          k directions, learnt
neurons      a mask of the D axes
PCA          a mask of the principal components
K-means      a mask of the centroids of a K-means of as many regions
SAE          a mask of a TopK autoencoder's features, with as many floats stored, and active for a token
centroids, regions, columns   masks of the mixture's own features (`MFAFeaturizer`)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_choice, check_flag, check_integer
from mfa_kernels.common.files import StrPath, atomic_write_json
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.data.source import as_source
from mfa_kernels.evaluation.featurizer import MODES, MFAFeaturizer
from mfa_kernels.evaluation.localization import (
    DictionaryFeaturizer,
    Featurizer,
    LinearFeaturizer,
    Localization,
    localize,
)
from mfa_kernels.evaluation.site import Site
from mfa_kernels.evaluation.tasks import Task
from mfa_kernels.evaluation.topk_sae import TopKSAE
from mfa_kernels.mixture.decomposition import check_decomposition

METHODS = ("full vector", "random", "DAS", "neurons", "PCA", "K-means", "SAE", *MODES)
FITTED = ("PCA", "K-means", "SAE")
"""Those that need activations to be fitted to."""

_MASKLESS = ("full vector", "random", "DAS")
_SAMPLE = 65_536  # rows that principal components are computed from
_RESAMPLED = 2000


class Result(NamedTuple):
    """One method over several seeds.

    Attributes:
        method: one of `METHODS`.
        runs: what `localize` found, by seed.
        iia: mean over seeds and pairs.
        low, high: an interval of 95% of it, from pairs drawn again; pairs share prompts, so it is a little narrow.
        cause, isolation, soft: means over seeds; None as in `Localization`.
        whole: `cause` (IIA, where nobody says which answers change) if all features are swapped: no mask of them does
            much better; None where no mask is learnt.
        selected: features in the hard mask, mean over seeds; of `masked`.
        same_region: share of pairs in one region of the mixture, or of the K-means.
    """

    method: str
    runs: tuple[Localization, ...]
    iia: float
    low: float
    high: float
    cause: float | None
    isolation: float | None
    soft: float | None
    whole: float | None
    selected: float
    masked: int
    same_region: float | None


class Baselines:
    """What has to be fitted before it can be masked, each once: principal directions, an autoencoder.

    Args:
        mfa: the mixture that they are compared with.
        activations: anything `fit` takes, of the mixture's layer; None: without them.
        clusters: what `kmeans` returned for them, with as many clusters as the mixture has regions; None: without.
        epochs: of the autoencoder.
        seed: of the autoencoder.
        progress: show bars.
    """

    def __init__(
        self,
        mfa: Any,
        activations: Any = None,
        clusters: Any = None,
        *,
        epochs: int = 4,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.mfa = check_decomposition(mfa)
        self.epochs, self.seed = check_integer(epochs, "epochs", 1), check_integer(seed, "seed")
        self.progress = check_flag(progress, "progress")
        self.source = None if activations is None else as_source(activations)
        if self.source is not None and self.source.n_features != mfa.n_features:
            raise ValueError(
                f"activations have {self.source.n_features} features, but the mixture has {mfa.n_features}"
            )
        self._fitted: dict[str, Featurizer] = {}
        if clusters is not None:
            self._fitted["K-means"] = MFAFeaturizer(check_decomposition(clusters, "clusters"), "centroids")

    def featurizer(self, method: str, random: int, seed: int) -> Featurizer:
        """Returns what a method masks; `random` directions of the seed for that one."""
        features = self.mfa.n_features
        if method in MODES:
            return MFAFeaturizer(self.mfa, method)
        if method in ("full vector", "neurons"):
            return LinearFeaturizer(n_features=features)
        if method == "random":
            return LinearFeaturizer.random(features, random, seed)
        if method not in self._fitted:
            if self.source is None or method == "K-means":
                needed = "clusters" if method == "K-means" else "activations"
                raise ValueError(f"{needed} must be given for {method}, got None")
            self._fitted[method] = self._principal() if method == "PCA" else self._autoencoder()
        return self._fitted[method]

    def _some(self) -> Tensor:
        assert self.source is not None
        order = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(self.seed))
        return self.source.rows(order[:_SAMPLE].sort().values).float()

    def _principal(self) -> Featurizer:
        return LinearFeaturizer.principal(self._some())

    def _autoencoder(self) -> Featurizer:
        """F latents store 2 F D floats, the mixture K (1 + R) D; active are its pairs' 1 + R."""
        width = 1 + len(self.mfa.directions(0))
        active = (
            (self.mfa.code(self._some()[:8192].to(self.mfa.directions(0).device), top_k=None).components >= 0)
            .double()
            .sum(-1)
            .mean()
            .item()
        )
        latents = max(2, self.mfa.n_components * width // 2)
        sae = TopKSAE.fit(
            self.source, latents, min(latents, round(active * width)), epochs=self.epochs, seed=self.seed,
            device=self.mfa.directions(0).device, progress=self.progress,
        )  # fmt: skip
        return DictionaryFeaturizer(sae.encode, sae.decode, latents)


def compare(
    site: Site,
    task: Task,
    baselines: Baselines,
    methods: Sequence[str] = METHODS,
    *,
    seeds: int = 3,
    das: int = 16,
    progress: bool = True,
    **options: Any,
) -> list[Result]:
    """Localizes the variable of a task by several methods.

    Args:
        site: of the task's pairs, as `task.site(model, layer)` makes it.
        task: what `prepare` returned.
        baselines: of the mixture.
        methods: of `METHODS`.
        seeds: runs of each: of the order of pairs and, for DAS and random directions, of the start.
        das: directions of DAS, and random ones.
        progress: show a bar when it takes more than two seconds.
        options: for `localize`: epochs, batch_size, lr, penalty, temperatures.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for method in methods:
        check_choice(method, METHODS, "methods")
    seeds, das = check_integer(seeds, "seeds", 1), check_integer(das, "das", 1, site.base.shape[1])
    if len(site.base) != len(task.pairs):
        raise ValueError(f"site must be of the task's {len(task.pairs)} pairs, got one of {len(site.base)}")
    found = []
    with progress_bar(total=len(methods) * seeds, desc="localize", unit=" runs", delay=2, progress=progress) as bar:
        for method in methods:
            runs = []
            for seed in range(seeds):
                runs.append(_run(site, task, baselines, method, seed, das, options))
                bar.update(1)
            found.append(_result(method, tuple(runs), _whole(site, task, baselines, method, das)))
    return found


def _run(
    site: Site, task: Task, baselines: Baselines, method: str, seed: int, das: int, options: dict[str, Any]
) -> Localization:
    given: dict[str, Any] = {"changes": task.changes, "held_out": task.held_out, "seed": seed, "progress": False}
    if method == "DAS":
        return localize(site.logits, task.labels, site.base, site.source, das=das, **given, **options)
    features = baselines.featurizer(method, das, seed)
    mask = torch.ones(features.n_masked) if method in _MASKLESS else None
    return localize(site.logits, task.labels, site.base, site.source, features, mask=mask, **given, **options)


def _whole(site: Site, task: Task, baselines: Baselines, method: str, das: int) -> float | None:
    """What swapping all features of a method does to answers that change."""
    if method in _MASKLESS:
        return None
    features = baselines.featurizer(method, das, 0)
    given: dict[str, Any] = {"changes": task.changes, "held_out": task.held_out, "progress": False}
    mask = torch.ones(features.n_masked)
    found = localize(site.logits, task.labels, site.base, site.source, features, mask=mask, **given)
    return found.iia if found.cause is None else found.cause


def _result(method: str, runs: tuple[Localization, ...], whole: float | None) -> Result:
    right = torch.stack([run.right for run in runs]).double().mean(0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(right), (_RESAMPLED, len(right)), generator=generator)
    low, high = right[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return Result(
        method, runs, float(right.mean()), low, high,
        mean([run.cause for run in runs]), mean([run.isolation for run in runs]), mean([run.iia_soft for run in runs]),
        whole, sum(run.n_selected for run in runs) / len(runs), runs[0].n_masked, runs[0].same_region,
    )  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """Returns the results as a table in Markdown."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    lines = [
        "| features | IIA | 95% | cause | isolation | IIA, soft | cause of all | selected | same region |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        selected = f"{one.selected:.0f} of {one.masked}"
        lines.append(
            f"| {one.method} | {one.iia:.3f} | {one.low:.3f} to {one.high:.3f} | {shown(one.cause)} | "
            f"{shown(one.isolation)} | {shown(one.soft)} | {shown(one.whole)} | {selected} | {shown(one.same_region)} |"
        )
    return "\n".join(lines)


def described(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns the results as values that JSON has, without masks."""
    return [{name: value for name, value in one._asdict().items() if name != "runs"} for one in results]


def write_results(path: StrPath, results: Sequence[Result], task: Task, layer: int | str) -> None:
    """Writes the results to a JSON file."""
    content = {
        "format": "mfa_kernels.localization",
        "layer": layer,
        "pairs": len(task.pairs),
        "judged": int(task.held_out.sum()),
        "accuracy": task.accuracy,
        "results": described(results),
    }
    atomic_write_json(path, content)

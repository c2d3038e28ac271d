"""A mixture, a store, and a model where there is one: what the pages of the explorer are made from."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_mixture, check_model
from mfa_kernels.common.sharing import shareable
from mfa_kernels.data.language_model import check_evaluating, resolve_layer
from mfa_kernels.explorer.cached import Cache, cached_assignments
from mfa_kernels.explorer.catalog import Catalog
from mfa_kernels.explorer.layout import Layout
from mfa_kernels.explorer.playground import MOST_CHARACTERS, MOST_TOKENS, Playground
from mfa_kernels.explorer.texts import Texts, number, whole
from mfa_kernels.interpret.contexts import check_store, check_tokenizer
from mfa_kernels.interpret.figures import KINDS
from mfa_kernels.interpret.labels import Label
from mfa_kernels.interpret.lens import Lens
from mfa_kernels.interpret.neighbors import Centroids
from mfa_kernels.interpret.regions import interesting_regions
from mfa_kernels.interpret.topics import GenreCounts, genre_counts, topic_direction, topic_regions, topics

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore
    from mfa_kernels.mixture.mfa import MFA

EXAMPLES = (
    "The first thing to know is",
    "Yesterday we went to",
    "In the end, it was",
    "My grandmother always said that",
    "def main():\n",
)


class Explorer:
    """What the pages show; everything that does not change is computed once, here or when it is first asked for.

    Args:
        mfa: the mixture.
        store: activations with their tokens, of the mixture's width.
        tokenizer: the Hugging Face tokenizer of these tokens.
        model: the language model, in evaluation mode: for texts of the user's own, the lens and the playground.
        layer: the layer that the mixture is of; `mfa.extra["layer"]` when None.
        labels: labels of regions.
        progress: show progress bars.

    Raises:
        IndexError, TypeError, ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        mfa: MFA,
        store: ActivationStore,
        tokenizer: Any,
        model: Any = None,
        layer: int | str | None = None,
        *,
        labels: Mapping[int, Label] | None = None,
        progress: bool = True,
    ) -> None:
        self.mfa, self.store, self.tokenizer, self.model = check_mixture(mfa), store, tokenizer, model
        check_store(store)
        check_tokenizer(tokenizer)
        self.layer = mfa.extra.get("layer") if layer is None else layer
        if model is not None:
            check_evaluating(check_model(model))
            if self.layer is None:
                raise ValueError("layer must be given: the mixture does not say which layer it was fitted to")
            self.layer = resolve_layer(model, self.layer)[0]
        self.labels = {k: Label(*map(whole, (of.label, of.explanation, of.by))) for k, of in (labels or {}).items()}
        self.model_lock = threading.Lock()
        self._cache = Cache(mfa, store)
        self.assigned = cached_assignments(self._cache, mfa, store, progress)
        self.texts = Texts(store, tokenizer)
        self.catalog = Catalog(self.assigned, self.texts, self.labels)
        self.owning: list[int] = (self.assigned.counts > 0).nonzero().squeeze(1).tolist()
        self.layout = Layout(mfa.means.detach()[self.owning], self._cache)
        self.playground = Playground(self)

    def steered(self) -> tuple[Any, int | str]:
        """Returns the model and the layer that the mixture is of.

        Raises:
            LookupError: no model is loaded.
        """
        if self.model is None or self.layer is None:
            raise LookupError("no language model is loaded: start the explorer with --model")
        return self.model, self.layer

    @cached_property
    def lens(self) -> Lens | None:
        """The logit lens; None without a model, or for one whose logits it cannot read."""
        if self.model is None:
            return None
        try:
            with self.model_lock:
                return Lens(self.model, self.mfa)
        except ValueError:
            return None

    @cached_property
    def centroids(self) -> Centroids:
        """Distances between regions, prepared."""
        with torch.no_grad():
            return Centroids(self.mfa)

    @cached_property
    def topics(self) -> list[dict[str, Any]]:
        """The regions that say most about genres, best first."""
        if not self.texts.genres:
            return []
        options: dict[str, Any] = {"counts": self._counts, "assigned": self.assigned, "progress": False}
        found = topics(self.mfa, self.store, self.tokenizer, 24, **options)
        return [
            {
                "genre": self._counts.number(topic.genre),
                "component": topic.component,
                "label": self.catalog.labels[topic.component],
                "share": number(topic.share),
                "words": topic.words,
                "n_words": topic.n_words,
            }
            for topic in found
        ]

    @cached_property
    def _counts(self) -> GenreCounts:
        return genre_counts(self.mfa, self.store, assigned=self.assigned, progress=False)

    @lru_cache  # noqa: B019  # lives as long as the process, as an explorer does
    def topic_direction(self, genre: int) -> Tensor:
        """The set of regions that stand for a genre, as one direction to add, (D,)."""
        return topic_direction(self.mfa, self._counts, self._counts.names[genre])

    def topic(self, genre: int, most: int = 24) -> dict[str, Any]:
        """Returns the set of regions that stand for a genre, the heaviest first."""
        components, weights = topic_regions(self._counts, self._counts.names[genre])
        heaviest = list(zip(components.tolist(), weights.tolist()))[:most]
        regions = [{"component": k, "label": self.catalog.labels[k], "weight": weight} for k, weight in heaviest]
        return {"genre": genre, "n_regions": len(components), "regions": regions}

    def best(self, n: int) -> list[int]:
        """Returns at most n regions worth showing first: topics, where sources tell genres, else peculiar ones."""
        topics = [topic["component"] for topic in self.topics[:n]]
        return topics or interesting_regions(self.mfa, self.store, n, assigned=self.assigned, progress=False)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What every page shows of the mixture and the store."""
        meta = getattr(self.store, "meta", {})
        said = self.mfa.extra.get("model", meta.get("model"))
        name = None if said is None else shareable(str(said))
        return {
            "title": "Regions" if name is None else f"Regions of {name}",
            "model": name,
            "layer": None if self.layer is None else str(self.layer),
            "n_components": self.mfa.n_components,
            "n_features": self.mfa.n_features,
            "rank": self.mfa.rank,
            "rows": len(self.assigned.components),
            "skipped": self.assigned.skipped,
            "documents": len(self.texts.sources),
            "owned": len(self.owning),
            "mean_responsibility": number(self.assigned.responsibilities.nanmean()),
            "genres": self.texts.genres,
            "can_read": self.model is not None,
            "can_steer": self.model is not None,
            "lens": self.lens is not None,
            "max_prompt": MOST_CHARACTERS,
            "max_new_tokens": MOST_TOKENS,
            "examples": list(EXAMPLES),
            "topics": self.topics,
        }

    def map(self) -> dict[str, Any]:
        """Returns the places of all regions that own rows, in columns; asks for better ones where there may be."""
        self.layout.refine()
        final, name, places = self.layout.is_final, self.layout.name, self.layout.places
        owning = torch.tensor(self.owning, dtype=torch.int64)
        return {
            "layout": name,
            "is_final": final,
            "components": self.owning,
            "x": [round(x, 4) for x in places[:, 0].tolist()],
            "y": [round(y, 4) for y in places[:, 1].tolist()],
            "share": [float(f"{share:.3g}") for share in self.catalog.share[owning].tolist()],
            "genre": self.catalog.genre[owning].tolist(),
            "kind": [self.catalog.kinds[k] for k in self.owning],
            "kinds": list(KINDS),
            "label": [self.catalog.labels[k] for k in self.owning],
        }

    def search(self, query: str, most: int = 30) -> dict[str, Any]:
        """Returns the tokens that contain a text with the regions that own them, and places where the text stands."""
        ids = (
            self.texts.tokens_with(query, self.catalog.totals.nonzero().squeeze(1).tolist())[:most]
            if query.strip()
            else []
        )
        owners = self.catalog.owners(ids, 8)
        tokens = [
            {
                "token_id": i,
                "token": self.texts.token(i),
                "total": int(self.catalog.totals[i]),
                "regions": [{"component": k, "label": self.catalog.labels[k], "count": n} for k, n in owners[i]],
            }
            for i in ids
        ]
        places, found = self.texts.find(query, most)
        contexts = []
        for place in places:
            row = self.texts.row_at(place)
            if row is None:
                passage = self.texts.passage(place, self.assigned)
                contexts.append(
                    passage | dict.fromkeys(("row", "responsibility", "distance")) | {"component": -1, "folded": 0}
                )
            else:
                contexts.append(self.texts.context(row, self.assigned))
        return {"tokens": tokens, "contexts": contexts, "found": found}

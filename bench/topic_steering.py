"""python -m bench.topic_steering --out FOLDER: does SmolLM2-135M turn toward topics, and by which way best?

The model reads the genres that ship with the package, and mixtures are fitted to several layers. The four genres with
the best topics (`topics`, by score, before anything is steered) are steered to from eight open prompts and eight seeds,
every way with the same draws. Compared are (x <- x + alpha v at every token, unless said otherwise):

    set        v = the set of regions that stand for the genre, `topic_direction`
    one        v = the centroid of the genre's best topic, less the mean
    toward     x <- (1 - alpha) x + alpha mu_k, that topic
    means      v = the difference between the genre's mean and that of the others: labels, and no mixture
    random     v random, the same for all topics

with alpha such that KL(steered || unsteered) of the token after the prompt is a given number of nats on average over
the prompts. Reported, over all prompts and seeds:

    share      of the words written, those that are the genre's (`genre_words`, of the texts that the mixture read)
    nll        of what was written under the unsteered model, nats per token

The mark: a share of 3 times the unsteered and 2 times the random direction's, at no more than 1 nat. FOLDER keeps
activations, mixtures and results, and what is there is not measured again; it belongs to these settings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels import MFA, fit, harvest, steer
from mfa_kernels.commands.topic_demo import KL, LAYER, PROMPTS, TEMPERATURE
from mfa_kernels.data import ActivationStore
from mfa_kernels.data.genres import genre_of, genre_texts
from mfa_kernels.interpret.contexts import assignments
from mfa_kernels.interpret.genre_words import genre_words, word_share
from mfa_kernels.interpret.topics import GenreCounts, Topic, genre_counts, topic_direction, topics
from mfa_kernels.models import load_language_model
from mfa_kernels.steering import Add, Handle, Toward, alpha_for_kl
from mfa_kernels.steering.continuations import continuations, negative_log_likelihood, padded

LAYERS = (12, 18, 21, LAYER)
TIMES_UNSTEERED, TIMES_RANDOM, NATS = 3.0, 2.0, 1.0  # the mark
FARTHEST = 64.0


class Way(NamedTuple):
    """A way to steer to a topic: its name, the KL to reach in nats, and what is added to which layers."""

    name: str
    kl: float
    kind: str
    layers: tuple[int, ...] = (LAYER,)
    components: int = 0  # of the mixture; 0: as the options say
    options: tuple[tuple[str, str], ...] = ()  # of `steer`


def ways(components: int) -> list[Way]:
    """All that is tried, the demonstration's first."""
    return [
        *(Way("set of regions", kl, "set") for kl in (KL, 2 * KL, KL / 2)),
        Way("one region, added", KL, "one"),
        Way("one region, interpolated", KL, "toward"),
        Way("set, layer 18", KL, "set", (18,)),
        Way("set, layers 18, 21 and 24", KL, "set", (18, 21, 24)),
        Way("difference in means (supervised)", KL, "means"),
        Way("set, norms kept", KL, "set", options=(("norm", "keep"),)),
        Way("set, what is generated alone", KL, "set", options=(("positions", "generated"),)),
        Way("set, layer 12", KL, "set", (12,)),
        Way(f"set, K={4 * components}", KL, "set", components=4 * components),
    ]


class Layer(NamedTuple):
    """A layer's activations (N, D), their genres (N,), and a mixture of them with its counts and topics."""

    store: ActivationStore
    mfa: MFA
    counts: GenreCounts
    topics: list[Topic]


class Bench:
    """The model, what was harvested and fitted, and the prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, self.tokenizer = load_language_model("smollm2")
        folder = options.out / "activations"
        if not folder.exists():
            harvest(
                self.model, self.tokenizer, genre_texts(), list(LAYERS), folder, max_tokens=options.tokens, seed=None
            )
        self.stores = {layer: ActivationStore(folder / f"model.layers.{layer}") for layer in LAYERS}
        self.layers: dict[tuple[int, int], Layer] = {}
        self.prompts = padded(self.model, self.tokenizer, PROMPTS)

    def layer(self, number: int, components: int) -> Layer:
        """A layer with a mixture of so many components."""
        if (number, components) not in self.layers:
            store, place = self.stores[number], self.options.out / f"layer{number}-K{components}"
            if not place.exists():
                fit(store, components, self.options.rank, seed=0).save_pretrained(place)
            mfa = MFA.from_pretrained(place)
            assigned = assignments(mfa, store)
            counts = genre_counts(mfa, store, assigned=assigned)
            found = topics(mfa, store, self.tokenizer, components, counts=counts, assigned=assigned)
            self.layers[number, components] = Layer(store, mfa, counts, found)
        return self.layers[number, components]

    @cached_property
    def words(self) -> dict[str, frozenset[str]]:
        """The words of each genre, of the texts that were read."""
        store = self.stores[LAYER]
        read = ((store.source(i), store.document_tokens(i).tolist()) for i in range(store.n_documents))
        return genre_words((str(genre_of(source)), self.tokenizer.decode(ids)) for source, ids in read)

    def best(self, number: int, components: int, genre: str) -> int:
        """The component of the best topic of a genre."""
        return next(t.component for t in self.layer(number, components).topics if t.genre == genre)

    def direction(self, way: Way, number: int, genre: str) -> Tensor:
        """What a way adds to a layer, (D,)."""
        layer = self.layer(number, way.components or self.options.components)
        if way.kind == "set":
            return topic_direction(layer.mfa, layer.counts, genre)
        x = layer.store.tensor()
        if way.kind == "one":
            return layer.mfa.means[self.best(number, layer.mfa.n_components, genre)].detach() - x.mean(0)
        documents, _ = layer.store.places
        inside = torch.tensor([genre_of(layer.store.source(i)) == genre for i in range(layer.store.n_documents)])
        difference = x[inside[documents]].mean(0) - x[~inside[documents]].mean(0)
        if way.kind == "means":
            return difference
        random = torch.randn(len(difference), generator=torch.Generator().manual_seed(0))
        return random * (difference.norm() / random.norm())

    def specs(self, way: Way, genre: str) -> dict[int, Callable[[float], Any]]:
        """The intervention of each layer, as a function of alpha."""
        if way.kind == "toward":
            component = self.best(LAYER, self.options.components, genre)
            return {LAYER: lambda alpha: Toward(component, alpha)}
        directions = {number: self.direction(way, number, genre) for number in way.layers}
        return {number: lambda alpha, v=v: Add(v, alpha) for number, v in directions.items()}

    def measure(self, way: Way | None, genre: str) -> dict[str, Any]:
        """Alpha, the share of the words of every genre, the NLL, and what the first seed wrote; None: unsteered."""
        with ExitStack() as steered:
            alpha, handles = 0.0, []
            if way is not None:
                specs, given = self.specs(way, genre), dict(way.options)
                for number in specs:
                    mfa = self.layer(number, way.components or self.options.components).mfa
                    handle = steer(self.model, mfa, number, interventions=[], norm=given.get("norm"))
                    handles.append(steered.enter_context(handle))
                alpha = self.alpha(way, handles, list(specs.values()))
                for handle in handles:  # only now: while alpha is looked for, nothing is generated
                    handle.update(positions=given.get("positions", "all"))
            written = continuations(
                self.model, self.tokenizer, PROMPTS, range(self.options.seeds), self.options.new_tokens, TEMPERATURE
            )
        nll = float(negative_log_likelihood(self.model, written).mean())
        shares = {name: word_share(written.texts, words) for name, words in self.words.items()}
        return {"alpha": alpha, "shares": shares, "nll": nll, "texts": written.texts[: len(PROMPTS)]}

    def alpha(self, way: Way, handles: list[Handle], specs: list[Callable[[float], Any]]) -> float:
        """Returns the alpha of all layers at which a way reaches its KL, and leaves them steered by it."""

        def spec(alpha: float) -> Any:
            for handle, other in zip(handles[1:], specs[1:]):
                handle.update(interventions=other(alpha))
            return specs[0](alpha)

        most = 1.0 if way.kind == "toward" else FARTHEST
        found = alpha_for_kl(self.model, self.prompts, handles[0], way.kl, spec=spec, most=most, tolerance=0.02)
        handles[0].update(interventions=spec(found))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--components", type=int, default=128)
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--topics", type=int, default=4)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    found = bench.layer(LAYER, options.components).topics
    genres = list(dict.fromkeys(topic.genre for topic in found))[: options.topics]
    for genre in genres:
        topic = next(topic for topic in found if topic.genre == genre)
        print(f"{genre}: region {topic.component}, score {topic.score:.2f}: {' '.join(topic.words)}", flush=True)
    place = options.out / "results.json"
    results: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}

    def measured(way: Way | None, genre: str = "") -> dict[str, Any]:
        name = "unsteered" if way is None else f"{way.name} | {way.kl} | {genre}"
        if name not in results:
            results[name] = bench.measure(way, genre or genres[0])
            place.write_text(json.dumps(results, indent=1))
        return results[name]

    unsteered = measured(None)
    lines = ["| way | KL | " + " | ".join(genres) + " | meet the mark |", "|---|---|" + "---|" * (len(genres) + 1)]

    def line(name: str, kl: float, scores: dict[str, dict[str, Any]], met: str = "") -> None:
        cells = " | ".join(f"{scores[g]['shares'][g]:.1%} ({scores[g]['nll'] - unsteered['nll']:+.2f})" for g in genres)
        lines.append(f"| {name} | {kl:g} | {cells} | {met} |")
        print(lines[-1], flush=True)

    line("unsteered", 0, dict.fromkeys(genres, unsteered))
    randoms: dict[float, dict[str, Any]] = {}
    for way in ways(options.components):
        if way.kl not in randoms:
            randoms[way.kl] = measured(Way("random direction", way.kl, "random"))
            line("random direction", way.kl, dict.fromkeys(genres, randoms[way.kl]))
        scores = {genre: measured(way, genre) for genre in genres}
        met = sum(is_met(scores[genre], unsteered, randoms[way.kl], genre) for genre in genres)
        line(way.name, way.kl, scores, f"{met} of {len(genres)}")
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def is_met(steered: dict[str, Any], unsteered: dict[str, Any], random: dict[str, Any], genre: str) -> bool:
    """True where a genre's share and the likelihood of what was written meet the mark."""
    share = steered["shares"][genre]
    times = share >= TIMES_UNSTEERED * unsteered["shares"][genre] and share >= TIMES_RANDOM * random["shares"][genre]
    return bool(times and steered["nll"] <= unsteered["nll"] + NATS)


if __name__ == "__main__":
    main()

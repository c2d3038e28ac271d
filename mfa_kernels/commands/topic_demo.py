"""The second half of `mfa-kernels demo`: topics of a language model, and its text turning toward them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.data.store import ActivationStore
from mfa_kernels.interpret.contexts import Assignments, top_contexts
from mfa_kernels.interpret.genre_words import genre_words, marked, word_share
from mfa_kernels.interpret.topics import GenreCounts, Topic, topic_direction, topic_regions
from mfa_kernels.steering import Add, Handle, alpha_for_kl, steer
from mfa_kernels.steering.continuations import Continuations, continuations, negative_log_likelihood, padded

LAYER = 24
"""The layer of SmolLM2-135M, of 30, where regions tell topics (docs/demo.md)."""

DEPTH = 0.8
"""Where that is in a model of another depth."""

KL = 0.5
"""Nats by which steering moves the distribution of the token after a prompt, on average over the prompts."""

TEMPERATURE = 0.8

PROMPTS = (
    "The first thing to know is", "Yesterday we", "In the end,", "It is important that", "When they arrived,",
    "Most people think that", "After that, she", "There was once",
)  # fmt: skip
"""Beginnings that belong to no genre."""

_FARTHEST = 64.0  # times a direction, at most
_TOLERANCE = 0.02  # of the KL: a search for alpha costs a pass of the model per step


class Written(NamedTuple):
    """What was written one way: texts, their negative log-likelihood under the unsteered model, and alpha."""

    texts: list[str]
    nll: float
    alpha: float


def chosen_topics(found: Sequence[Topic], n: int) -> list[Topic]:
    """Returns the best topic of each of the n genres with the best ones; `found` is sorted."""
    best: dict[str, Topic] = {}
    for topic in found:
        best.setdefault(topic.genre, topic)
    return list(best.values())[:n]


def show_topics(
    mfa: MFA, store: ActivationStore, tokenizer: Any, found: Sequence[Topic], assigned: Assignments
) -> None:
    """Prints topics: genre, region, the share of its rows in the genre, what it says of it, words and a context."""
    of = {topic.component: topic for topic in found}
    contexts = top_contexts(mfa, store, tokenizer, list(of), 1, assigned=assigned, progress=False)
    print(f"\n{len(found)} topics: regions from which the genre of a text can be told, in many different words")
    print("(share: of the region's tokens in that genre; nats: what it says about the genre of other texts; words:")
    print("how many different ones it owns, and those that set it apart; a context, the token in [brackets])\n")
    print(f"{'region':>6}  {'genre':<12} {'share':>5}  nats  words")
    for topic in found:
        print(
            f"{topic.component:>6}  {topic.genre:<12} {topic.share:>5.0%} {topic.gain:>5.2f} {topic.n_words:>6}  "
            f"{' '.join(topic.words)}"
        )
        for context in contexts[topic.component]:
            print(f"{'':>8}{context.before[-52:]}[{context.token}]{context.after[:36]}")


def show_steering(
    model: Any,
    tokenizer: Any,
    mfa: MFA,
    layer: int | str,
    store: ActivationStore,
    training_rows: int,
    counts: GenreCounts,
    chosen: Sequence[Topic],
    *,
    prompts: Sequence[str] = PROMPTS,
    seeds: int = 4,
    new_tokens: int = 32,
    kl: float = KL,
    seed: int = 0,
) -> dict[str, Any]:
    """Steers toward topics, prints texts and a table, and returns the numbers of the table.

    For each topic, the set of regions that stand for its genre is added (`topic_direction`), with the alpha at which
    the distribution of the next token moves by `kl`; a random direction, with its own alpha, moves it as far.
    """
    words = _words(store, tokenizer, counts, training_rows)
    inputs = padded(model, tokenizer, prompts)
    generator = torch.Generator().manual_seed(seed)
    ways: dict[str, Tensor | None] = {"unsteered": None, "random": torch.randn(mfa.n_features, generator=generator)}
    ways |= {_toward(topic): topic_direction(mfa, counts, topic.genre) for topic in chosen}
    written: dict[str, Written] = {}
    with steer(model, mfa, layer, interventions=[]) as handle:
        for name, direction in ways.items():
            alpha = 0.0 if direction is None else _aim(model, inputs, handle, direction, kl)
            made = continuations(
                model, tokenizer, prompts, range(seed, seed + seeds), new_tokens, TEMPERATURE
            )  # fmt: skip
            written[name] = Written(made.texts, _nll(model, handle, made), alpha)
    _show_texts(counts, chosen, written, words, prompts, kl)
    return _show_table(chosen, written, words, len(prompts), seeds)


def _toward(topic: Topic) -> str:
    return f"toward {topic.genre}"


def _words(
    store: ActivationStore, tokenizer: Any, counts: GenreCounts, training_rows: int
) -> dict[str, frozenset[str]]:
    """Returns the words of each genre in the texts of the first rows, those that the mixture was fitted to."""
    documents, _ = store.places
    read = []
    for document in documents[:training_rows].unique().tolist():
        if (genre := counts.of_source.get(store.source(document))) is not None:
            read.append((genre, tokenizer.decode(store.document_tokens(document).tolist())))
    return genre_words(read)


def _aim(model: Any, inputs: dict[str, Tensor], handle: Handle, direction: Tensor, kl: float) -> float:
    """Returns the alpha at which adding a direction moves the next token by `kl`, and leaves the handle there."""

    def spec(alpha: float) -> Add:
        return Add(direction, alpha)

    handle.update(interventions=[])
    alpha = alpha_for_kl(model, inputs, handle, kl, spec=spec, most=_FARTHEST, tolerance=_TOLERANCE)
    handle.update(interventions=spec(alpha))
    return alpha


def _nll(model: Any, handle: Handle, written: Continuations) -> float:
    with handle.paused():
        return float(negative_log_likelihood(model, written).mean())


def _show_texts(
    counts: GenreCounts,
    chosen: Sequence[Topic],
    written: dict[str, Written],
    words: dict[str, frozenset[str]],
    prompts: Sequence[str],
    kl: float,
) -> None:
    """Prints, for each topic, a few of the prompts, which take turns, and a text of each way by one rule for all."""
    each = max(1, len(prompts) // max(1, len(chosen)))
    print(
        "\nTexts after open prompts: of each way's, the one with the most of the genre's words, which stand in *stars*"
    )
    print(
        f"({len(written['unsteered'].texts) // len(prompts)} texts a way, by one rule and with the same draws for all)"
    )
    for i, topic in enumerate(chosen):
        components, _ = topic_regions(counts, topic.genre)
        first = ", ".join(map(str, components[:3].tolist()))
        print(
            f"\nToward {topic.genre}: x <- x + {written[_toward(topic)].alpha:.2f} v, v made of {len(components)} of "
            f"the regions, {first} the heaviest ({kl:g} nats after the prompt)"
        )
        own = words[topic.genre]
        for place in range(i * each, (i + 1) * each):
            number = place % len(prompts)
            print(f"\n  {prompts[number]!r}")
            for name in ("unsteered", _toward(topic), "random"):
                best = max(written[name].texts[number :: len(prompts)], key=lambda text: word_share([text], own))
                print(f"    {name + ':':<20} {marked(best, own)!r}")


def _show_table(
    chosen: Sequence[Topic],
    written: dict[str, Written],
    words: dict[str, frozenset[str]],
    n_prompts: int,
    n_seeds: int,
) -> dict[str, Any]:
    print(f"\nWords of the genre among all that were written after {n_prompts} prompts from {n_seeds} seeds, and the")
    print("negative log-likelihood of the text under the unsteered model, in nats per token\n")
    ways = f"{'unsteered':>10}{'random':>8}{'steered':>9}"
    print(f"{'':<14}{'share of its words':^34}  {'nats per token':^27}")
    print(f"{'toward':<14}{ways}{'times':>7}  {ways}")
    rows = {}
    for topic in chosen:
        shares = {
            way: word_share(written[name].texts, words[topic.genre])
            for way, name in (("unsteered", "unsteered"), ("random", "random"), ("steered", _toward(topic)))
        }
        nll = {way: written[name].nll for way, name in zip(shares, ("unsteered", "random", _toward(topic)))}
        times = f"{shares['steered'] / shares['unsteered']:.1f}" if shares["unsteered"] else "-"
        percent = f"{shares['unsteered']:>10.1%}{shares['random']:>8.1%}{shares['steered']:>9.1%}"
        nats = f"{nll['unsteered']:>10.2f}{nll['random']:>8.2f}{nll['steered']:>9.2f}"
        print(f"{topic.genre:<14}{percent}{times:>7}  {nats}")
        rows[topic.genre] = {
            "component": topic.component, "alpha": written[_toward(topic)].alpha, "share": shares, "nll": nll,
        }  # fmt: skip
    return rows

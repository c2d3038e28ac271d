"""Topics: regions that tell which genre a text is of, and the set of them that says so together.

Most regions of a mixture are single tokens in their context. A topic is a region that owns many different words, and
from which the genre of the text can be told, in texts that it was not counted in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_choice, check_integer, check_mixture, check_number
from mfa_kernels.interpret.contexts import Assignments, check_tokenizer, ensure_assignments, show_token
from mfa_kernels.interpret.genre_words import FUNCTION_WORDS
from mfa_kernels.interpret.genres import genres_of
from mfa_kernels.mixture.decomposition import Decomposition, check_decomposition

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore

_PRIOR = 10.0  # rows of the overall distribution mixed into that of a region
_SHORTEST = 3  # letters of a word: most shorter ones are grammar, or pieces of words


@dataclass(frozen=True)
class Topic:
    """A region that tells the genre of a text.

    Attributes:
        genre: which; the source of a text where sources have no genres.
        component: the region.
        rows: how many rows it is the most responsible for.
        share: of these, the part in texts of that genre, in [0, 1].
        gain: nats by which a row's region helps to predict the genre of its text, the texts it was learnt from apart.
        n_words: distinct words among its rows, of three letters or more, in any case.
        score: gain * log(1 + n_words), by which topics are ranked.
        words: those that set it apart from the store, most telling first; words of grammar where it has no others.
    """

    genre: str
    component: int
    rows: int
    share: float
    gain: float
    n_words: int
    score: float
    words: list[str]


@dataclass(frozen=True, eq=False)
class GenreCounts:
    """How often each region occurs in each genre.

    Attributes:
        names: the genres, sorted; the sources of texts where these have no genres.
        are_genres: False where they are sources.
        components, genres, counts: the pairs of a region and a genre that occur, (P,) int64 each, sorted by region.
        gains: nats by which each region tells the genre, (K,) float64, as in `Topic`; 0 where it tells nothing.
        telling: of each pair, nats by which the region raises the genre, (P,) float64: log p(genre | region) - log
            p(genre), the first smoothed by the second.
        totals: rows of each genre, (G,) int64.
        of_source: the genre of each source that has one.
        n_components: K.
    """

    names: list[str]
    are_genres: bool
    components: Tensor
    genres: Tensor
    counts: Tensor
    gains: Tensor
    telling: Tensor
    totals: Tensor
    of_source: dict[str, str]
    n_components: int

    def number(self, genre: str) -> int:
        """Returns the number of a genre among `names`.

        Raises:
            ValueError: there is no such genre.
        """
        return self.names.index(check_choice(genre, tuple(self.names), "genre"))


def genre_counts(
    mfa: Decomposition, store: ActivationStore, *, assigned: Assignments | None = None, progress: bool = True
) -> GenreCounts:
    """Counts the rows of each region in each genre, or in each text where their sources tell no genres.

    The gain of a region is estimated text by text: the genre of a text's rows is predicted from the region's rows in
    all other texts, so that a region of one text does not seem to know its genre. Where texts are the groups, each row
    is predicted from the others.

    Args:
        mfa: the mixture, or another decomposition.
        store: activations with their tokens and sources, as `harvest` writes them; genres are the folders of the
            sources (`mfa_kernels.interpret.genres`).
        assigned: what `assignments` returned; computed here when None.
        progress: show a progress bar.
    """
    assigned = ensure_assignments(mfa, store, assigned, progress)
    sources = [store.source(document) for document in range(store.n_documents)]
    names, of_document = genres_of(sources)
    are_genres = bool(names)
    texts = {source: i for i, source in enumerate(sorted(set(sources)))}
    of_text = [texts[source] for source in sources]
    if not are_genres:
        names, of_document = list(texts), of_text
    documents, _ = store.places
    genre, text = torch.tensor(of_document)[documents], torch.tensor(of_text)[documents]
    counted = (assigned.components >= 0) & (genre >= 0)
    component, genre, text = assigned.components[counted].long(), genre[counted], text[counted]
    components, genres, counts = _pairs(component, genre, len(names))
    sizes = torch.bincount(component, minlength=assigned.n_components)
    totals = torch.bincount(genre, minlength=len(names))
    overall = totals.double() / totals.sum().clamp_min(1)

    def telling(held: Tensor, size: Tensor, group: Tensor) -> Tensor:
        return ((held + _PRIOR * overall[group]) / (size + _PRIOR) / overall[group]).log()

    if are_genres:
        # One entry for each region and text; all of a text's rows are of one genre.
        of_region, number, own = _pairs(component, text, len(texts))
        group = torch.zeros(len(texts), dtype=torch.int64).index_put_((text,), genre)[number]
        held = counts[torch.searchsorted(components * len(names) + genres, of_region * len(names) + group)]
    else:
        of_region, group, own, held = components, genres, torch.ones_like(counts), counts
    weight = own if are_genres else counts
    said = weight * telling(held - own, sizes[of_region] - own, group)
    gains = torch.zeros(assigned.n_components, dtype=torch.float64).index_add_(0, of_region, said)
    return GenreCounts(
        names, are_genres, components, genres, counts, (gains / sizes.clamp_min(1)).clamp_min(0),
        telling(counts, sizes[components], genres), totals,
        {source: names[i] for source, i in zip(sources, of_document) if i >= 0}, assigned.n_components,
    )  # fmt: skip


def topics(
    mfa: Decomposition,
    store: ActivationStore,
    tokenizer: Any,
    n: int = 12,
    *,
    n_words: int = 8,
    min_rows: int | None = None,
    counts: GenreCounts | None = None,
    assigned: Assignments | None = None,
    progress: bool = True,
) -> list[Topic]:
    """Returns the regions that say the most about the genre of a text and own the most words, best first.

    They are ranked by the nats that they say about the genre times log(1 + distinct words): a region of one token may
    give a genre away, as a verse number does, but is no topic.

    Args:
        mfa: the mixture, or another decomposition.
        store: activations with their tokens and sources; see `genre_counts`.
        tokenizer: the Hugging Face tokenizer of these tokens.
        n: how many at most.
        n_words: words listed of each, at most.
        min_rows: rows a region must have; a quarter of the average region and at least 20 when None.
        counts: what `genre_counts` returned; computed here when None.
        assigned: what `assignments` returned; computed here when None.
        progress: show a progress bar.
    """
    check_decomposition(mfa)
    check_tokenizer(tokenizer)
    n, n_words = check_integer(n, "n", 1), check_integer(n_words, "n_words")
    assigned = ensure_assignments(mfa, store, assigned, progress)
    if counts is None:
        counts = genre_counts(mfa, store, assigned=assigned, progress=progress)
    counts = _checked(counts, assigned.n_components)
    sizes = assigned.counts
    if min_rows is None:
        min_rows = max(20, int(sizes.sum()) // (4 * assigned.n_components))
    vocabulary, word = row_words(store, tokenizer)
    counted = (assigned.components >= 0) & (word >= 0)
    component, word = assigned.components[counted].long(), word[counted]
    owners, words, held = _pairs(component, word, len(vocabulary))
    distinct = torch.bincount(owners, minlength=assigned.n_components)
    scores = counts.gains * distinct.double().log1p()
    scores[sizes < check_integer(min_rows, "min_rows")] = 0
    best = scores.argsort(descending=True, stable=True)[:n]
    starts = torch.searchsorted(owners, torch.arange(assigned.n_components + 1)).tolist()
    frequency = torch.bincount(word, minlength=len(vocabulary)).double() / max(len(word), 1)

    def described(k: int) -> Topic:
        mine = counts.components == k
        most = int((counts.counts[mine] * counts.telling[mine]).argmax())
        here = slice(starts[k], starts[k + 1])
        share = held[here] / held[here].sum()
        telling = share * (share / frequency[words[here]]).log()
        order = telling.argsort(descending=True, stable=True)
        order = order[telling[order] > 0]
        listed = [vocabulary[i] for i in words[here][order].tolist()]
        listed = [word for word in listed if word not in FUNCTION_WORDS] or listed
        return Topic(
            counts.names[int(counts.genres[mine][most])], k, int(sizes[k]),
            float(counts.counts[mine][most] / counts.counts[mine].sum()), float(counts.gains[k]), int(distinct[k]),
            float(scores[k]), listed[:n_words],
        )  # fmt: skip

    return [described(k) for k in best[scores[best] > 0].tolist()]


def topic_regions(counts: GenreCounts, genre: str, n: int | None = None, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Returns the set of regions that stand for a genre, and their weights, heaviest first.

    The weight of a region is its rows in the genre times the nats by which it raises the genre, if it raises it at all
    and is known to from more than one text (its gain is above `least`). Together they are the part of the mutual
    information of region and genre that is about this genre.

    Args:
        counts: what `genre_counts` returned.
        genre: one of `counts.names`.
        n: how many regions at most; all when None.
        least: nats of gain below which a region is left out.

    Returns:
        Components (S,) int64, and their weights (S,) float64, which sum to 1.

    Raises:
        ValueError: no region says anything of that genre.
    """
    counts, least = _checked(counts), check_number(least, "least")
    here = counts.genres == counts.number(genre)
    components = counts.components[here]
    weights = counts.counts[here] * counts.telling[here].clamp_min(0)
    weights[counts.gains[components] <= least] = 0
    order = weights.argsort(descending=True, stable=True)[: None if n is None else check_integer(n, "n", 1)]
    order = order[weights[order] > 0]
    if not len(order):
        raise ValueError(f"genre: no region says anything of {genre!r}")
    return components[order], weights[order] / weights[order].sum()


def topic_direction(mfa: Any, counts: GenreCounts, genre: str, n: int | None = None, least: float = 0.0) -> Tensor:
    """Returns the set of regions that stand for a genre as one direction to add, (D,) float32.

    sum_k w_k mu_k - sum_k q_k mu_k, with the weights of `topic_regions` and q the share of each region in the rows.

    Args:
        mfa: the mixture, with `means` (K, D).
        counts, genre, n, least: as for `topic_regions`.
    """
    check_mixture(mfa)
    components, weights = topic_regions(_checked(counts, mfa.n_components), genre, n, least)
    means = mfa.means.detach().double().cpu()
    overall = torch.zeros(mfa.n_components, dtype=torch.float64).index_add_(
        0, counts.components, counts.counts.double()
    )
    return (weights @ means[components] - overall @ means / overall.sum()).float()


def row_words(store: ActivationStore, tokenizer: Any) -> tuple[list[str], Tensor]:
    """Returns the distinct words of a store, lower case, and the number of the word that each row is a part of.

    A word is a run of letters of three or more, which may be several tokens.

    Returns:
        The words (W), and (N,) int64 with -1 for rows that are no part of a word.
    """
    documents, positions = store.places
    shown: dict[int, str] = {}
    numbers: dict[str, int] = {}
    found = torch.full((len(documents),), -1, dtype=torch.int64)
    wanted, starts = documents.unique_consecutive(return_counts=True)
    at = 0
    for document, size in zip(wanted.tolist(), starts.tolist()):
        ids = store.document_tokens(document).tolist()
        for i in set(ids).difference(shown):
            shown[i] = show_token(tokenizer, i)
        of_token = torch.tensor(_words([shown[i] for i in ids], numbers))
        found[at : at + size] = of_token[positions[at : at + size]]
        at += size
    return list(numbers), found


def _words(tokens: list[str], numbers: dict[str, int]) -> list[int]:
    """Returns the word of each token of a text, -1 for none; new words are added to `numbers`."""
    found: list[int] = []
    run = 0  # tokens of the word so far
    text = ""

    def end() -> None:
        word = text.strip("·").lower()
        number = numbers.setdefault(word, len(numbers)) if len(word) >= _SHORTEST and word.isalpha() else -1
        found.extend([number] * run)

    for token in tokens:
        if run and not token[:1].isalpha():
            end()
            run, text = 0, ""
        run, text = run + 1, text + token
    end()
    return found


def _pairs(first: Tensor, second: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the distinct pairs (P,), (P,) in ascending order, and how often each occurs, (P,)."""
    keys, counts = torch.unique(first * max(width, 1) + second, return_counts=True)
    return keys // max(width, 1), keys % max(width, 1), counts


def _checked(counts: GenreCounts, n_components: int | None = None) -> GenreCounts:
    if not isinstance(counts, GenreCounts):
        raise TypeError(f"counts must be what `genre_counts` returned, got {type(counts).__name__}")
    if n_components is not None and counts.n_components != n_components:
        raise ValueError(f"counts are of {counts.n_components} components, but mfa has {n_components}")
    return counts

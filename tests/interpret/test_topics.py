"""Topics planted in texts of two genres."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.data.genres import genre_of, genre_texts, genres
from mfa_kernels.data.store import ActivationStore, ActivationStoreWriter
from mfa_kernels.interpret.contexts import assignments
from mfa_kernels.interpret.genre_words import genre_words, marked, word_share
from mfa_kernels.interpret.topics import genre_counts, row_words, topic_direction, topic_regions, topics
from tests.interpret.planted import Words

SEA = [" ship", " whale", " boat", " mast", " sail", " tide"]
WORDS = Words([*SEA, " clause", " the", " har", "poon", "s", ".", " only"])
# Regions: 0 is at sea, in many words; 1 is law, in one word; 2 is everywhere; 3 is in one text of law alone.
MEANS = torch.eye(4, 6) * 50


def planted(folder: Path, sources: list[str], one_text: str = "") -> tuple[MFA, ActivationStore]:
    mfa = MFA.from_parameters(MEANS, torch.zeros(4, 6, 1), torch.ones(6), torch.ones(4))
    generator = torch.Generator().manual_seed(0)
    with ActivationStoreWriter(folder, 6, torch.float32, {}) as writer:
        for source in sources:
            tokens, regions = [], []
            for i in range(12):
                own = (i % len(SEA), 0) if "sea" in source else (6, 1)
                tokens += [own[0], 7]
                regions += [own[1], 2]
            if source == one_text:
                tokens += [*range(6), 12] * 4
                regions += [3] * 28
            rows = MEANS[regions] + torch.randn(len(regions), 6, generator=generator)
            writer.add_document(tokens, list(range(len(tokens))), rows, source)
    return mfa, ActivationStore(folder)


FOLDERS = [f"texts/{genre}/{i}.txt" for i in range(6) for genre in ("law", "sea")]


def test_a_topic_has_many_words_and_tells_the_genre(tmp_path: Path) -> None:
    mfa, store = planted(tmp_path, FOLDERS)
    found = topics(mfa, store, WORDS, progress=False)
    assert [(t.genre, t.component) for t in found] == [("sea", 0), ("law", 1)]  # and the one that is everywhere is none
    sea, law = found
    assert (sea.rows, sea.share, sea.n_words, law.n_words) == (72, 1.0, 6, 1)
    assert sorted(sea.words) == sorted(word.strip() for word in SEA)
    assert sea.gain == pytest.approx(law.gain)
    for topic in found:
        assert topic.score == pytest.approx(topic.gain * math.log1p(topic.n_words))
    assert topics(mfa, store, WORDS, 1, n_words=2, progress=False)[0].words == sea.words[:2]
    assert topics(mfa, store, WORDS, min_rows=73, progress=False) == []


def test_the_gain_is_that_of_texts_left_out(tmp_path: Path) -> None:
    mfa, store = planted(tmp_path, FOLDERS, one_text=FOLDERS[0])
    counts = genre_counts(mfa, store, progress=False)
    assert counts.names == ["law", "sea"]
    assert counts.are_genres
    assert float(counts.gains[3]) == 0  # it knows its one text, and nothing of the genre
    share = counts.totals / counts.totals.sum()
    predicted = (60 + 10 * share[1]) / (60 + 10)  # five texts of 12 rows, and ten rows of the store
    assert float(counts.gains[0]) == pytest.approx(math.log(predicted / share[1]))
    assert {t.component for t in topics(mfa, store, WORDS, progress=False)} == {0, 1}
    components, _ = topic_regions(counts, "law")
    assert components.tolist() == [1]
    components, _ = topic_regions(counts, "law", least=-1)
    assert sorted(components.tolist()) == [1, 3]  # what is everywhere is no more frequent in law


def test_texts_without_folders_are_groups_themselves(tmp_path: Path) -> None:
    mfa, store = planted(tmp_path, ["sea", "law"])
    counts = genre_counts(mfa, store, progress=False)
    assert counts.names == ["law", "sea"]
    assert not counts.are_genres
    assert topics(mfa, store, WORDS, min_rows=1, progress=False)[0].genre == "sea"


def test_a_set_of_regions_is_a_direction(tmp_path: Path) -> None:
    mfa, store = planted(tmp_path, FOLDERS)
    assigned = assignments(mfa, store, progress=False)
    counts = genre_counts(mfa, store, assigned=assigned)
    components, weights = topic_regions(counts, "sea")
    assert components.tolist() == [0]
    assert weights.tolist() == [1.0]
    share = assigned.counts.double() / len(store)
    torch.testing.assert_close(topic_direction(mfa, counts, "sea"), (MEANS[0] - share @ MEANS.double()).float())


def test_words_are_whole(tmp_path: Path) -> None:
    with ActivationStoreWriter(tmp_path, 2, torch.float32, {}) as writer:
        writer.add_document([7, 8, 9, 10, 11, 10, 0], [1, 2, 4, 5, 6], torch.zeros(5, 2), "a")
        writer.add_document([9, 6], [0, 1], torch.zeros(2, 2), "b")
    words, number = row_words(ActivationStore(tmp_path), WORDS)
    shown = [words[i] if i >= 0 else None for i in number.tolist()]
    assert shown == ["harpoons", "harpoons", None, None, "ship", "poon", "clause"]


def test_errors_name_the_argument(tmp_path: Path) -> None:
    mfa, store = planted(tmp_path, FOLDERS)
    counts = genre_counts(mfa, store, progress=False)
    with pytest.raises(ValueError, match="genre must be one of 'law', 'sea', got 'jazz'"):
        topic_regions(counts, "jazz")
    with pytest.raises(ValueError, match="no region says anything of 'sea'"):
        topic_regions(counts, "sea", least=10)
    with pytest.raises(TypeError, match="counts must be what `genre_counts` returned, got list"):
        topic_direction(mfa, [], "sea")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        topics(mfa, store, WORDS, 0)


def test_the_bundled_texts_are_many_documents_of_each_genre() -> None:
    texts = genre_texts()
    assert len({source for source, _ in texts}) == len(texts)
    found = [genre_of(source) for source, _ in texts]
    assert genres() == sorted(set(found))  # type: ignore[type-var]
    assert len(genres()) == 8
    for part in (found, found[-24:]):  # its last tenth may be held out
        assert all(part.count(genre) >= 2 for genre in genres())
    assert all(1500 < len(text) < 4000 and "Gutenberg" not in text for _, text in texts)
    assert sum(len(text.encode()) for _, text in texts) < 600_000
    assert genre_of("a.txt") is None


def test_words_of_a_genre_are_frequent_in_it_alone() -> None:
    sea = "The ship's whale and the boat. A whale! " * 5
    law = "The clause and the boat, whale of a clause: it's 12 " * 5
    words = genre_words([("sea", sea), ("law", law)], lift=1.5)
    assert words == {"sea": {"ship's", "whale"}, "law": {"clause", "it's"}}
    assert genre_words([("sea", sea), ("law", law)], lift=1.5, least=6)["sea"] == {"whale"}
    assert word_share(["A whale, the WHALE", "of 12 clauses"], words["sea"]) == pytest.approx(2 / 6)
    assert word_share([], words["sea"]) == 0
    assert marked("A Whale, whales.", words["sea"]) == "A *Whale*, whales."

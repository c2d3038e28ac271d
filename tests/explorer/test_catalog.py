"""The line of each region, against counts taken one by one."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from mfa_kernels.explorer import Explorer
from mfa_kernels.explorer.catalog import Catalog


def _tokens(explorer: Explorer, k: int) -> Counter[int]:
    return Counter(explorer.store.tokens[explorer.assigned.rows(k)].tolist())


def test_columns_are_the_counts(explorer: Explorer) -> None:
    catalog, n = explorer.catalog, len(explorer.store)
    for k in range(explorer.mfa.n_components):
        rows, counts, line = explorer.assigned.rows(k), _tokens(explorer, k), catalog.line(k)
        assert line["rows"] == len(rows)
        assert line["share"] == pytest.approx(len(rows) / n)
        assert line["distinct"] == len(counts)
        entropy = -sum(c / len(rows) * math.log(c / len(rows)) for c in counts.values())
        assert line["entropy"] == pytest.approx(entropy, abs=1e-5)
        if len(rows):
            assert line["responsibility"] == pytest.approx(float(explorer.assigned.responsibilities[rows].mean()))
            genres = Counter(explorer.texts.genre[explorer.texts.documents[rows]].tolist())
            genre, most = genres.most_common(1)[0]
            assert line["purity"] == pytest.approx(most / len(rows))
            assert genres[line["genre"]] == most == genres[genre]


def test_telling_tokens_are_those_of_the_largest_part_of_the_divergence(explorer: Explorer) -> None:
    totals = Counter(explorer.store.tokens.tolist())
    n = len(explorer.store)
    for k in explorer.owning:
        counts = _tokens(explorer, k)
        size = sum(counts.values())
        part = {i: c / size * math.log(c / size / (totals[i] / n)) for i, c in counts.items()}
        expected = sorted((value for value in part.values() if value > 0), reverse=True)[:24]
        telling = explorer.catalog.telling(k)
        found = [entry["count"] / size * math.log(entry["count"] / size / (entry["total"] / n)) for entry in telling]
        assert found == pytest.approx(expected, abs=1e-6)


def test_labels_are_given_or_made_of_tokens(explorer: Explorer) -> None:
    assert explorer.catalog.line(1)["label"] == "of <b>one</b>"
    assert explorer.catalog.line(1)["named"] is True
    other = explorer.catalog.line(explorer.owning[-1])
    assert other["named"] is False
    assert other["label"] == "  ".join(other["tokens"][:3])


@pytest.mark.parametrize("sort", Catalog.COLUMNS)
def test_select_sorts_and_cuts(explorer: Explorer, sort: str) -> None:
    total, lines = explorer.catalog.select(sort, False, 0, 100)
    assert total == len(lines) == explorer.mfa.n_components
    values = [line[sort].strip("·⏎⇥ ").lower() if sort == "label" else line[sort] for line in lines]
    assert values == sorted(values)
    total, lines = explorer.catalog.select(sort, True, 0, 100)
    values = [line[sort].strip("·⏎⇥ ").lower() if sort == "label" else line[sort] for line in lines]
    assert values == sorted(values, reverse=True)
    equal = [(a["component"], b["component"]) for a, b, x, y in zip(lines, lines[1:], values, values[1:]) if x == y]
    assert all(first < second for first, second in equal), "equal ones by number"
    assert explorer.catalog.select(sort, True, 2, 3)[1] == lines[2:5]


def test_select_by_genre_and_words(explorer: Explorer) -> None:
    total, lines = explorer.catalog.select("share", True, 0, 100, genre=0)
    assert {line["genre"] for line in lines} == {0}
    assert total == int((explorer.catalog.genre == 0).sum())
    assert [line["component"] for line in explorer.catalog.select("share", True, 0, 100, query="<B>one")[1]] == [1]
    assert 3 in [line["component"] for line in explorer.catalog.select("share", True, 0, 100, query="3")[1]]
    assert explorer.catalog.select("share", True, 0, 100, query="no such word") == (0, [])


def test_owners_of_a_token(explorer: Explorer) -> None:
    token = int(explorer.store.tokens[0])
    owners = Counter(explorer.assigned.components[explorer.store.tokens == token].tolist())
    assert explorer.catalog.owners([token], 50)[token] == [
        (k, n) for n, k in sorted(((n, k) for k, n in owners.items()), key=lambda pair: (-pair[0], pair[1]))
    ]


def test_genres_of_a_region(explorer: Explorer) -> None:
    for k in explorer.owning:
        genres = explorer.catalog.genres(k)
        assert sum(entry["share"] for entry in genres) == pytest.approx(1.0)
        assert [entry["share"] for entry in genres] == sorted((entry["share"] for entry in genres), reverse=True)


def test_a_region_without_rows(explorer: Explorer) -> None:
    empty = [k for k in range(explorer.mfa.n_components) if not explorer.assigned.counts[k]]
    for k in empty:
        line = explorer.catalog.line(k)
        assert (line["rows"], line["share"], line["genre"], line["tokens"]) == (0, 0.0, -1, [])
    assert torch.equal(explorer.catalog.counts, explorer.assigned.counts)

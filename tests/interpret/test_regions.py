"""What sets regions apart, and which of them are shown."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.interpret.contexts import assignments, show_token
from mfa_kernels.interpret.regions import _gain, interesting_regions, region_summaries
from tests.interpret.planted import MemoryStore, Words, planted

WORDS = Words()


def test_summaries_count_what_is_there(mfa: MFA, store: MemoryStore, region: torch.Tensor) -> None:
    finite = store.activations.isfinite().all(-1)
    tokens = store.tokens
    totals = Counter(tokens[finite].tolist())
    summaries = region_summaries(mfa, store, WORDS, n_tokens=12, progress=False)
    assert [s.component for s in summaries] == [0, 1, 2, 3]
    assert sum(s.share for s in summaries) == pytest.approx(1)
    for s in summaries:
        held = Counter(tokens[finite & (region == s.component)].tolist())
        assert s.rows == sum(held.values())
        assert {t.token_id: (t.count, t.total) for t in s.tokens} == {i: (c, totals[i]) for i, c in held.items()}
        for t in s.tokens:
            lift = (t.count / s.rows) / (t.total / int(finite.sum()))
            assert t.lift == pytest.approx(lift, rel=1e-5)
            assert t.token == show_token(WORDS, t.token_id)
        telling = [t.count / s.rows * math.log(t.lift) for t in s.tokens]
        assert telling == sorted(telling, reverse=True)
        assert len(s.contexts) == 5


def _speaking_store(kinds: list[list[int]], rows: int = 60) -> tuple[MFA, MemoryStore]:
    """One region per list of tokens, from which its rows take theirs in turn; rows of different regions alternate."""
    generator = torch.Generator().manual_seed(0)
    means = 20 * torch.randn(len(kinds), 6, generator=generator)
    mfa = MFA.from_parameters(means, torch.zeros(len(kinds), 6, 0), torch.ones(6), torch.ones(len(kinds)))
    region = torch.randperm(rows * len(kinds), generator=generator) % len(kinds)
    seen = [0] * len(kinds)
    tokens = []
    for k in region.tolist():
        tokens.append(kinds[k][seen[k] % len(kinds[k])])
        seen[k] += 1
    return mfa, MemoryStore(means[region] + torch.randn(len(region), 6, generator=generator), [tokens])


def test_a_token_that_occurred_once_is_not_the_most_telling() -> None:
    mfa, store = _speaking_store([[7, 7, 7, 8], [8, 8, 8, 7]])
    row = int(assignments(mfa, store, progress=False).rows(0)[0])
    store.documents[0][row] = 15  # nowhere else: the largest lift
    tokens = region_summaries(mfa, store, WORDS, [0], progress=False)[0].tokens
    assert [t.token_id for t in tokens] == [7, 15]
    assert tokens[1].lift > tokens[0].lift


def test_specific_regions_that_differ_come_first() -> None:
    everything = list(range(12))
    mfa, store = _speaking_store([everything, [7], everything, [7], [8, 9], everything, everything])
    first, second, third = interesting_regions(mfa, store, 3, progress=False)
    assert {first, second} in ({1, 4}, {3, 4})  # the other region of token 7 says the same
    assert third in (1, 3)


def test_regions_that_are_too_small_are_left_out() -> None:
    mfa, store = _speaking_store([[0, 1, 2], [7], [8]])
    assert len(interesting_regions(mfa, store, progress=False)) == 3
    assert interesting_regions(mfa, store, min_rows=61, progress=False) == []


def test_what_comes_before_makes_a_region_interesting() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(12, (4000,), generator=generator)
    # All regions share the tokens' distribution; region 1 is what follows a full stop, the others are drawn by lot.
    after = torch.cat([torch.tensor([False]), tokens[:-1] == 11])
    region = torch.where(after, 1, 2 * torch.randint(2, (4000,), generator=generator))
    means = 20 * torch.randn(3, 6, generator=generator)
    mfa = MFA.from_parameters(means, torch.zeros(3, 6, 0), torch.ones(6), torch.ones(3))
    store = MemoryStore(means[region], [tokens.tolist()])
    assert interesting_regions(mfa, store, 1, progress=False) == [1]


def test_a_document_is_read_once(mfa: MFA, store: MemoryStore) -> None:
    assert len(interesting_regions(mfa, store, progress=False)) == 4
    assert sorted(store.decoded) == list(range(20))


def test_the_gain_of_a_random_group_is_not_positive() -> None:
    """The plain estimate of the divergence finds nats where there are none; held-out prediction does not."""
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.arange(1, 1001).float().reciprocal()
    frequencies /= frequencies.sum()
    tokens = torch.multinomial(frequencies, 64, replacement=True, generator=generator)
    ids, counts = tokens.unique(return_counts=True)
    plain = float((counts / 64 * (counts / 64 / frequencies[ids]).log()).sum())
    gain = _gain(torch.zeros_like(ids), counts, frequencies[ids], 1)
    assert plain > 0.5
    assert float(gain) < 0.1
    same = _gain(torch.tensor([0]), torch.tensor([64]), frequencies[99:100], 1)
    assert float(same) == pytest.approx(float(-frequencies[99].log()), rel=0.1)


def test_assignments_of_other_data_are_refused(mfa: MFA, store: MemoryStore) -> None:
    other = assignments(planted(40)[0], planted(40)[1], progress=False)
    with pytest.raises(ValueError, match="assigned holds 40 rows"):
        region_summaries(mfa, store, WORDS, assigned=other)

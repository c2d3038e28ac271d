"""Regions at a glance: their tokens, examples, and which of them are worth showing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_components, check_integer
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.interpret.contexts import (
    Assignments,
    Context,
    check_tokenizer,
    ensure_assignments,
    show_token,
    top_contexts,
)
from mfa_kernels.mixture.decomposition import Decomposition, check_decomposition

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore

_PRIOR = 10.0  # tokens of the overall distribution mixed into that of a region


@dataclass(frozen=True)
class TokenShare:
    """A token of a region.

    Attributes:
        token_id: the token.
        token: as `show_token` gives it.
        count: rows of the region with it.
        total: rows of the store with it.
        lift: its frequency in the region over its frequency in the store.
    """

    token_id: int
    token: str
    count: int
    total: int
    lift: float


@dataclass(frozen=True)
class RegionSummary:
    """A region at a glance.

    Attributes:
        component: which.
        rows: how many rows it is the most responsible for.
        share: that over all finite rows.
        tokens: what sets it apart, most telling first.
        contexts: examples, nearest to the centroid first.
    """

    component: int
    rows: int
    share: float
    tokens: list[TokenShare]
    contexts: list[Context]


def _token_table(groups: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct (group, token) pairs in ascending order, and how often each occurs."""
    width = int(tokens.max()) + 1 if tokens.numel() else 1
    keys, counts = torch.unique(groups.long() * width + tokens, return_counts=True)
    return keys // width, keys % width, counts


def region_summaries(
    mfa: Decomposition,
    store: ActivationStore,
    tokenizer: Any,
    components: Sequence[int] | None = None,
    n_tokens: int = 8,
    n_contexts: int = 5,
    *,
    before: int = 10,
    after: int = 10,
    assigned: Assignments | None = None,
    progress: bool = True,
) -> list[RegionSummary]:
    """Returns, per region, its share of the rows, the tokens that set it apart, and a few examples.

    Tokens are ordered by p log(p / q), p their frequency in the region and q in the store: the part of the divergence
    KL(region || store) that is theirs. The lift p / q alone would put first whatever occurred once.

    Args:
        mfa: the mixture, or another decomposition.
        store: activations with their tokens.
        tokenizer: the Hugging Face tokenizer of these tokens.
        components: which regions; all when None.
        n_tokens: at most so many tokens each, all of them with a lift above 1.
        n_contexts: at most so many examples each, all different.
        before, after: tokens of text on either side.
        assigned: what `assignments` returned; computed here when None.
        progress: show a progress bar.

    Returns:
        In the order of `components`.
    """
    count = check_decomposition(mfa).n_components
    check_tokenizer(tokenizer)
    chosen = list(range(count)) if components is None else check_components(components, count)
    n_tokens, n_contexts = check_integer(n_tokens, "n_tokens"), check_integer(n_contexts, "n_contexts")
    before, after = check_integer(before, "before"), check_integer(after, "after")
    assigned = ensure_assignments(mfa, store, assigned, progress)
    counts = assigned.counts
    finite = assigned.components >= 0
    tokens = store.tokens[finite].long()
    totals = torch.bincount(tokens)
    groups, ids, held = _token_table(assigned.components[finite], tokens)
    lift = (held / counts[groups]) / (totals[ids] / len(tokens))
    telling = held / counts[groups] * lift.log()
    starts = torch.searchsorted(groups, torch.arange(mfa.n_components + 1)).tolist()

    def tokens_of(k: int) -> list[TokenShare]:
        here = slice(starts[k], starts[k + 1])
        best = telling[here].argsort(descending=True, stable=True)[:n_tokens] + starts[k]
        return [
            TokenShare(
                int(ids[i]), show_token(tokenizer, int(ids[i])), int(held[i]), int(totals[ids[i]]), float(lift[i])
            )
            for i in best[telling[best] > 0].tolist()
        ]

    contexts: dict[int, list[Context]] = {}
    if n_contexts:
        options: dict[str, Any] = {"before": before, "after": after, "assigned": assigned, "progress": progress}
        contexts = top_contexts(mfa, store, tokenizer, chosen, n_contexts, "responsibility", **options)
    return [
        RegionSummary(k, int(counts[k]), int(counts[k]) / max(1, len(tokens)), tokens_of(k), contexts.get(k, []))
        for k in progress_bar(chosen, desc="summarise", unit="region", progress=progress)
    ]


def _gain(groups: Tensor, counts: Tensor, frequencies: Tensor, n_groups: int) -> Tensor:
    """Nats by which a group's tokens are better predicted from the group than from the store, (n_groups,).

    Each token is predicted from the others of its group, so that a group of few different tokens does not seem
    specific by chance: an estimate of KL(group || store) that is not biased upwards.

    Args:
        groups: group of each (group, token) pair, (P,).
        counts: of each pair, (P,).
        frequencies: in the store, of each pair's token, (P,).
    """
    sizes = torch.zeros(n_groups).index_add_(0, groups, counts.float())[groups]
    predicted = (counts - 1 + _PRIOR * frequencies) / (sizes - 1 + _PRIOR)
    return torch.zeros(n_groups).index_add_(0, groups, counts / sizes * (predicted / frequencies).log())


def interesting_regions(
    mfa: Decomposition,
    store: ActivationStore,
    n: int = 12,
    *,
    min_rows: int | None = None,
    samples: int = 64,
    assigned: Assignments | None = None,
    progress: bool = True,
) -> list[int]:
    """Returns regions worth showing: large enough, specific, and unlike one another.

    A region is specific if its tokens, or the tokens right before them, are far more predictable than in the store
    (held-out estimates of the divergence KL(region || store), added up). Regions are then taken one by one, best
    first, each discounted by how much its tokens and preceding tokens overlap with those already taken.

    Args:
        mfa: the mixture, or another decomposition.
        store: activations with their tokens.
        n: how many at most.
        min_rows: rows a region must have; a quarter of the average region and at least 20 when None.
        samples: rows per region whose preceding token is read.
        assigned: what `assignments` returned; computed here when None.
        progress: show a progress bar.

    Returns:
        Components, most interesting first.
    """
    n, samples = check_integer(n, "n", 1), check_integer(samples, "samples", 1)
    assigned = ensure_assignments(mfa, store, assigned, progress)
    counts = assigned.counts
    if min_rows is not None:
        min_rows = check_integer(min_rows, "min_rows")
    else:
        min_rows = max(20, int(counts.sum()) // (4 * mfa.n_components))
    candidates = (counts >= min_rows).nonzero().squeeze(1)
    if not len(candidates):
        return []
    tokens = store.tokens.long()
    nothing = int(tokens.max()) + 1  # what precedes the first token of a document
    looked_at = []
    for k in candidates.tolist():
        rows = assigned.rows(k)
        looked_at.append(rows[torch.linspace(0, len(rows) - 1, min(samples, len(rows))).round().long()])
    rows = torch.cat(looked_at)
    preceding = _tokens_before(store, rows, nothing, progress)
    group = torch.repeat_interleave(torch.arange(len(candidates)), torch.tensor([len(r) for r in looked_at]))
    score = torch.zeros(len(candidates))
    overlaps = []
    for kind in (tokens[rows], preceding):
        groups, ids, held = _token_table(group, kind)
        # The tokens of the store stand for those before them; one more of each, for those that only come before.
        frequencies = torch.bincount(tokens, minlength=int(kind.max()) + 1).float() + 1
        frequencies /= frequencies.sum()
        score += _gain(groups, held, frequencies[ids], len(candidates)).clamp_min(0)
        overlaps.append(_Overlap(groups, ids, held, len(candidates)))
    chosen: list[int] = []
    distinct = torch.ones(len(candidates))
    for _ in range(min(n, len(candidates))):
        value = score * distinct
        value[chosen] = -1
        best = int(value.argmax())
        chosen.append(best)
        shared = torch.stack([overlap(best) for overlap in overlaps]).mean(0)
        distinct = torch.minimum(distinct, 1 - shared)
    return candidates[chosen].tolist()


def _tokens_before(store: ActivationStore, rows: Tensor, nothing: int, progress: bool) -> Tensor:
    """The token before that of each row, (n,) int64; `nothing` where it is the first of its document."""
    ascending, order = rows.sort()
    listed = ascending.tolist()
    found: list[int] = []
    with progress_bar(total=len(listed), desc="compare", unit="row", unit_scale=True, progress=progress) as bar:
        while len(found) < len(listed):
            start = len(found)
            document = store.document(listed[start])
            stop = bisect_right(listed, document, start, key=store.document)  # its rows follow one another
            tokens = store.document_tokens(document).tolist()
            places = map(store.position, listed[start:stop])
            found += [tokens[place - 1] if place else nothing for place in places]
            bar.update(stop - start)
    return torch.empty_like(rows).scatter_(0, order, torch.tensor(found))


class _Overlap:
    """Bhattacharyya coefficient of token distributions, 1 where two groups are alike and 0 where they share nothing."""

    def __init__(self, groups: Tensor, ids: Tensor, counts: Tensor, n_groups: int):
        self.groups, self.ids, self.n_groups = groups, ids, n_groups
        sizes = torch.zeros(n_groups).index_add_(0, groups, counts.float())
        self.roots = (counts / sizes[groups]).sqrt()

    def __call__(self, group: int) -> Tensor:
        """Returns the sums of every group, (n_groups,)."""
        of_group = torch.zeros(int(self.ids.max()) + 1)
        mine = self.groups == group
        of_group[self.ids[mine]] = self.roots[mine]
        return torch.zeros(self.n_groups).index_add_(0, self.groups, self.roots * of_group[self.ids])

"""A line for each region of a mixture: its share, what its tokens and genres are, and its label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfa_kernels.explorer.texts import number
from mfa_kernels.interpret.contexts import Assignments
from mfa_kernels.interpret.figures import KINDS, token_kind

if TYPE_CHECKING:
    from mfa_kernels.explorer.texts import Texts
    from mfa_kernels.interpret.labels import Label

_TELLING = 8  # tokens of a region in its line
_IN_LABEL = 3


class Catalog:
    """All K regions, in columns.

    Attributes:
        counts: rows of each region, (K,) int64.
        share: of all finite rows, (K,).
        entropy: of the distribution of its tokens, in nats, (K,).
        distinct: how many different tokens it owns, (K,) int64.
        responsibility: mean over its rows, (K,).
        genre: the genre of most of its rows, (K,) int64; -1 for none.
        purity: the share of its rows in that genre, (K,).
        genre_counts: rows of each region and genre, (K, G) int64.
        labels: text of each region: a given label, or its most telling tokens.
    """

    COLUMNS = ("component", "share", "entropy", "distinct", "responsibility", "purity", "label", "genre")

    def __init__(self, assigned: Assignments, texts: Texts, labels: Mapping[int, Label]) -> None:
        self.texts, self.given = texts, labels
        count = assigned.n_components
        finite = assigned.components >= 0
        components = assigned.components[finite].long()
        tokens = texts.ids[texts.places[finite]]
        self.counts = torch.bincount(components, minlength=count)
        self.rows = int(self.counts.sum())
        self.share = self.counts / max(1, self.rows)
        sums = torch.zeros(count).index_add_(0, components, assigned.responsibilities[finite])
        self.responsibility = sums / self.counts.clamp_min(1)
        self._count_tokens(components, tokens)
        self._count_genres(components, texts.genre[texts.documents[finite]], len(texts.genres))
        self.tokens = [[entry["token"] for entry in self.telling(k, _TELLING)] for k in range(count)]
        self.labels = [self._label(k) for k in range(count)]
        self.kinds = [KINDS.index(token_kind(tokens[0]) if tokens else KINDS[-1]) for tokens in self.tokens]
        self._searched = [f"{label} {' '.join(tokens)}".lower() for label, tokens in zip(self.labels, self.tokens)]
        self._orders: dict[tuple[str, bool], Tensor] = {}

    def _count_tokens(self, components: Tensor, tokens: Tensor) -> None:
        count = len(self.counts)
        width = int(tokens.max()) + 1 if len(tokens) else 1
        keys, held = torch.unique(components * width + tokens, return_counts=True)
        groups, ids = keys // width, keys % width
        self.totals = torch.bincount(tokens, minlength=width)
        p = held / self.counts[groups]
        lift = p / (self.totals[ids] / max(1, self.rows))
        self.entropy = torch.zeros(count).index_add_(0, groups, -(p * p.log()))
        self.distinct = torch.bincount(groups, minlength=count)
        # Within a region, by p log(p / q): the part of KL(region || store) that is the token's.
        order = (p * lift.log()).argsort(descending=True, stable=True)
        order = order[groups[order].argsort(stable=True)]
        self._pairs = groups[order], ids[order], held[order], lift[order]
        self._starts = torch.searchsorted(self._pairs[0].contiguous(), torch.arange(count + 1)).tolist()

    def _count_genres(self, components: Tensor, genre: Tensor, genres: int) -> None:
        count = len(self.counts)
        known = genre >= 0
        flat = torch.bincount(components[known] * max(1, genres) + genre[known], minlength=count * max(1, genres))
        self.genre_counts = flat.view(count, -1)[:, :genres]
        if genres:
            most, index = self.genre_counts.max(1)
            self.purity = most / self.counts.clamp_min(1)
            self.genre = torch.where(most > 0, index, -1)
        else:
            self.purity, self.genre = torch.zeros(count), torch.full((count,), -1)

    def telling(self, k: int, most: int = 24) -> list[dict[str, Any]]:
        """Tokens that set a region apart, most telling first: its count in it and in the store, and its lift."""
        _, ids, held, lift = self._pairs
        here = slice(self._starts[k], min(self._starts[k + 1], self._starts[k] + most))
        return [
            {"token": self.texts.token(i), "count": c, "total": int(self.totals[i]), "lift": round(ratio, 3)}
            for i, c, ratio in zip(ids[here].tolist(), held[here].tolist(), lift[here].tolist())
            if ratio > 1
        ]

    def _label(self, k: int) -> str:
        if k in self.given:
            return self.given[k].label
        return "  ".join(self.tokens[k][:_IN_LABEL]) or f"region {k}"

    def line(self, k: int) -> dict[str, Any]:
        """Returns the line of a region, for JSON."""
        return {
            "component": k,
            "label": self.labels[k],
            "named": k in self.given,
            "rows": int(self.counts[k]),
            "share": number(self.share[k]),
            "entropy": number(self.entropy[k]),
            "distinct": int(self.distinct[k]),
            "responsibility": number(self.responsibility[k]),
            "genre": int(self.genre[k]),
            "purity": number(self.purity[k]),
            "tokens": self.tokens[k],
        }

    def genres(self, k: int) -> list[dict[str, Any]]:
        """The genres of a region's rows: share of its rows, and how much more that is than of all rows."""
        of_all = self.genre_counts.sum(0) / max(1, int(self.genre_counts.sum()))
        own = self.genre_counts[k] / max(1, int(self.counts[k]))
        order = own.argsort(descending=True).tolist()
        return [{"genre": g, "share": float(own[g]), "lift": number(own[g] / of_all[g])} for g in order if own[g] > 0]

    def select(
        self, sort: str, descending: bool, offset: int, limit: int, genre: int | None = None, query: str = ""
    ) -> tuple[int, list[dict[str, Any]]]:
        """Returns how many regions match, and the lines of a part of them.

        Args:
            sort: one of `COLUMNS`; equal ones by number.
            descending: the largest first.
            offset, limit: which part.
            genre: only regions of this genre.
            query: a number of a region, or a part of labels and telling tokens.
        """
        order = self._order(sort, descending)
        keep = torch.ones(len(order), dtype=torch.bool)
        if genre is not None:
            keep &= self.genre == genre
        if wanted := query.strip().lower():
            ways = {wanted, wanted.replace(" ", "·")}
            keep &= torch.tensor(
                [wanted == str(k) or any(way in text for way in ways) for k, text in enumerate(self._searched)]
            )
        order = order[keep[order]]
        return len(order), [self.line(k) for k in order[offset : offset + limit].tolist()]

    def _order(self, sort: str, descending: bool) -> Tensor:
        if (sort, descending) not in self._orders:
            if sort == "label":
                texts = [label.strip("·⏎⇥ ").lower() for label in self.labels]
                rank = {text: i for i, text in enumerate(sorted(set(texts)))}
                values = torch.tensor([rank[text] for text in texts])
            elif sort == "component":
                values = torch.arange(len(self.labels))
            else:
                values = getattr(self, sort)
            self._orders[sort, descending] = values.argsort(stable=True, descending=descending)
        return self._orders[sort, descending]

    def owners(self, token_ids: Sequence[int], most: int) -> dict[int, list[tuple[int, int]]]:
        """Returns, for each of some tokens, the regions that own the most of it, and how many each."""
        groups, ids, held, _ = self._pairs
        found = {}
        for token in token_ids:
            at = (ids == token).nonzero().squeeze(1)
            best = at[held[at].argsort(descending=True, stable=True)[:most]]
            found[token] = list(zip(groups[best].tolist(), held[best].tolist()))
        return found

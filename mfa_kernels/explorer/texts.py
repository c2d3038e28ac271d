"""The documents of a store in memory: tokens, the row of each, and where words stand in them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfa_kernels.interpret.contexts import Assignments, show_text, show_token
from mfa_kernels.interpret.genres import genres_of

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore

_LONGEST = 8  # tokens that one character is spread over, at most
_AROUND = 12  # tokens of a context on either side
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_NEAR_COPY = (-3, -2, -1, 0, 1)  # contexts that agree here, relative to their token, are shown as one


class Texts:
    """The documents of a store.

    Args:
        store: N rows, in D documents of T tokens in all; 24 bytes of memory a token.
        tokenizer: the Hugging Face tokenizer of these tokens.

    Attributes:
        ids: the token ids of all documents, one after another, (T,) int64.
        starts: where each document begins in them, (D + 1,) int64.
        places: where the token of each row is in them, (N,) int64.
        sources: the origin of each document.
        genres: names of the genres that the sources tell; empty where they tell none.
        genre: the genre of each document, (D,) int64; -1 for none.
        documents: the document of each row, (N,) int64.
    """

    def __init__(self, store: ActivationStore, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        documents = [store.document_tokens(d).long() for d in range(store.n_documents)]
        lengths = torch.tensor([0, *map(len, documents)])
        self.ids, self.starts = torch.cat([torch.empty(0, dtype=torch.int64), *documents]), lengths.cumsum(0)
        self.documents, positions = store.places
        self.places = self.starts[self.documents] + positions
        self._row = torch.full((len(self.ids),), -1).index_copy_(0, self.places, torch.arange(len(self.places)))
        self.sources = [whole(store.source(d)) for d in range(store.n_documents)]
        self.genres, genre = genres_of(self.sources)
        self.genre = torch.tensor(genre, dtype=torch.int64)
        self._pieces: dict[int, str] = {}
        self._tokens: dict[int, str] = {}
        self._searched: list[str] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def token(self, token_id: int) -> str:
        """A token as `show_token` gives it."""
        if token_id not in self._tokens:
            self._tokens[token_id] = show_token(self.tokenizer, token_id)
        return self._tokens[token_id]

    def piece(self, token_id: int) -> str:
        """A token in a text: its spaces stay spaces."""
        if token_id not in self._pieces:
            self._pieces[token_id] = show_text(self.tokenizer, [token_id])
        return self._pieces[token_id]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces of tokens in a row; a character that is spread over several of them is whole in the last."""
        found: list[str] = []
        held: list[int] = []
        for token_id in ids:
            piece = self.piece(token_id)
            if held or _BROKEN in piece:
                held.append(token_id)
                piece = show_text(self.tokenizer, held)
                if piece.endswith(_BROKEN) and len(held) < _LONGEST:
                    piece = ""
                else:
                    held = []
            found.append(piece)
        if held:
            found[-1] = show_text(self.tokenizer, held)
        return found

    def row_at(self, place: int) -> int | None:
        """Returns the row of the token at a place in `ids`; None where it was not kept."""
        row = int(self._row[place])
        return None if row < 0 else row

    def context(
        self, row: int, assigned: Assignments, around: int = _AROUND, folded: int = 0, **more: Any
    ) -> dict[str, Any]:
        """Returns a row in its text: the tokens around it, each with the region that owns it.

        Args:
            row: in [0, N).
            assigned: the regions of all rows.
            around: tokens on either side.
            folded: how many near-copies of it are not shown.
            more: further entries.
        """
        return self.passage(int(self.places[row]), assigned, around) | {
            "row": row,
            "component": int(assigned.components[row]),
            "responsibility": number(assigned.responsibilities[row]),
            "distance": number(assigned.distances[row]),
            "folded": folded,
            **more,
        }

    def passage(self, place: int, assigned: Assignments, around: int = _AROUND) -> dict[str, Any]:
        """Returns the tokens around a place in `ids`, as `context` does."""
        document = int(torch.searchsorted(self.starts, place, right=True)) - 1
        start = max(int(self.starts[document]), place - around)
        stop = min(int(self.starts[document + 1]), place + around + 1)
        rows = self._row[start:stop]
        kept = rows >= 0
        components = torch.where(kept, assigned.components[rows.clamp_min(0)].long(), -1)
        responsibilities = torch.where(kept, assigned.responsibilities[rows.clamp_min(0)], 0.0).nan_to_num(0.0)
        ids = self.ids[start:stop].tolist()
        pieces = self.pieces(ids)
        pieces[place - start] = pieces[place - start] or self.piece(ids[place - start])  # what it is about is seen
        tokens = [
            {"text": piece, "component": k, "responsibility": round(r, 4)}
            for piece, k, r in zip(pieces, components.tolist(), responsibilities.tolist())
        ]
        return {
            "document": self.sources[document],
            "genre": int(self.genre[document]),
            "at": place - start,
            "tokens": tokens,
        }

    def distinct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the first of each set of near-copies among rows, in their order, and the number of each set."""
        places = self.places[rows]
        starts = self.starts[self.documents[rows]]
        stops = self.starts[self.documents[rows] + 1]
        window = places.unsqueeze(1) + torch.tensor(_NEAR_COPY)
        inside = (window >= starts.unsqueeze(1)) & (window < stops.unsqueeze(1))
        keys = torch.where(inside, self.ids[window.clamp(0, max(0, len(self.ids) - 1))], -1)
        _, group = torch.unique(keys, dim=0, return_inverse=True)
        count = int(group.max()) + 1 if len(group) else 0
        first = torch.full((count,), len(rows)).scatter_reduce_(0, group, torch.arange(len(rows)), "amin")
        order = first.argsort()
        return rows[first[order]], torch.bincount(group, minlength=count)[order]

    def tokens_with(self, query: str, ids: Sequence[int]) -> list[int]:
        """Returns those of some token ids that a query names: equal ones first, then those that contain it."""
        wanted = query.replace(" ", "·").lower()
        found = [i for i in ids if wanted in self.token(i).lower()]
        bare = wanted.strip("·")
        return sorted(found, key=lambda i: (self.token(i).strip("·").lower() != bare, len(self.token(i))))

    def find(self, query: str, most: int) -> tuple[list[int], int]:
        """Returns places in `ids` where a text stands, whatever its capitals, and how many places there are.

        At most `most` are returned, spread over the documents; the place is that of the last token of the text.
        """
        wanted = query.replace("\n", "⏎").replace("\t", "⇥").lower()
        if not wanted.strip():
            return [], 0
        if self._searched is None:
            bounds = self.starts.tolist()
            ids = self.ids.tolist()
            self._searched = ["".join(self.pieces(ids[a:b])).lower() for a, b in pairwise(bounds)]
        counts = [text.count(wanted) for text in self._searched]
        holding = [d for d, count in enumerate(counts) if count]
        chosen = holding[:: max(1, len(holding) // most)][:most]
        places: list[int] = []
        per_document = max(1, most // max(1, len(chosen)))
        for document in chosen:
            places += self._inside(document, wanted, per_document)
        return places[:most], sum(counts)

    def _inside(self, document: int, wanted: str, most: int) -> list[int]:
        """Places in `ids` of the tokens at which a text ends, in one document."""
        assert self._searched is not None
        start, stop = int(self.starts[document]), int(self.starts[document + 1])
        # Of the lower-case text, because some characters have a longer one.
        ends = torch.tensor([len(piece.lower()) for piece in self.pieces(self.ids[start:stop].tolist())]).cumsum(0)
        found: list[int] = []
        at = self._searched[document].find(wanted)
        while at >= 0 and len(found) < most:
            found.append(start + int(torch.searchsorted(ends, at + len(wanted))))
            at = self._searched[document].find(wanted, at + len(wanted))
        return found


def whole(text: str) -> str:
    """A text that can be sent: halves of characters, as in names of files that are no UTF-8, become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def number(value: Any) -> float | None:
    """A number for JSON, which has neither NaN nor infinity: None."""
    value = float(value)
    return value if -float("inf") < value < float("inf") else None

"""A mixture planted in text: a store in memory, a tokenizer of a few words, regions that own known tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mfa_kernels import MFA

# What must not leak into HTML or mathematics, and what must be made visible.
VOCABULARY = [
    " the", "the", "\n", "    ", "<script>", "$x_{$", "_", " cat", " dog", "1", "2", ".", "&amp;", "\x1b", "\t", " of",
    "", "\N{REPLACEMENT CHARACTER}",
]  # fmt: skip


class Words:
    """What the library asks of a Hugging Face tokenizer."""

    def __init__(self, vocabulary: Sequence[str] = VOCABULARY):
        self.vocabulary = list(vocabulary)

    def decode(self, ids: Sequence[int], **options: object) -> str:
        return "".join(self.vocabulary[i] for i in ids)

    def convert_ids_to_tokens(self, index: int) -> str:
        return self.vocabulary[index].replace(" ", "Ġ") or f"<{index}>"


class MemoryStore:
    """The protocol of an `ActivationStore`, in memory: every token of every document has a row."""

    def __init__(self, activations: Tensor, documents: Sequence[Sequence[int]]):
        self.activations, self.documents = activations, [list(d) for d in documents]
        self.places = [(d, i) for d, document in enumerate(self.documents) for i in range(len(document))]
        assert len(self.places) == len(activations)
        self.n_features = activations.shape[1]
        self.asked: list[int] = []  # rows, one entry per call of rows()
        self.decoded: list[int] = []  # documents, one entry per call of document_tokens()

    def __len__(self) -> int:
        return len(self.activations)

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([self.documents[d][i] for d, i in self.places], dtype=torch.int32)

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        self.asked.append(len(index))
        return self.activations[index].to(dtype or self.activations.dtype)

    def batches(self, batch_size: int, shuffle: bool = False, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        assert not shuffle
        return (part.to(dtype) for part in self.activations.split(batch_size))

    def token(self, row: int) -> int:
        return int(self.tokens[row])

    def context(self, row: int, before: int = 10, after: int = 10) -> tuple[list[int], int]:
        d, i = self.places[row]
        start = max(0, i - before)
        return self.documents[d][start : i + after + 1], i - start

    def document(self, row: int) -> int:
        return self.places[row][0]

    def position(self, row: int) -> int:
        return self.places[row][1]

    def document_tokens(self, document: int) -> Tensor:
        self.decoded.append(document)
        return torch.tensor(self.documents[document], dtype=torch.int32)


def planted(
    n: int = 400, components: int = 4, features: int = 8, rank: int = 2, *, per_component: bool = False, seed: int = 0
) -> tuple[MFA, MemoryStore, Tensor]:
    """A mixture of regions far apart, n rows drawn from it as 20 documents, and the region of each row.

    Row 3 and the last are not finite. The token of a row of region k is 3 k, 3 k + 1 or 3 k + 2 (of 12).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    noise_shape = (components, features) if per_component else (features,)
    noise = 0.1 + 0.3 * torch.rand(noise_shape, generator=generator)
    means, loadings = 12 * normal(components, features), normal(components, features, rank)
    mfa = MFA.from_parameters(means, loadings, noise, torch.arange(1.0, components + 1))
    region = torch.multinomial(torch.arange(1.0, components + 1), n, replacement=True, generator=generator)
    z = normal(n, rank)
    x = means[region] + torch.einsum("ndr,nr->nd", loadings[region], z)
    x += noise.expand_as(means)[region].sqrt() * normal(n, features)
    x[3], x[-1, 0] = torch.nan, torch.inf
    tokens = (3 * region + torch.randint(3, (n,), generator=generator)) % 12
    documents = [part.tolist() for part in tokens.split(n // 20)]
    return mfa, MemoryStore(x, documents), region

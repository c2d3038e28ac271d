"""Activations while they are made: `stream`, fits that read it, and texts without an end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mfa_kernels
from mfa_kernels import fit, harvest
from mfa_kernels.data.harvest import stream
from mfa_kernels.data.language_model import load_language_model
from mfa_kernels.fitting import preparation
from tests.data.harvesting import LONG, TEXTS, Streamed, files, numbered, quiet
from tests.helpers.language import make_model, make_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")  # these models are too small for more


def test_a_stream_gives_the_rows_of_a_harvest(model: Any, tokenizer: Any) -> None:
    model.train()
    options = {"context": 9, "batch_size": 3}
    expected = quiet(model, tokenizer, LONG, 1, **options).tensor()
    batches = []
    for batch in stream(model, tokenizer, LONG, 1, **options):
        assert model.training, "between two batches the model is as it was"
        assert not any(module._forward_hooks for module in model.modules())
        batches.append(batch)
    assert len(batches) > 10
    assert torch.equal(torch.cat(batches), expected)
    first = torch.cat(list(stream(model, tokenizer, LONG, 1, max_tokens=50, **options)))
    assert torch.equal(first, quiet(model, tokenizer, LONG, 1, max_tokens=50, **options).tensor())
    torch.testing.assert_close(first, expected[:50], rtol=1e-5, atol=1e-5)  # whose windows share other passes
    batches = list(stream(model, tokenizer, LONG, [0, -2, "model.layers.1"], max_tokens=50, **options))
    assert all(list(batch) == [0, -2, "model.layers.1"] for batch in batches)
    for layer in (0, 1, 2):
        alone = list(stream(model, tokenizer, LONG, layer, max_tokens=50, **options))
        together = [batch[{0: 0, 1: "model.layers.1", 2: -2}[layer]] for batch in batches]
        assert len(alone) == len(together) > 2
        assert all(torch.equal(a, b) for a, b in zip(alone, together))
    with pytest.raises(ValueError, match="layer must name at least one layer"):
        stream(model, tokenizer, LONG, [])
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        stream(model, tokenizer, LONG, 1, batch_size=0)
    with pytest.raises(IndexError, match="layer"):
        stream(model, tokenizer, LONG, 9)


def test_fit_while_harvesting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 1500)
    model, tokenizer = load_language_model(None)
    texts = [f"def function_{i}(self, x):\n    return self.value_{i % 7} + {i} * x\n\n" * 4 for i in range(60)]
    options = {"context": 64, "batch_size": 4, "max_tokens": 4000}

    def fitted(batches: Iterator[Tensor], **more: Any) -> Any:
        return fit(batches, 8, 2, method="auto", held_out=0.0, batch_size=300, progress=False, **more)

    mfa = fitted(stream(model, tokenizer, texts, 1, **options))
    assert mfa.fit_report.method == "online"
    batches = list(stream(model, tokenizer, texts, 1, **options))
    head = next(rows for rows in accumulate(map(len, batches)) if rows >= 1500)
    assert mfa.fit_report.best_step == -(-(4000 - head) // 300)
    later = torch.cat(batches)[1800:]
    assert mfa(later) < fitted(iter(batches), epochs=0)(later) - 1, "the start has not seen these"
    assert torch.equal(torch.cat(batches), quiet(model, tokenizer, texts, 1, **options).tensor())
    again = fitted(iter(batches))
    assert all(torch.equal(a, b) for a, b in zip(mfa.state_dict().values(), again.state_dict().values()))


def test_fit_several_layers_while_harvesting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 1000)
    assert mfa_kernels.stream is stream
    model, tokenizer = load_language_model(None)
    passes = []
    model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    texts = [f"def function_{i}(self, x):\n    return self.value_{i % 7} + {i} * x\n\n" * 4 for i in range(40)]
    options = {"context": 64, "batch_size": 4, "max_tokens": 2500}
    fits = {
        "early": {"layer": 1, "n_components": 8, "rank": 2},
        "late": {"layer": 3, "n_components": 8, "rank": 2},
        "large": {"layer": 3, "n_components": 12, "rank": 3},
    }
    common: dict[str, Any] = {"batch_size": 250, "progress": False}
    mixtures = mfa_kernels.fit_many(stream(model, tokenizer, texts, [1, 3], **options), fits, **common)
    one_pass = len(passes)
    list(stream(model, tokenizer, texts, 0, **options))
    assert len(passes) == 2 * one_pass
    for name, own in fits.items():
        assert mixtures[name].fit_report.history[-1]["step"] >= 3
        layer = own.pop("layer")
        alone = mfa_kernels.fit(stream(model, tokenizer, texts, layer, **options), **own, **common)
        assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), mixtures[name].state_dict().values()))


@pytest.mark.parametrize("kind", ["generator", "IterableDataset", "torch"])
def test_an_endless_iterable_ends_with_max_tokens(llama: tuple, tmp_path: Path, kind: str) -> None:
    class OfTorch(torch.utils.data.IterableDataset):
        def __init__(self, taken: list[int]) -> None:
            self.taken = taken

        def __iter__(self) -> Iterator[str]:
            return numbered(self.taken)

        def __len__(self) -> int:
            return 1 << 40

    make = {"generator": numbered, "IterableDataset": Streamed, "torch": OfTorch}[kind]
    options = {"max_tokens": 400, "batch_size": 4, "buffer_size": 50}
    taken: list[int] = []
    store = quiet(*llama, make(taken), 0, tmp_path / "a", **options)
    assert len(store) == 400
    assert store.meta["buffer_size"] == 50
    assert len(taken) == 50 + 40, "the buffer, and what is needed"
    numbers = [int(store.source(d).split()[1]) for d in range(store.n_documents)]
    assert len(set(numbers)) == 40
    assert numbers != sorted(numbers)
    assert max(numbers) > 60
    quiet(*llama, make([]), 0, tmp_path / "b", **options)
    assert files(tmp_path / "b") == files(tmp_path / "a")
    other = quiet(*llama, make([]), 0, seed=1, **options)
    assert not torch.equal(other.tokens, store.tokens)
    rows = torch.cat(list(stream(*llama, make([]), 0, **options)))
    assert torch.equal(rows, store.tensor())


def test_by_default_a_thousand_texts_are_buffered(llama: tuple) -> None:
    taken: list[int] = []
    quiet(*llama, numbered(taken), 0, max_tokens=100)
    assert len(taken) == 1000 + 10


def test_a_buffer_larger_than_the_stream_gives_every_text_once(llama: tuple) -> None:
    store = quiet(*llama, islice(numbered([]), 30), 0, batch_size=4)
    sources = [store.source(d) for d in range(store.n_documents)]
    assert sorted(sources) == sorted(f"text {i}" for i in range(30))
    assert sources != sorted(sources, key=lambda name: int(name.split()[1]))
    small = quiet(*llama, islice(numbered([]), 30), 0, batch_size=4, buffer_size=7)
    assert sorted(small.source(d) for d in range(30)) == sorted(sources)
    assert [small.source(d) for d in range(30)] != sources


def test_the_order_of_sequences_is_that_of_earlier_versions(llama: tuple, tmp_path: Path) -> None:
    class Rows:  # as datasets.Dataset
        def __len__(self) -> int:
            return len(TEXTS)

        def __getitem__(self, i: int) -> dict[str, str]:
            return {"text": TEXTS[i]}

        def __iter__(self) -> Iterator[dict[str, str]]:
            return map(self.__getitem__, range(len(self)))

    expected = [f"text {i}" for i in torch.randperm(6, generator=torch.Generator().manual_seed(3)).tolist()]
    for texts in (TEXTS, tuple(TEXTS), Rows(), np.array(TEXTS)):
        store = quiet(*llama, texts, 0, seed=3, buffer_size=2)
        assert [store.source(d) for d in range(store.n_documents)] == expected
        assert "buffer_size" not in store.meta


def test_endless_texts_without_a_token_end(monkeypatch) -> None:
    monkeypatch.setattr("mfa_kernels.data.harvest.MOST_BARREN", 30)
    with pytest.raises(ValueError, match="texts: 30 in a row hold no token to keep"):
        harvest(make_model("llama"), make_tokenizer(bos=True), repeat(("empty", "")), 0, max_tokens=5)

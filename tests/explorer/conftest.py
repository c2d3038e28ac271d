"""An explorer over a planted store on disk, with a small language model whose layer the mixture is of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.data import ActivationStore
from mfa_kernels.data.harvest import harvest
from mfa_kernels.explorer import Explorer
from mfa_kernels.interpret.labels import Label
from tests.helpers.language import make_model, make_tokenizer, words

LAYER = 2
GENRES = {"cooking": range(0, 12), "sea": range(10, 22), "law": range(20, 32)}  # numbers of their words
HOSTILE = "texts/sea/<img src=x onerror=alert(1)>.txt"


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...


def texts() -> list[tuple[str, str]]:
    """Documents of three genres, each with words of its own."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for genre, own in GENRES.items():
        for i in range(6):
            picked = torch.randint(own.start, own.stop, (40,), generator=generator).tolist()
            found.append((f"texts/{genre}/{i}.txt", words(*picked)))
    return [*found, (HOSTILE, words(10, 11, 12, 13, 14))]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and a mixture of the small model's layer."""
    folder = tmp_path_factory.mktemp("explored")
    store = harvest(
        make_model("llama"), make_tokenizer(bos=True), texts(), LAYER, folder / "activations", context=64, seed=None
    )
    x = store.tensor()
    # A region for each of eight tokens, of all genres: the mean of its rows, and two directions in which they vary.
    known = store.tokens.unique()
    chosen = known[:: len(known) // 8][:8]
    means = torch.stack([x[store.tokens == token].mean(0) for token in chosen])
    generator = torch.Generator().manual_seed(1)
    loadings = 0.1 * torch.randn(len(chosen), x.shape[1], 2, generator=generator)
    mfa = MFA.from_parameters(means, loadings, x.var(0) * 0.2 + 1e-3, torch.ones(len(chosen)))
    mfa.extra = {"layer": f"model.layers.{LAYER}", "model": "tiny"}
    mfa.save_pretrained(folder / "mfa")
    return folder


@pytest.fixture
def store(folder: Path) -> ActivationStore:
    return ActivationStore(folder / "activations")


@pytest.fixture
def mfa(folder: Path) -> MFA:
    return MFA.from_pretrained(folder / "mfa")


@pytest.fixture
def explorer(mfa: MFA, store: ActivationStore) -> Iterator[Explorer]:
    made = Explorer(
        mfa, store, make_tokenizer(bos=True), make_model("llama").eval(), labels={1: Label("of <b>one</b>", "why")},
        progress=False,
    )  # fmt: skip
    yield made
    made.playground.close()

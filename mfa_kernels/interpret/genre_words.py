"""Words of a genre: those far more frequent in its texts than in others, and their share of what was written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_SHORTEST = 3  # letters
_SMOOTH = 2e-5  # the frequency added to that in other genres: a word that is not there is not infinitely telling

_GRAMMAR = """
the and but nor yet for off out not only very too also just then there here now ever never again once first two
three even still however therefore thus with from into onto upon over under about above below between among through
during before after since until against across along around behind beside beyond near down than that this these
those which who whom whose what when where why how while because though although unless whether are was were been
being does did done doing have has had having will would shall should can could may might must ought yes mine myself
our ours ourselves you your yours yourself his him himself she her hers herself its itself they them their theirs
themselves one ones some any each every all both few more most many much other others another such same own let like
"""
FUNCTION_WORDS = frozenset(_GRAMMAR.split())
"""Words of grammar, and numbers: they belong to no genre (modern ones; "thou" and "unto" are left to scripture)."""


def words_of(text: str) -> list[str]:
    """Returns the words of a text, lower case, in order."""
    return _WORD.findall(text.lower())


def genre_words(texts: Iterable[tuple[str, str]], lift: float = 4.0, least: int = 5) -> dict[str, frozenset[str]]:
    """Returns the words of each genre.

    A word of a genre has three letters or more, is no word of grammar, occurs at least `least` times in its texts, and
    at least `lift` times as often there as in all others together, per word of text.

    Args:
        texts: (genre, text) pairs.
        lift: how many times as frequent.
        least: how often it occurs.
    """
    counts: dict[str, Counter[str]] = {}
    for genre, text in texts:
        counts.setdefault(genre, Counter()).update(words_of(text))
    everywhere: Counter[str] = sum(counts.values(), Counter())
    total = sum(everywhere.values())
    found = {}
    for genre, own in counts.items():
        size = sum(own.values())
        found[genre] = frozenset(
            word
            for word, count in own.items()
            if count >= least
            and len(word) >= _SHORTEST
            and word not in FUNCTION_WORDS
            and count / size >= lift * ((everywhere[word] - count) / max(total - size, 1) + _SMOOTH)
        )
    return found


def word_share(texts: Iterable[str], words: Collection[str]) -> float:
    """Returns the share of the words of some texts that are among `words`, in [0, 1]; 0 where there are none."""
    written = [word for text in texts for word in words_of(text)]
    return sum(word in words for word in written) / max(len(written), 1)


def marked(text: str, words: Collection[str]) -> str:
    """Returns the text with a star on either side of each word that is among `words`."""
    return _WORD.sub(lambda found: f"*{found[0]}*" if found[0].lower() in words else found[0], text)

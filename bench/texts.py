"""Texts of eight clearly different genres, from Debian packages at fixed versions and the standard library.

Packages are downloaded by apt (which checks their signatures), unpacked without being installed, and read; nothing of
them is redistributed. Where there is no apt, or another text is wanted: a folder with a folder for each genre.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from mfa_kernels.common.files import temporary_folder
from mfa_kernels.data.tiny_lm.corpus import stdlib_texts

PACKAGES = {
    "anarchism": "15.3-3", "bible-kjv": "4.38", "bible-kjv-text": "4.38", "dict-devil": "1.0-13.1",
    "dict-foldoc": "20230119-1", "fortunes": "1:1.99.1-7.3", "perl-doc": "5.36.0-7+deb12u4",
    "wordnet-base": "1:3.0-37",
}  # fmt: skip
MOST = 8000  # characters of a document, so that a genre is many documents

Text = tuple[str, str]  # "genre/document", and the text


def debian_texts(cache: Path) -> list[Text]:
    """Returns the texts of all genres; packages are kept, unpacked, in `cache`."""
    return list(_cut((f"{genre}/{name}", text) for genre, read in GENRES.items() for name, text in read(cache)))


def folder_texts(folder: Path) -> list[Text]:
    """Returns the files of a folder that has one folder for each genre."""
    paths = [path for genre in sorted(folder.iterdir()) if genre.is_dir() for path in sorted(genre.rglob("*"))]
    texts = ((str(path.relative_to(folder)), path.read_text(errors="replace")) for path in paths if path.is_file())
    if not (found := list(_cut(texts))):
        raise ValueError(f"texts: {folder} must have a folder of texts for each genre, and has none")
    return found


def balanced(texts: list[Text], tokens: int, count: Callable[[str], int]) -> list[Text]:
    """Returns whole texts with an equal share of `tokens` from each genre, in random order, the same in every call.

    Raises:
        ValueError: naming a genre that has too little text.
    """
    texts = sorted(texts)
    random.Random(0).shuffle(texts)
    left = dict.fromkeys(sorted({genre_of(source) for source, _ in texts}), 0)
    left = dict.fromkeys(left, -(-tokens // len(left)))
    taken = []
    for source, text in texts:
        if left[genre_of(source)] > 0:
            left[genre_of(source)] -= count(text)
            taken.append((source, text))
    for genre, missing in left.items():
        if missing > 0:
            raise ValueError(f"texts: the genre {genre!r} has {missing:,} tokens too few")
    return taken


def genre_of(source: str) -> str:
    """Returns the genre in the source of a document."""
    return source.split("/", 1)[0]


def is_held_out(source: str) -> bool:
    """True for one document in ten, by a hash of its name; parts of one, "name#1", stay together."""
    name = source.split("#", 1)[0]
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10 == 0


def _cut(texts: Iterable[Text]) -> Iterator[Text]:
    for source, text in texts:
        if len(text := text[:MOST].strip()) >= 20:
            yield source, text


def _package(name: str, cache: Path) -> Path:
    """Returns the folder of an unpacked package."""
    folder = cache / f"{name}_{PACKAGES[name].replace(':', '%3a')}"
    if folder.is_dir():
        return folder
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise RuntimeError(f"{program} is not there to fetch {name}: give texts of your own with --texts FOLDER")
    cache.mkdir(parents=True, exist_ok=True)
    wanted = f"{name}={PACKAGES[name]}"
    with temporary_folder(folder) as temporary:
        done = subprocess.run(["apt-get", "download", "-qq", wanted], cwd=temporary, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"apt-get download {wanted}: {done.stderr.strip()} (versions are fixed; update its lists, or give "
                "texts of your own with --texts FOLDER)"
            )
        (package,) = temporary.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, temporary / folder.name], check=True)
        (temporary / folder.name).rename(folder)
    return folder


class _Words(HTMLParser):
    """The text of a page, a line for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden = tag in ("script", "style", "head")
        if tag in ("p", "h1", "h2", "h3", "li", "br", "div", "blockquote"):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = self._hidden and tag not in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def _politics(cache: Path) -> Iterator[Text]:
    for path in sorted((_package("anarchism", cache) / "usr/share/doc/anarchism/html").glob("sec*.html")):
        page = _Words()
        page.feed(path.read_text(errors="replace"))
        lines = (re.sub(r"\s+", " ", line).strip() for line in "".join(page.parts).split("\n"))
        text = "\n".join(line for line in lines if line)
        for i in range(0, len(text), MOST):  # a section is a chapter long
            yield f"{path.stem}#{i // MOST}", text[i : i + MOST]


def _scripture(cache: Path) -> Iterator[Text]:
    """Yields chapters. The text is compressed, and only the package's own program, which is run, can read it."""
    program = _package("bible-kjv", cache) / "usr/bin/bible"
    data = _package("bible-kjv-text", cache) / "usr/lib"
    command = [program, "-p", data, "-f", "Gen1:1-Rev22:21"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    chapters: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        where, verse = line.split(" ", 1)
        chapters.setdefault(where.split(":")[0], []).append(verse)
    for name, verses in chapters.items():
        yield name, " ".join(verses)


def _entries(package: str, cache: Path) -> Iterator[Text]:
    """Yields the entries of a dictionary of dictd, which its index finds by numbers in base 64."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    (index,) = (_package(package, cache) / "usr/share/dictd").glob("*.index")
    content = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())

    def number(text: str) -> int:
        found = 0
        for digit in text:
            found = 64 * found + digits.index(digit)
        return found

    seen = set()
    for line in index.read_text(errors="replace").splitlines():
        word, start, size = line.split("\t")[:3]
        if not word.startswith("00") and start not in seen:  # several words may lead to one entry
            seen.add(start)
            yield word, content[number(start) : number(start) + number(size)].decode(errors="replace")


def _fortunes(cache: Path) -> Iterator[Text]:
    for path in sorted((_package("fortunes", cache) / "usr/share/games/fortunes").iterdir()):
        if path.is_file() and not path.is_symlink() and not path.suffix:
            for i, cookie in enumerate(path.read_text(errors="replace").split("\n%\n")):
                yield f"{path.name}-{i}", cookie


def _perl(cache: Path) -> Iterator[Text]:
    for path in sorted(_package("perl-doc", cache).rglob("*.pod")):
        text = path.read_text(errors="replace")
        for i in range(0, min(len(text), 5 * MOST), MOST):
            yield f"{path.stem}#{i // MOST}", text[i : i + MOST]


def _glosses(cache: Path) -> Iterator[Text]:
    """Yields WordNet's senses: a word, and what it means."""
    for path in sorted((_package("wordnet-base", cache) / "usr/share/wordnet").glob("data.*")):
        for line in path.read_text(errors="replace").splitlines():
            if not line.startswith("  "):
                facts, gloss = line.split("|", 1)
                number, word = facts.split(" ")[0], facts.split(" ")[4]
                yield f"{path.suffix[1:]}-{number}", f"{word.replace('_', ' ')}: {gloss.strip()}"


GENRES: dict[str, Callable[[Path], Iterable[Text]]] = {
    "computing": lambda cache: _entries("dict-foldoc", cache),
    "fortunes": _fortunes,
    "glosses": _glosses,
    "perl": _perl,
    "politics": _politics,
    "python": lambda cache: stdlib_texts("all"),
    "satire": lambda cache: _entries("dict-devil", cache),
    "scripture": _scripture,
}

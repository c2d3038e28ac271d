"""Tables of all regions, for other programs: JSON with contexts, and CSV with a line for each region."""

from __future__ import annotations

import csv
import io
import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mfa_kernels.common.files import StrPath, atomic_write_text
from mfa_kernels.explorer import region

if TYPE_CHECKING:
    from mfa_kernels.explorer.explorer import Explorer

FORMAT, VERSION = "mfa_kernels.regions", 1
_COLUMNS = ("component", "label", "rows", "share", "entropy", "distinct", "responsibility", "genre", "purity", "tokens")
_CONTEXTS = 5


def has_figures() -> bool:
    """True where the package that draws is there."""
    return find_spec("matplotlib") is not None


def write_json(explorer: Explorer, path: StrPath) -> None:
    """Writes {format, version, about, regions}: of each region its line, its genres and a few contexts as text."""
    regions = [_with_contexts(explorer, k) for k in explorer.owning]
    content = {"format": FORMAT, "version": VERSION, "about": explorer.about, "regions": regions}
    atomic_write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _with_contexts(explorer: Explorer, k: int) -> dict[str, Any]:
    names = explorer.texts.genres
    line = _named(explorer, k)
    line["genres"] = {names[entry["genre"]]: entry["share"] for entry in explorer.catalog.genres(k)}
    line["contexts"] = [
        {
            "document": context["document"],
            "before": "".join(token["text"] for token in context["tokens"][: context["at"]]),
            "token": context["tokens"][context["at"]]["text"],
            "after": "".join(token["text"] for token in context["tokens"][context["at"] + 1 :]),
            "responsibility": context["responsibility"],
            "distance": context["distance"],
            "near_copies": context["folded"],
        }
        for context in region.contexts(explorer, k, "responsibility", 0, _CONTEXTS)["contexts"]
    ]
    return line


def write_csv(explorer: Explorer, path: StrPath) -> None:
    """Writes a line for each of the K regions, tokens separated by spaces."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, extrasaction="ignore")
    writer.writeheader()
    for k in range(explorer.mfa.n_components):
        line = _named(explorer, k)
        writer.writerow(
            line
            | {
                name: _harmless(" ".join(line["tokens"]) if name == "tokens" else line[name])
                for name in ("label", "genre", "tokens")
            }
        )
    atomic_write_text(path, buffer.getvalue())


def _named(explorer: Explorer, k: int) -> dict[str, Any]:
    line = explorer.catalog.line(k)
    return line | {"genre": explorer.texts.genres[line["genre"]] if line["genre"] >= 0 else ""}


def _harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text

"""Puts what the site shows into build/site, at the same paths as here, so that links hold: `make docs`.

Formulas become MathML, which browsers draw by themselves, and notebooks become pages: the site fetches nothing.
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "site"
SHOWN = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "examples/*.*", "examples/notebooks/*.ipynb",
    "docs/**/*", "bench/RESULTS.md", "bench/figures/*", "bench/results/*", "mfa_kernels/ops/*/*.md",
    "mfa_kernels/data/genres/README.md",
)  # fmt: skip

INLINE_MATH = re.compile(r"\$`([^`]*)`\$")  # as GitHub writes both
MATH_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What the converter does not know, or draws without the space that a name of a function has around it.
BARS = re.compile(r"\\[lr]vert\b")
ALIGNED = re.compile(r"(begin|end)\{aligned\}")
NAME = re.compile(r"(?<!<munder>)(?<!<msub>)(?<!<msup>)(<mi>(?:exp|log|max|min|erfc)</mi>)(?!<mo stretchy)")
SPACE = '<mspace width="0.167em" />'


def mathml(latex: str, display: str) -> str:
    """Returns a formula as one line of MathML; ValueError for a command that the converter does not know."""
    from latex2mathml.converter import convert

    made = convert(ALIGNED.sub(r"\1{align*}", BARS.sub("|", latex)).strip(), display=display)
    if left := re.search(r"\\[a-zA-Z]+|>&<", made):
        raise ValueError(f"{left[0]} has no MathML, in {latex!r}")
    return NAME.sub(rf"{SPACE}\1{SPACE}", made).replace("\n", " ")


def page(text: str) -> str:
    """Returns a page as the site's renderer takes it."""
    text = MATH_BLOCK.sub(lambda found: f'<div class="formula">{mathml(found[1], "block")}</div>', text)
    # In a span: a line that begins with <math> would be taken for a block of its own.
    text = INLINE_MATH.sub(lambda found: f"<span>{mathml(found[1], 'inline')}</span>", text)
    return re.sub(r"(\]\([^)]+)\.ipynb\)", r"\1.md)", text)


def notebook(path: Path, place: Path) -> None:
    """Writes a notebook as a page, its figures beside it, and itself to be downloaded."""
    from nbconvert import MarkdownExporter

    body, resources = MarkdownExporter().from_filename(path)
    for name, figure in resources["outputs"].items():
        renamed = f"{path.stem}-{name}"
        body = body.replace(f"]({name})", f"]({renamed})")
        (place.parent / renamed).write_bytes(figure)
    shutil.copyfile(path, place)
    link = f'<p><a href="{html.escape(path.name)}" download>Download this notebook</a></p>'
    place.with_suffix(".md").write_text(f"{page(body)}\n\n{link}\n")


def copied(path: Path, place: Path) -> None:
    shutil.copyfile(path, place)


def written(path: Path, place: Path) -> None:
    try:
        place.write_text(page(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path.relative_to(ROOT)}: {error}") from None


PLACED: dict[str, Callable[[Path, Path], None]] = {".md": written, ".ipynb": notebook}


def main() -> None:
    shutil.rmtree(STAGE, ignore_errors=True)
    for pattern in SHOWN:
        for path in ROOT.glob(pattern):
            if path.is_file():
                place = STAGE / path.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                PLACED.get(path.suffix, copied)(path, place)


if __name__ == "__main__":
    main()

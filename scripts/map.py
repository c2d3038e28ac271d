"""Writes docs/map.md: every folder and file of the package with a caption, which is the first line of its docstring.

python scripts/map.py            # writes it
python scripts/map.py --check    # exit status 1 where it is not what the files say
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAP = ROOT / "docs" / "map.md"
FOLDERS = ("mfa_kernels", "csrc")
HEAD = """# Where things are

Every file with its first line, written by `python scripts/map.py`; a test compares.
"""


def caption(path: Path) -> str:
    """Returns the first sentence of a file's docstring, or of the comment at the beginning of a C++ header."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = [line for line in text.splitlines() if line.startswith("//")]
        included = re.search(r'#include "(.+)"', text)
        text = " ".join(line.removeprefix("//").strip() for line in lines[:3])
        text = text or (f"Binds `{included[1]}` to PyTorch." if included else "")
    first = re.split(r"\n\n|(?<=\.)\s", text.strip())[0]
    return " ".join(first.split())


def entries(folder: Path, depth: int = 2) -> Iterator[str]:
    """Yields a heading for a folder, then a line for each of its files, then its folders."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".py", ".h", ".cpp", ".cuh", ".cu"))
    own = folder / "__init__.py"
    told = f": {caption(own)}" if own.exists() and caption(own) else ""
    yield f"\n{'#' * depth} {folder.relative_to(ROOT).as_posix()}/\n"
    if told:
        yield f"{told.removeprefix(': ')}\n"
    for path in files:
        if path.name != "__init__.py":
            yield f"- `{path.name}`: {caption(path)}"
    for inner in sorted(p for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"):
        if any(path.suffix in (".py", ".h", ".cuh") for path in inner.iterdir()):
            yield from entries(inner, min(depth + 1, 4))


def written() -> str:
    """Returns the text of the map."""
    return HEAD + "\n".join(line for folder in FOLDERS for line in entries(ROOT / folder)) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where it differs")
    if parser.parse_args().check:
        return int(not MAP.exists() or MAP.read_text() != written())
    MAP.write_text(written())
    return 0


if __name__ == "__main__":
    sys.exit(main())

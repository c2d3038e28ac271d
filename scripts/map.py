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
CAPTIONS = {
    "csrc": "Kernels in C++ and CUDA, compiled on first use.",
    "csrc/cpu": "The C++ kernels: headers that know no Torch, and their bindings.",
    "csrc/cpu/int8": "The first level of the scan in int8: bounds first, exact logits of what they leave.",
    "csrc/cpu/screen": "The screen on a CPU: bounds first, exact logits of what they leave.",
    "csrc/cuda": "The CUDA C++ kernels, for stage 0 and for up to 16 tokens.",
}
"""Captions of folders that are no Python packages."""
HEAD = """# Where things are

Every file with its first line, written by `python scripts/map.py`; a test compares. To find where a change begins, see
the table in [CONTRIBUTING.md](../CONTRIBUTING.md); words are in the [glossary](glossary.md).
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
    name = folder.relative_to(ROOT).as_posix()
    yield f"\n{'#' * depth} {name}/\n"
    yield f"{caption(own) if own.exists() else CAPTIONS[name]}\n"
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

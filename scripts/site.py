"""Puts what the site shows into build/site, at the same paths as here, so that links hold: `make docs`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "site"
SHOWN = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "examples/*.*", "docs/**/*", "bench/RESULTS.md",
    "bench/figures/*", "bench/results/*", "mfa_kernels/ops/*/*.md", "mfa_kernels/data/genres/README.md",
)  # fmt: skip

INLINE_MATH = re.compile(r"\$`([^`]*)`\$")  # as GitHub writes it; the site's renderer knows \( \)


def main() -> None:
    shutil.rmtree(STAGE, ignore_errors=True)
    for pattern in SHOWN:
        for path in ROOT.glob(pattern):
            if path.is_file():
                place = STAGE / path.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                if path.suffix == ".md":
                    place.write_text(INLINE_MATH.sub(r"\\(\1\\)", path.read_text()))
                else:
                    shutil.copyfile(path, place)


if __name__ == "__main__":
    main()

"""Writes the exact versions of requirements/*.txt from the ranges in pyproject.toml: `make lock`.

What a file has already stays where the ranges still allow it; `make lock UPGRADE=--upgrade` takes the newest.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# {title}
# Written by `make lock` from the ranges in pyproject.toml (scripts/lock.py), not by hand.
# What a CUDA build of PyTorch needs besides is not here: that build pins it itself.
"""
# What a CUDA build of PyTorch brings: a build for CPUs takes none of it, and must not be made to.
CUDA = re.compile(r"(nvidia|cuda)-")


def lower_ends() -> list[str]:
    """The oldest versions that are allowed, as pins: "numpy>=1.26" is "numpy==1.26.*". PyTorch's is in torch.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["interop"] + extras["real"] + extras["explore"]
    found = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in lines]
    pins = [f"{each[1]}=={each[2]}.*" for each in found if each and each[1] not in ("torch", "triton")]
    return [*pins, "pyarrow<21"]  # TransformerLens 2 imports it; newer ones refuse NumPy 1, which they do not declare


def write(name: str, title: str, extras: list[str], further: list[str], pins: list[str], options: list[str]) -> None:
    """Lock one file, within its `pins`; `options` are the resolver, and what it is asked besides."""
    path = ROOT / "requirements" / name
    before = path.read_text() if path.exists() else ""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / name
        draft.write_text(before)  # the resolver keeps what it finds there
        uv, *asked = options
        command = [
            uv, "pip", "compile", "--quiet", "--universal", "--python-version=3.10", "--no-python-downloads",
            "--no-annotate", "--no-header", *asked, *(f"--extra={extra}" for extra in extras), *further,
            "--constraint=requirements/torch.txt", "--constraint=-", f"--output-file={draft}",
            "pyproject.toml", "requirements/tools.in",
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, input="\n".join(pins), text=True, check=True)
        lines = [line for line in draft.read_text().splitlines() if "==" in line and not CUDA.match(line)]
    text = HEADER.format(title=title) + "\n".join(lines) + "\n"
    if text != before:  # what is as it was is not installed again
        path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", default="uv", help="the resolver's program")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the ranges allow")
    given = parser.parse_args()
    options = [given.uv, *(["--upgrade"] if given.upgrade else [])]
    write("locked.txt", "What `make test` and `make demo` install.", ["test", "report", "explore"], [], [], options)
    more = ["test", "report", "explore", "interop", "real"]
    locked = ["--constraint=requirements/locked.txt"]
    title = "What `make real` installs besides locked.txt and the model: the extra real."
    write("real.txt", title, ["real"], locked, [], options)
    title = "What `make test-more` installs: locked.txt, and the extras interop, real, browser and docs."
    write("more.txt", title, [*more, "browser", "docs"], locked, [], options)
    oldest = "The oldest versions that the ranges allow, for `make test-matrix`: Python 3.10 to 3.12, as numpy 1.26 is."
    write("oldest.txt", oldest, more, [], lower_ends(), options)


if __name__ == "__main__":
    main()

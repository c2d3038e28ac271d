"""The documents: their code runs as it stands, and their commands are commands."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mfa_kernels.commands.options import parser

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "examples/*.py", "bench/*.md", "mfa_kernels/ops/*/*.md")
    for path in ROOT.glob(pattern)
)
PROGRAM = "(?:mfa-kernels|python3?|torchrun|make) "
BEGUN = """\
import argparse, inspect, torch
from mfa_kernels import MFA, fit, harvest, steer
from mfa_kernels.models import load_language_model
model, tokenizer = load_language_model()
store = harvest(model, tokenizer, [inspect.getsource(argparse)], layer=2)
mfa = fit(store, n_components=32, rank=4)
held_out = x = store.tensor()[:500]
"""
ANSWERS = """\
import pathlib
my_model = lambda question: "a label"
pathlib.Path("mfa").mkdir()
pathlib.Path("questions").mkdir()
pathlib.Path("questions/region-0.answer.txt").write_text("zero")
"""
# What a page's code begins with where it goes on with what others have made, and what it prints at its end.
RUN = {
    "README.md": ("", r"def f\("),
    "docs/fitting.md": ("", "nats per token"),
    "docs/steering.md": ("", "tokens"),
    "docs/serving.md": ("", ""),
    "docs/exploring.md": (BEGUN + ANSWERS, ""),
    "docs/evaluating.md": (BEGUN, "negative log-likelihood"),
    "docs/localization.md": (BEGUN, r"\| regions \|"),
    "docs/exactness.md": (BEGUN, ""),
}


def commands(page: str) -> list[str]:
    """The lines of a page that are commands, indented or in a block, without the comment at their end."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(rf"^(?: {{4}}|\$ )?({PROGRAM}.*)$", text, re.MULTILINE)
    return [re.split(r" +#", line)[0].strip() for line in found]


def mentioned(page: str) -> list[str]:
    """What a page says in backticks, which may leave out what a command needs."""
    return [" ".join(each.split()) for each in re.findall(rf"`({PROGRAM}[^`|]*)`", (ROOT / page).read_text())]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def ran(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, (command, done.stderr[-3000:])
    return done.stdout


def test_commands_are_found() -> None:
    found = {page: commands(page) for page in PAGES}
    assert "mfa-kernels fit activations -K 64 -R 8 --held-out 0.15 --out mfa" in found["docs/start.md"]
    assert "make demo" in found["README.md"]
    assert sum(map(len, found.values())) > 60


def words_of(command: str) -> list[str]:
    """Of a command without its launcher: `torchrun -m mfa_kernels fit ...` is `mfa-kernels fit ...`."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    return ["mfa-kernels", *words[3:]] if words[1:3] == ["-m", "mfa_kernels"] else words


@pytest.mark.parametrize("page", PAGES)
def test_a_command_is_understood(page: str) -> None:
    for command in commands(page):
        words = words_of(command)
        if words[0] == "mfa-kernels":
            parser().parse_args(words[1:])  # SystemExit where it is not understood
        else:
            assert_is_there(command, words)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_mentioned_is_there(page: str) -> None:
    for command in mentioned(page):
        assert_is_there(command, words_of(command))


def assert_is_there(command: str, words: list[str]) -> None:
    """The file or the target, and the options."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif words[0] == "mfa-kernels":
        assert all(f'"{name}"' in sources() for name in words[1:2] if not name.startswith("-")), command
    elif words[1] != "-m":
        assert (ROOT / words[1]).exists(), command
    elif words[2].split(".")[0] in ("bench", "tests"):
        place = ROOT / words[2].replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), command
    else:
        assert words[2] in ("pytest", "mkdocs", "build"), command
        return
    options = [word for word in words[1:] if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in sources()] == [], command


@functools.cache
def sources() -> str:
    """Everything that reads a command line."""
    folders = ("bench", "examples", "scripts", "tests", "mfa_kernels/commands")
    return "".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.more
@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    before, printed = RUN[page]
    assert re.search(printed, ran([sys.executable, "-c", "\n".join([before, *blocks(page)])], tmp_path))
    if page == "docs/exploring.md":
        assert (tmp_path / "mfa" / "labels.json").exists()
        assert (tmp_path / "latents").is_dir()


@pytest.mark.more
def test_from_zero_to_steering(tmp_path: Path) -> None:
    """Code and commands of the guide in their order, with the language model that it names."""
    page = (ROOT / "docs/start.md").read_text()
    code = ""
    steps = re.findall(r"^```python\n(.*?)^```|^ {4}(mfa-kernels [^\n]*)$", page, re.MULTILINE | re.DOTALL)
    assert len(steps) == 11
    for block, command in steps:
        if block:
            code += block  # one session of Python
            said = ran([sys.executable, "-c", code], tmp_path)
        else:
            words = shlex.split(re.split(r" +#", command)[0])
            if words[1] not in ("doctor", "explore"):  # they have tests of their own; the latter does not end
                ran([sys.executable, "-m", "mfa_kernels", *words[1:]], tmp_path)
    assert "When they arrived," in said
    assert (tmp_path / "regions.html").exists()
    assert (tmp_path / "regions.csv").exists()

"""The site of the documents: it is built without a warning, and its reference has everything public."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mfa_kernels
from mfa_kernels import data, evaluation, interpret, steering
from scripts import site

ROOT = Path(__file__).parents[1]
FETCHED = re.compile(r'<(?:script|img|iframe)[^>]+src="?https?:|<link[^>]+rel="?stylesheet[^>]+https?:')


@pytest.mark.more
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: the extra docs")
def test_the_site_is_built_without_a_warning() -> None:
    subprocess.run([sys.executable, "scripts/site.py"], cwd=ROOT, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [page.name for page in (ROOT / "site").rglob("*.html") if FETCHED.search(page.read_text())] == []
    assert "Download this notebook" in (ROOT / "site/examples/notebooks/steer.html").read_text()
    assert (ROOT / "site/mfa_kernels/ops/scan/index.html").read_text().count("<math") > 100
    pages = "".join(page.read_text() for page in (ROOT / "site" / "docs" / "api").glob("*.html"))
    ids = {name.rsplit(".", 1)[-1] for name in re.findall(r'id="(mfa_kernels\.[\w.]+)"', pages)}
    public = {name for module in (mfa_kernels, data, evaluation, interpret, steering) for name in module.__all__}
    assert public - ids == set()


def test_the_navigation_names_files_that_are_there() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = re.findall(r": ([\w/.-]+\.md)$", text, re.MULTILINE)
    assert len(named) > 20
    named = [re.sub(r"^(examples/notebooks/.*)\.md$", r"\1.ipynb", name) for name in named]
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.more
@pytest.mark.skipif(importlib.util.find_spec("latex2mathml") is None, reason="needs latex2mathml: the extra docs")
def test_formulas_are_drawn_by_the_browser() -> None:
    made = site.page("with $`\\lvert x \\rvert`$\n\n```math\ny\n```\n\n[a](../a.ipynb)\n")
    assert made.startswith("with <span><math")
    assert "&#x0007C;<" in made
    assert '<div class="formula"><math' in made
    assert "[a](../a.md)" in made
    with pytest.raises(ValueError, match=r"\\nosuch has no MathML"):
        site.page("$`\\nosuch x`$")


def test_the_reference_names_what_is_there() -> None:
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            module, _, name = path.rpartition(".")
            try:
                assert hasattr(importlib.import_module(module), name), f"{page.name}: {path}"
            except ModuleNotFoundError:
                importlib.import_module(path)

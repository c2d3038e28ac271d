"""The wheel and the sdist: what is in them, and that each runs in a clean environment."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mfa_kernels.common.version import __version__
from scripts.try_release import built, demonstrated, installed, ran

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.more,
    pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs build: the extra docs"),
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return built(tmp_path_factory.mktemp("built"))


def test_what_is_in_the_wheel(packages):
    wheel, _ = packages
    assert wheel.name == f"mfa_kernels-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (file.read(name).decode() for name in names if name.endswith("METADATA"))
    needed = [
        *(f"mfa_kernels/{path.relative_to(ROOT)}" for path in (ROOT / "csrc").rglob("*.h")),
        *(str(path.relative_to(ROOT)) for path in (ROOT / "mfa_kernels/data/genres").glob("*.txt")),
        *(str(path.relative_to(ROOT)) for path in (ROOT / "mfa_kernels/explorer/static").rglob("*.js")),
        "mfa_kernels/py.typed",
    ]
    assert len(needed) > 60
    assert set(needed) - names == set()
    assert {name.split("/")[0] for name in names} == {"mfa_kernels", f"mfa_kernels-{__version__}.dist-info"}
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata


def test_what_is_in_the_sdist(packages):
    _, sdist = packages
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = (
        "Makefile",
        "csrc/cpu/scan.h",
        "tests/conftest.py",
        "requirements/locked.txt",
        "CITATION.cff",
        "mkdocs.yml",
    )
    assert set(needed) - names == set()
    assert not any(name.startswith((".venv", "demo/", "site/", "build/")) for name in names)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_demonstration_runs_where_it_is_installed(kind, packages, tmp_path):
    package = packages[kind == "sdist"]
    python = installed(sys.executable, package, tmp_path / "venv")
    said = ran(python, "-c", "import mfa_kernels; print(mfa_kernels.__file__)", cwd=tmp_path)
    assert Path(said.strip()).is_relative_to(tmp_path)
    assert "Steering toward region" in demonstrated(python, tmp_path, whole=False)
    assert (tmp_path / "demo" / "regions.html").exists()

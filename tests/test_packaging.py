"""The locks pin what pyproject.toml asks for, and the Makefile installs nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mfa_kernels.common.version import __version__
from mfa_kernels.data import gguf
from tests.conftest import LONGEST
from tests.processors.test_processors import BUDGETS, OPERATORS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LOCKS = {
    "locked.txt": ["test", "report", "explore"],
    "real.txt": ["real"],
    "more.txt": ["test", "report", "explore", "interop", "real", "browser", "docs"],
    "oldest.txt": ["test", "report", "explore", "interop", "real"],
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TABLE: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = TABLE["project"]


def pins(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def version(requirement: Requirement) -> str | None:
    """The one version that a pin allows; None where it is not a pin."""
    (found,) = requirement.specifier if len(requirement.specifier) == 1 else (None,)
    exact = found is not None and found.operator == "==" and "*" not in found.version
    return found.version if exact else None


def on_linux(python: str) -> dict[str, str]:
    """The environment of markers."""
    return {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": "",
        "platform_system": "Linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython",
    }  # fmt: skip


def asked_for(extras: list[str]) -> list[Requirement]:
    """The dependencies, those of the extras, and what the package is built with."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in [*lines, *TABLE["build-system"]["requires"], "editables", "pip"]]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_one_version_of_each_package(name: str) -> None:
    for python in PYTHONS:
        here = [pin for pin in pins(name) if pin.marker is None or pin.marker.evaluate(on_linux(python))]
        assert [str(pin) for pin in here if version(pin) is None or pin.url or pin.extras] == []
        names = [canonicalize_name(pin.name) for pin in here]
        assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_what_the_project_asks_for(name: str) -> None:
    for python in PYTHONS:
        here = [pin for pin in pins(name) if pin.marker is None or pin.marker.evaluate(on_linux(python))]
        versions = {canonicalize_name(pin.name): version(pin) for pin in here}
        for asked in asked_for(LOCKS[name]):
            found = versions.get(canonicalize_name(asked.name))
            assert found is not None, f"{asked} is not in {name}: make lock"
            assert asked.specifier.contains(Version(found)), f"{asked}, but {name} has {found}: make lock"


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_the_pytorch_of_the_tests_and_nothing_of_cuda(name: str) -> None:
    versions = {pin.name: version(pin) for pin in pins(name)}
    assert {pin.name: version(pin) for pin in pins("torch.txt")}.items() <= versions.items()
    assert [name for name in versions if name.startswith(("nvidia-", "cuda-"))] == []


def test_what_is_more_than_the_lock_agrees_with_it() -> None:
    found = ({(pin.name, version(pin)) for pin in pins(name)} for name in ("locked.txt", "more.txt", "real.txt"))
    locked, more, real = found
    assert locked <= more
    assert real <= more


def test_the_oldest_versions_are_the_lower_ends() -> None:
    versions = {canonicalize_name(pin.name): version(pin) for pin in pins("oldest.txt")}
    for asked in map(Requirement, PROJECT["dependencies"]):
        lower = next(each.version for each in asked.specifier if each.operator == ">=")
        if asked.name not in ("torch", "triton"):
            assert f"{versions[asked.name]}.".startswith(f"{lower}."), asked


def test_the_makefile_installs_what_is_pinned() -> None:
    """From a lock, or without dependencies; the environment of the newest versions has no lock but PyTorch's."""
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if re.search(r"\bpip3? install\b", line)]
    assert lines
    for line in lines:
        words = line.partition(" install ")[2].split()
        if "$(MATRIX)/newest/" in line:
            assert "-c requirements/torch.txt" in line
        elif "--require-hashes" in words:
            assert words[-2] == "-r"
            assert words[-1] in ("requirements/smollm2.txt", "requirements/pyvene.txt")
            assert "--no-deps" in words
        elif "--no-deps" in words:
            assert words[-2:] == ["-e", "."]
            assert "--no-build-isolation" in words
        elif "-c" in words or "-r" in words:
            assert words[-1] in ("pip", "$(2)", "requirements/real.txt"), line
        else:
            names = [word for word in words if not word.startswith("-")]
            assert [name for name in names if "==" not in name] == [], line
    assert "--upgrade pip" not in (ROOT / "Makefile").read_text()


def test_the_model_is_one_file_of_one_version() -> None:
    (line,) = [
        line for line in (ROOT / "requirements/smollm2.txt").read_text().splitlines() if not line.startswith("#")
    ]
    assert re.fullmatch(rf"{gguf.WHEEL}=={re.escape(gguf.WHEEL_VERSION)} --hash=sha256:[0-9a-f]{{64}}", line)


def test_the_map_is_true():
    """docs/map.md has every file, by its own first line; `python scripts/map.py` writes it."""
    done = subprocess.run([sys.executable, "scripts/map.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_the_version_is_the_same_everywhere():
    """In what is cited and, unless there is news that is not released, in the changelog."""
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1] == __version__
    latest, *_ = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest in (__version__, "Unreleased")


def test_a_build_brings_no_pytorch():
    """What is built in isolation installs this, each time."""
    assert TABLE["build-system"]["requires"] == ["hatchling"]


def test_files_of_tests_that_are_named_elsewhere_are_there():
    """What other processors and sanitizers run waits for --more, and would miss a file only then."""
    for name in (*OPERATORS, *BUDGETS, *LONGEST):
        assert (ROOT / name).exists(), name

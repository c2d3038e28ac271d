"""Whole folders of every kind, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.threads import threads
from tests.hostile.kinds import KINDS, SETTINGS, settings_of


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    """Runs many short operations on few threads."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The folder of a kind and a seed."""
    root = tmp_path_factory.mktemp("whole")

    def folder(name: str, seed: int = 0) -> Path:
        path = root / name.replace(" ", "_") / str(seed)
        if not path.exists():
            KINDS[name].make(path, seed)
            if name.endswith(("checkpoint", "state")):
                fit = name.split()[0]
                SETTINGS[fit, seed] = settings_of(path / "a" if fit == "many" else path)
        return path

    return folder


@pytest.fixture
def copied(made: Callable[[str, int], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of it, to be damaged."""

    def folder(name: str) -> Path:
        shutil.copytree(made(name, 0), tmp_path / "copy")
        return tmp_path / "copy"

    return folder

"""Files that are written, or not: what is in a folder, and work that must not begin or is interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def state(folder: Path) -> dict[str, bytes]:
    """The files of a folder but for locks, and what is in them."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def work_has_begun(*_: Any, **__: Any) -> None:
    pytest.fail("work had begun")


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt

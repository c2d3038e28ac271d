"""One thread: models this small only lose time to a second one."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...

"""Small tensors on one thread: these tests are many short operations."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...

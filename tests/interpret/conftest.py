"""Small tensors on one thread: these tests are many short operations. And what most of them begin with."""

from __future__ import annotations

import pytest
from torch import Tensor

from mfa_kernels import MFA
from tests.interpret.planted import MemoryStore, planted


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...


@pytest.fixture
def drawn_rows() -> tuple[MFA, MemoryStore, Tensor]:
    """A mixture, rows of it in their texts, and the region of each row."""
    return planted()


@pytest.fixture
def mfa(drawn_rows: tuple[MFA, MemoryStore, Tensor]) -> MFA:
    return drawn_rows[0]


@pytest.fixture
def store(drawn_rows: tuple[MFA, MemoryStore, Tensor]) -> MemoryStore:
    return drawn_rows[1]


@pytest.fixture
def region(drawn_rows: tuple[MFA, MemoryStore, Tensor]) -> Tensor:
    return drawn_rows[2]

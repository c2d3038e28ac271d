"""One thread: models this small only lose time to a second one. And what most tests begin with."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from mfa_kernels import MFA
from tests.steering.tiny import causal_lm, fitting_mixture, prompts


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...


@pytest.fixture
def model() -> nn.Module:
    return causal_lm()


@pytest.fixture
def mfa() -> MFA:
    return fitting_mixture()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return prompts()


@pytest.fixture
def padded() -> dict[str, Tensor]:
    return prompts(padded=True)

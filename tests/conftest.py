"""Shared fixtures: both CPU backends, poisoned memory, and mixtures of every shape."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a Triton kernel is defined: without a GPU, the kernels run in Triton's interpreter on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mfa_kernels.ops import native


@pytest.fixture(params=["native", "portable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the C++ kernels and on plain PyTorch."""
    if request.param == "portable":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        warnings.warn("no C++ library on this machine: the native backend is not tested", stacklevel=1)
        pytest.skip("the C++ kernels could not be built here")
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every freshly allocated tensor, in C++ too, holds NaN or the largest integer until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)

"""One thread: the data is tiny, and threads would only wait for each other. And activations that are none of ours."""

from __future__ import annotations

import pytest

from mfa_kernels import harvest
from mfa_kernels.data import ActivationStore, tiny_lm
from mfa_kernels.data.tiny_lm.corpus import stdlib_texts


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...


@pytest.fixture
def activations_of_text(tmp_path) -> ActivationStore:
    """6,000, of the small language model."""
    texts = stdlib_texts("held_out")[:20]
    return harvest(*tiny_lm.load(), texts, 2, tmp_path, max_tokens=6000, progress=False)

"""A model and a tokenizer of each kind."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.helpers.language import make_model, make_tokenizer

FOUR = (("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False))


@pytest.fixture(params=FOUR, ids=[f"{kind}-{'bos' if bos else 'plain'}" for kind, bos in FOUR])
def lm(request: pytest.FixtureRequest) -> tuple[Any, PreTrainedTokenizerFast, bool]:
    kind, bos = request.param
    return make_model(kind), make_tokenizer(bos), bos


@pytest.fixture
def llama() -> tuple[Any, PreTrainedTokenizerFast]:
    return make_model("llama"), make_tokenizer(bos=True)


@pytest.fixture
def model(llama: tuple[Any, PreTrainedTokenizerFast]) -> Any:
    return llama[0]


@pytest.fixture
def tokenizer(llama: tuple[Any, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return llama[1]

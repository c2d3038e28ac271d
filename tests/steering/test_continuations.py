"""Texts from several seeds at once: the same draws whatever the steering, and samples of the model's own softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfa_kernels import MFA, steer
from mfa_kernels.models import load_language_model
from mfa_kernels.steering.continuations import Continuations, continuations, negative_log_likelihood, padded
from tests.helpers.language import make_model, make_tokenizer

PROMPTS = ("def f(", "import", "The value of the")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_language_model()


def test_a_row_is_a_prompt_and_a_seed(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    together = continuations(model, tokenizer, PROMPTS, (5, 6), 4)
    assert len(together.texts) == 6
    assert together.ids.shape == together.mask.shape == (6, together.start + 4)
    prompts = tokenizer.batch_decode(together.ids[:, : together.start], skip_special_tokens=True)
    assert prompts == [*PROMPTS, *PROMPTS]
    for i, seed in enumerate((5, 6)):
        alone = continuations(model, tokenizer, PROMPTS, (seed,), 4)
        assert together.texts[3 * i : 3 * i + 3] == alone.texts
    assert torch.equal(together.ids, continuations(*loaded, PROMPTS, (5, 6), 4).ids)


def test_cold_texts_are_greedy_and_steered_ones_go_back(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        greedy = int(model(ids).logits[0, -1].argmax())
    cold = continuations(model, tokenizer, PROMPTS[:1], (0,), 1, 1e-3)
    assert int(cold.ids[0, -1]) == greedy
    warm = continuations(model, tokenizer, PROMPTS, (1, 2), 8)
    width = model.config.hidden_size
    mfa = MFA.from_parameters(torch.full((1, width), 9.0), torch.zeros(1, width, 1), torch.ones(width), torch.ones(1))
    with steer(model, mfa, 2, component=0, alpha=1.0) as handle:
        steered = continuations(model, tokenizer, PROMPTS, (1, 2), 8)
        assert steered.texts != warm.texts
        with handle.paused():
            assert continuations(model, tokenizer, PROMPTS, (1, 2), 8).texts == warm.texts


def test_the_likelihood_is_that_of_each_text_alone(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    written = continuations(model, tokenizer, PROMPTS, (0, 1, 2, 3), 5)
    found = negative_log_likelihood(model, written)
    assert found.shape == (12,)
    for row in range(12):
        ids = written.ids[row][written.mask[row] == 1][None]
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])
        assert float(found[row]) == pytest.approx(float(-log_probs[-5:].mean()), rel=1e-4)


def test_errors_name_the_argument(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="prompts, seeds must hold one each, got 0 and 1"):
        continuations(*loaded, ())
    with pytest.raises(ValueError, match="new_tokens must be an integer >= 1"):
        continuations(*loaded, PROMPTS, new_tokens=0)
    with pytest.raises(ValueError, match="temperature must be"):
        continuations(*loaded, PROMPTS, temperature=0)


def test_padding_does_not_count_where_positions_are_absolute() -> None:
    """A GPT-2 learns a vector for each position: padded rows have those of their own tokens."""
    model, tokenizer = make_model("gpt2").eval(), make_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # as GPT-2's own: it would add embeddings of types
    prompts = ["w1", "w2 w3 w4 w5 w6 w7 w8"]
    written = continuations(model, tokenizer, prompts, (0,), 6)
    together = negative_log_likelihood(model, written)
    inputs = padded(model, tokenizer, prompts)
    with torch.no_grad():
        next_token = model(**inputs).logits[:, -1]
    for i, prompt in enumerate(prompts):
        alone = continuations(model, tokenizer, [prompt], (0,), 6)
        ids = written.ids[i : i + 1, -alone.ids.shape[1] :]
        of_row = Continuations(ids, torch.ones_like(ids), alone.start, [])
        torch.testing.assert_close(together[i : i + 1], negative_log_likelihood(model, of_row))
        with torch.no_grad():
            expected = model(ids[:, : alone.start]).logits[0, -1]
        torch.testing.assert_close(next_token[i], expected, rtol=1e-4, atol=1e-5)


def test_one_text_is_no_list(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match=r"prompts must be a list of texts, got 'Once upon'"):
        continuations(*loaded, "Once upon")
    with pytest.raises(TypeError, match=r"prompts\[1\] must be a string"):
        continuations(*loaded, ["a", 3])

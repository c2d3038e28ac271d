"""The logit lens on small models of many architectures, and the shift of the next token by steering."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import MFA, steer
from mfa_kernels.data import tiny_lm
from mfa_kernels.interpret import logit_lens, logit_shift
from tests.data.test_harvest import BOS, make_tokenizer
from tests.helpers.refusals import check_refused
from tests.interpret.test_head import COMMON, LLAMA_LIKE, VOCABULARY, WIDTH, Kind, built, changes, some_mfa
from tests.interpret.test_head import MODELS as head_models

transformers = pytest.importorskip("transformers")

MODELS = {
    "llama": head_models["llama"],
    "qwen2": Kind("Qwen2ForCausalLM", LLAMA_LIKE),
    "gemma2": Kind("Gemma2ForCausalLM", {**LLAMA_LIKE, "head_dim": 8}),
    "phi": head_models["phi, whose head has a bias"],
    "gpt2": head_models["gpt2"],
    "neox": head_models["neox"],
    "opt": Kind(
        "OPTForCausalLM",
        {**COMMON, "ffn_dim": 8, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 16},
        "model.decoder.final_layer_norm",
    ),
}


def _logits(model: Any, norm: str, points: Tensor) -> Tensor:
    """Final norm and unembedding as they are, in float64."""
    final, head = copy.deepcopy(model.get_submodule(norm)).double(), copy.deepcopy(model.get_output_embeddings())
    with torch.no_grad():
        return head.double()(final(points.double()))


def _expected(model: Any, norm: str, mfa: MFA, k: int, direction: int | None) -> Tensor:
    means, w = mfa.means.detach().double(), mfa.loadings.detach().double()
    if direction is None:
        return _logits(model, norm, means[k]) - mfa.log_weights.detach().double().exp() @ _logits(model, norm, means)
    return _logits(model, norm, means[k] + w[k, :, direction]) - _logits(model, norm, means[k] - w[k, :, direction])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("direction", [None, 1])
def test_the_lens_is_the_difference_of_logits(name: str, direction: int | None) -> None:
    model, mfa = built(MODELS[name]), some_mfa()
    lens = logit_lens(model, mfa, 2, direction=direction, top=VOCABULARY)
    expected = _expected(model, MODELS[name].norm, mfa, 2, direction).sort(descending=True)
    torch.testing.assert_close(
        torch.tensor([t.change for t in lens.top]).double(), expected.values, rtol=1e-3, atol=1e-5
    )
    assert [t.token_id for t in lens.top[:3]] == expected.indices[:3].tolist()
    assert [t.token_id for t in lens.bottom] == [t.token_id for t in reversed(lens.top)]


@pytest.mark.parametrize("direction", [None, 0])
def test_a_model_in_bfloat16_keeps_the_precision_of_its_weights(direction: int | None) -> None:
    """The mean is a hundred times longer than what tells regions apart: logits rounded before they are subtracted
    would be wrong by more than their difference."""
    model, mfa = built(MODELS["llama"], torch.bfloat16), some_mfa()
    with torch.no_grad():
        mfa.means += 100
    expected = _expected(model, "model.norm", mfa, 1, direction)
    assert (changes(model, mfa, 1, direction) - expected).norm() < 0.01 * expected.norm()


def test_ids_stand_for_tokens_without_a_tokenizer() -> None:
    lens = logit_lens(built(MODELS["llama"]), some_mfa(), 0, top=2)
    assert [t.token for t in lens.top] == [f"<id {t.token_id}>" for t in lens.top]
    assert len(lens.top) == len(lens.bottom) == 2


def test_a_final_norm_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mfa = built(MODELS["gpt2"]), some_mfa()
    found = logit_lens(model, mfa, 0)
    monkeypatch.setattr("mfa_kernels.interpret.head._FINAL_NORMS", ("another",))
    check_refused(ValueError, "no final norm", logit_lens, model, mfa, 0)
    assert logit_lens(model, mfa, 0, norm="transformer.ln_f") == found
    check_refused(ValueError, "norm: GPT2LMHeadModel has no module 'ln'", logit_lens, model, mfa, 0, norm="ln")


def test_bad_input_is_named() -> None:
    model, mfa = built(MODELS["llama"]), some_mfa()
    check_refused(IndexError, r"component must be in \[0, 5\), got 5", logit_lens, model, mfa, 5)
    check_refused(IndexError, r"direction must be in \[0, 3\), got 3", logit_lens, model, mfa, 0, direction=3)
    check_refused(ValueError, "top must be an integer >= 1", logit_lens, model, mfa, 0, top=0)
    check_refused(ValueError, "no output embeddings", logit_lens, nn.Linear(2, 2), mfa, 0)
    check_refused(ValueError, "takes 16 features, but the mixture has 4", logit_lens, model, MFA(2, 4, 1), 0)
    del model.model.norm
    check_refused(ValueError, "no final norm", logit_lens, model, mfa, 0)


@pytest.fixture(scope="module")
def language_model() -> tuple[Any, Any]:
    return tiny_lm.load()


@contextmanager
def _pushed(model: Any, amount: float) -> Iterator[None]:
    """Adds to the residual stream after layer 2."""
    handle = model.model.layers[2].register_forward_hook(
        lambda module, inputs, output: output + amount if isinstance(output, Tensor) else (output[0] + amount,)
    )
    try:
        yield
    finally:
        handle.remove()


def test_the_shift_is_that_of_log_probabilities(language_model: tuple[Any, Any]) -> None:
    model, tokenizer = language_model
    prompt = "def __init__(self"
    shift = logit_shift(model, tokenizer, prompt, lambda: _pushed(model, 5.0), top=6)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = model(ids).logits[0, -1].double().log_softmax(-1)
        with _pushed(model, 5.0):
            steered = model(ids).logits[0, -1].double().log_softmax(-1)
    change = steered - plain
    for found, expected in ((shift.rises, change.topk(6)), (shift.falls, change.topk(6, largest=False))):
        assert [t.token_id for t in found] == expected.indices.tolist()
        torch.testing.assert_close(
            torch.tensor([t.change for t in found]).double(), expected.values, rtol=1e-3, atol=1e-3
        )
    assert shift.divergence == pytest.approx(float((steered.exp() * change).sum()), rel=1e-3)
    assert shift.divergence > 0.01
    assert all(t.token for t in shift.rises)


def test_the_shift_after_a_prompt_from_a_chat_template(language_model: tuple[Any, Any]) -> None:
    model, tokenizer = language_model
    shifts = [
        logit_shift(model, tokenizer, prompt, lambda: _pushed(model, 5.0), top=3)
        for prompt in ("def __init__(self", tokenizer.bos_token + "def __init__(self")
    ]
    assert shifts[0] == shifts[1]


def test_no_steering_is_no_shift(language_model: tuple[Any, Any]) -> None:
    model, tokenizer = language_model
    shift = logit_shift(model, tokenizer, "import", nullcontext, top=3)
    assert shift.divergence == 0
    assert {t.change for t in shift.rises + shift.falls} == {0.0}


def test_dropout_does_not_pass_for_steering(language_model: tuple[Any, Any]) -> None:
    model, tokenizer = language_model
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            logit_shift(model, tokenizer, "import", nullcontext)
    finally:
        model.eval()


def test_the_shift_of_what_an_encoder_decoder_writes_first() -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, mfa = transformers.T5ForConditionalGeneration(config).eval(), some_mfa()
    ids, start = torch.tensor([[BOS, 4, 5]]), torch.tensor([[3]])
    with torch.no_grad():
        plain = model(input_ids=ids, decoder_input_ids=start).logits[0, 0].double().log_softmax(-1)
        with steer(model, mfa, 0, 1, 0.5):
            steered = model(input_ids=ids, decoder_input_ids=start).logits[0, 0].double().log_softmax(-1)
    shift = logit_shift(model, make_tokenizer(bos=True), "w1 w2", lambda: steer(model, mfa, 0, 1, 0.5), top=3)
    assert shift.divergence == pytest.approx(float((steered.exp() * (steered - plain)).sum()), rel=1e-6)
    assert [t.token_id for t in shift.rises] == (steered - plain).topk(3).indices.tolist()
    config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="T5ForConditionalGeneration does not say which token its decoder begins with"):
        logit_shift(model, make_tokenizer(bos=True), "w1 w2", nullcontext)


def test_what_steers_must_be_made_anew() -> None:
    model, tokenizer = tiny_lm.load()
    mfa = MFA(3, 256, 2)
    handle = steer(model, mfa, 2, 1, 0.5)
    with handle, pytest.raises(TypeError, match=r"steering must be callable, .*, which steers already"):
        logit_shift(model, tokenizer, "def f", handle)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="steering must return a context manager, got 3"):
        logit_shift(model, tokenizer, "def f", lambda: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="prompt must be a string, got"):
        logit_shift(model, tokenizer, ["def f"], nullcontext)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokenizer must be one of transformers, got None"):
        logit_shift(model, None, "def f", nullcontext)

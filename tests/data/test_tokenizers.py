"""Tokenizers of every kind: a model is handed what its forward takes, whatever a tokenizer returns."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizer

from mfa_kernels import harvest, steer
from mfa_kernels.data.harvest import stream
from mfa_kernels.data.language_model import continuation, encoded, tokenize, without_notes
from mfa_kernels.interpret import logit_shift
from mfa_kernels.steering import MFASteerer, alpha_for_kl, interactive
from tests.helpers.language import BOS, EOS, make_tokenizer
from tests.steering.tiny import causal_lm, fitting_mixture

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = ["input_ids", "token_type_ids", "attention_mask"]


class Slow(PreTrainedTokenizer):
    """One token per word w0, w1, ..., in plain Python: without offsets."""

    vocab_size = 43
    model_input_names = TYPES

    def __init__(self, **options: Any) -> None:
        self._words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self._words)}

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 2)

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index] if index < len(self._words) else "<unk>"

    def build_inputs_with_special_tokens(self, ids: list[int], pair: Any = None) -> list[int]:
        return [BOS, *ids]

    def create_token_type_ids_from_sequences(self, ids: list[int], pair: Any = None) -> list[int]:
        return [0] * (len(ids) + 1)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)


def make(kind: str) -> Any:
    """Tokenizers that put the same ids for a text; `plain` has no BOS."""
    if kind == "slow":
        return Slow()
    tokenizer = make_tokenizer(bos=kind != "plain")
    if kind == "types":
        tokenizer.model_input_names = TYPES
    if kind in ("left", "right"):
        tokenizer.pad_token, tokenizer.padding_side = "</s>", kind
    return tokenizer


KINDS = ("types", "slow", "left", "right", "plain")
# Of these, only GPT-2 takes token_type_ids; Llama and GPT-NeoX take further arguments, for their attention.
ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gptj", "opt", "bloom")


def model_of(architecture: str) -> Any:
    sizes = {
        "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {"n_layer": 3, "n_head": 4},
    }  # fmt: skip
    return causal_lm(architecture, **sizes.get(architecture, {}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_handed_what_its_forward_takes(architecture: str) -> None:
    model, tokenizer, expected = model_of(architecture), make("types"), make("bos")
    assert "token_type_ids" in tokenizer("w1")
    takes = "token_type_ids" in inspect.signature(type(model).forward).parameters
    fields = ["input_ids", *["token_type_ids"] * takes, "attention_mask"]
    assert list(encoded(model, tokenizer, "w1 w2")) == fields
    if takes:  # as transformers has it, GPT-2 adds the embedding of these ids to every token's
        return
    mfa = fitting_mixture()
    assert continuation(model, tokenizer, "w1 w2", 4) == continuation(model, expected, "w1 w2", 4)
    shift = [logit_shift(model, t, "w1 w2", lambda: steer(model, mfa, 1, 0, 0.5)) for t in (tokenizer, expected)]
    assert shift[0] == shift[1]
    assert shift[0].divergence > 0
    with steer(model, mfa, 1, 3, 0.1) as handle:
        alphas = [alpha_for_kl(model, t("w1 w2", return_tensors="pt"), handle, 0.01) for t in (tokenizer, expected)]
    assert alphas[0] == alphas[1]
    for prompts in ("w1 w2", ["w1 w2", "w3"], tokenizer("w1 w2", return_tensors="pt")):
        plain = expected("w1 w2", return_tensors="pt") if isinstance(prompts, dict) else prompts
        found = MFASteerer(model, mfa, 1, tokenizer).intervene(prompts, 0.5, 3)
        assert torch.equal(found, MFASteerer(model, mfa, 1, expected).intervene(plain, 0.5, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_serves(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, mfa = causal_lm(), make(kind), fitting_mixture()
    ids = [BOS, 4, 5, 6] if kind != "plain" else [4, 5, 6]
    assert tokenize(tokenizer, "w1 w2 w3")["input_ids"].tolist() == [ids]
    store = harvest(model, tokenizer, ["w1 w2 w3", "w4 w5"], 1, seed=None, progress=False)
    assert store.document_tokens(0).tolist() == ids
    assert torch.equal(torch.cat(list(stream(model, tokenizer, ["w1 w2 w3", "w4 w5"], 1, seed=None))), store.tensor())
    text = continuation(model, tokenizer, "w1 w2 w3", 4)
    with torch.no_grad():
        expected = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=EOS)
    assert text == tokenizer.decode(expected[0, len(ids) :], skip_special_tokens=True)
    assert logit_shift(model, tokenizer, "w1 w2 w3", lambda: steer(model, mfa, 1, 0, 0.5)).divergence > 0
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    with steer(model, mfa, 1, 0, 0.0) as handle:
        interactive.stream(model, tokenizer, handle, 0, "w1 w2 w3", 4)
    assert "".join(capsys.readouterr().out.split()) == "".join(f"w1 w2 w3{text}".split())


@pytest.mark.parametrize("kind", [*KINDS, "bos"])
def test_several_texts_are_padded_with_a_token_for_it_or_without(kind: str) -> None:
    model, tokenizer = causal_lm(), make(kind)
    texts = ["w1 w2 w3", "w4"]
    inputs = tokenize(tokenizer, texts, padding=True, padding_side="left")
    rows = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    own = [tokenize(tokenizer, text)["input_ids"][0].tolist() for text in texts]
    assert rows == own
    assert inputs["attention_mask"].tolist()[1] == [0, 0, *[1] * len(own[1])]
    assert all(value.shape == inputs["input_ids"].shape for value in inputs.values())
    steerer = MFASteerer(model, fitting_mixture(), 1, tokenizer)
    both = steerer.intervene(texts, 0.5, 3)[:, -1]
    alone: list[Tensor] = [steerer.intervene(text, 0.5, 3)[0, -1] for text in texts]
    torch.testing.assert_close(both, torch.stack(alone), rtol=1e-4, atol=1e-5)
    sides = tokenize(tokenizer, texts, padding=True)["attention_mask"].tolist()[1]
    assert sides[0] == (tokenizer.padding_side == "right")


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (None, "got None$"), ("gpt2", "got 'gpt2'; AutoTokenizer.from_pretrained loads one by its name$"),
        (3, "got int$"), (lambda text: text, "got function$"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused(wrong: Any, found: str) -> None:
    model, mfa = causal_lm(), fitting_mixture()
    with steer(model, mfa, 1, 0, 0.0) as handle:
        calls: list[Any] = [
            lambda: continuation(model, wrong, "w1", 2),
            lambda: logit_shift(model, wrong, "w1", lambda: handle),
            lambda: interactive.stream(model, wrong, handle, 0, "w1", 2),
        ]
        if wrong is not None:  # it is needed for text alone
            calls.append(lambda: MFASteerer(model, mfa, 1, wrong))
        for call in calls:
            with pytest.raises(TypeError, match=f"^tokenizer must be one of transformers, {found}"):
                call()
    if isinstance(wrong, str):
        return
    with pytest.raises(TypeError, match="^tokenizer must be"):
        harvest(model, wrong, ["w1 w2"], 1)
    with pytest.raises(ValueError, match="tokenizer: give one to prompt with text"):
        MFASteerer(model, mfa, 1).intervene("w1", 0.5)


def test_what_cannot_write_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be one of transformers that can generate, got Linear"):
        continuation(torch.nn.Linear(2, 2), make("bos"), "w1", 2)


class Strict(LlamaForCausalLM):
    """Takes nothing else, as models of transformers 4 and those of one's own."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def test_a_forward_that_takes_nothing_else() -> None:
    model, mfa, tokenizer = causal_lm(), fitting_mixture(), make("types")
    model.__class__ = Strict
    inputs = tokenizer("w1 w2", return_tensors="pt")
    plain = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with steer(model, mfa, 1, 3, 0.1) as handle:
        alphas = [alpha_for_kl(model, given, handle, 0.01) for given in (inputs, dict(inputs), plain)]
        assert alphas[0] == alphas[1] == alphas[2]
        # What is no note of a tokenizer is not dropped: it may be a slip.
        with pytest.raises(TypeError, match="attention_masks"):
            alpha_for_kl(model, {**plain, "attention_masks": plain["attention_mask"]}, handle, 0.01)
    steerer = MFASteerer(model, mfa, 1, tokenizer)
    assert torch.equal(steerer.intervene(inputs, 0.5, 3), steerer.intervene(plain, 0.5, 3))
    assert torch.equal(steerer.intervene("w1 w2", 0.5, 3), steerer.intervene(plain, 0.5, 3))
    assert set(without_notes(nn.DataParallel(model), inputs)) == set(TYPES), "a wrapper may hand it on"

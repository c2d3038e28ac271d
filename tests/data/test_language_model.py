"""Layers are found in every architecture, by index or by path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mfa_kernels.commands import options
from mfa_kernels.data import tiny_lm
from mfa_kernels.data.language_model import (
    bos_prefix,
    continuation,
    decoder_layers,
    fingerprint,
    hidden_states,
    load_language_model,
    origin,
    remembered_model,
    resolve_layer,
    text_config,
    tokenize,
    weights_fingerprint,
    with_hidden_states,
)
from tests.helpers.language import BOS, make_tokenizer, templated
from tests.steering.tiny import ARCHITECTURES, causal_lm

PATHS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_by_index_and_path(architecture: str) -> None:
    model = causal_lm(architecture)
    stack = PATHS.get(architecture, "model.layers")
    path, layers = decoder_layers(model)
    assert path == stack
    assert len(layers) == 3
    assert resolve_layer(model, 1) == (f"{stack}.1", layers[1])
    assert resolve_layer(model, -1) == (f"{stack}.2", layers[2])
    assert resolve_layer(model, torch.tensor(2)) == (f"{stack}.2", layers[2])
    assert resolve_layer(model, f"{stack}.1.mlp") == (f"{stack}.1.mlp", layers[1].mlp)


def test_layers_of_a_wrapped_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.config = module.config

    assert decoder_layers(Wrapper(causal_lm()))[0] == "module.model.layers"
    two = Wrapper(causal_lm())
    two.other = causal_lm("gpt2")
    with pytest.raises(ValueError, match=r"more than one stack.*'module.model.layers' 'other.transformer.h'"):
        decoder_layers(two)


def test_bad_layers_are_named() -> None:
    model = causal_lm()
    with pytest.raises(IndexError, match=r"layer must be in \[-3, 3\), got 3"):
        resolve_layer(model, 3)
    with pytest.raises(IndexError, match="got -4"):
        resolve_layer(model, -4)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no module 'model.blocks.1'"):
        resolve_layer(model, "model.blocks.1")
    for layer, message in (
        (1.5, r"got 1\.5$"), (2.0, r"got 2\.0; give 2$"), (np.float64(2), r"; give 2$"), (None, "got None$"),
        (torch.tensor(2.0), r"a tensor of shape \(\) and torch.float32; give 2$"), (True, "got True$"),
        (np.bool_(True), "True"), (torch.tensor(True), "torch.bool$"), (torch.tensor([1, 2]), "a tensor of shape"),
        ([1], r"got \[1\]$"), (b"1", "got b'1'$"), (float("nan"), "got nan$"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="^layer must be an index or a module path, .*" + message):
            resolve_layer(model, layer)
    for text in ("2.0", "two", " 2", "1_0", "layers.2"):
        with pytest.raises(ValueError, match=rf"has no module {text!r}; give an index, or a module path"):
            resolve_layer(model, text)
    for text in ("3", "-4"):
        with pytest.raises(IndexError, match=rf"layer must be in \[-3, 3\), got {text}"):
            resolve_layer(model, text)
    with pytest.raises(ValueError, match="no stack of decoder layers found in Linear"):
        resolve_layer(nn.Linear(2, 2), 0)


def test_an_index_may_be_of_any_kind_and_may_be_text() -> None:
    model = causal_lm()
    for index in (2, "2", -1, "-1", np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor(-1, dtype=torch.int32)):
        assert resolve_layer(model, index) == ("model.layers.2", model.model.layers[2])
    model.add_module("2", nn.Linear(2, 2))
    assert resolve_layer(model, "2") == ("2", model.get_submodule("2"))
    assert resolve_layer(model, 2)[0] == "model.layers.2"
    assert [options.layer(text) for text in ("2", "-1", "model.layers.2", "2.0")] == [2, -1, "model.layers.2", "2.0"]


def test_text_config() -> None:
    assert text_config(causal_lm("gpt2")).hidden_size == 32
    assert text_config(nn.Linear(2, 2)) is None


def test_hidden_states_in_tensor_tuple_and_list() -> None:
    old, new, rest = torch.zeros(1), torch.ones(1), object()
    for output, replaced in ((old, new), ((old, rest), (new, rest)), ([old, rest], [new, rest])):
        assert hidden_states(output) is old
        assert with_hidden_states(output, new) == replaced


@pytest.mark.parametrize(("asked", "found"), [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_weights_are_loaded_as_stored_or_as_asked(asked: torch.dtype | None, found: torch.dtype) -> None:
    model, _ = load_language_model(str(tiny_lm.path()), asked)
    assert {parameter.dtype for parameter in model.parameters()} == {found}


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_gets_one_bos_with_a_template_or_without(bos: bool) -> None:
    tokenizer = make_tokenizer(bos)
    assert bos_prefix(tokenizer) == [BOS] * bos
    chat = templated(tokenizer, "w1 w2")
    assert chat == "<s>w1 w2</s>"
    assert tokenizer(chat)["input_ids"][: 1 + bos] == [BOS] * (1 + bos), "what is mended here"
    assert tokenize(tokenizer, chat)["input_ids"].tolist() == [[BOS, 4, 5, 1]]
    assert tokenize(tokenizer, chat)["attention_mask"].tolist() == [[1] * 4]
    assert tokenize(tokenizer, "w1 <s> w2")["input_ids"].tolist() == [[BOS] * bos + [4, BOS, 5]]
    for text in ("w1 w2", "w1"):
        assert torch.equal(tokenize(tokenizer, text)["input_ids"], tokenizer(text, return_tensors="pt")["input_ids"])


@pytest.mark.parametrize("bos", [True, False])
def test_a_padded_batch_of_texts_with_and_without_a_template(bos: bool) -> None:
    tokenizer = make_tokenizer(bos)
    tokenizer.pad_token = "<unk>"
    inputs = tokenize(tokenizer, ["<s>w1 w2 w3", "w4", "<s>w5"], padding=True, padding_side="left")
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    assert rows == [[BOS, 4, 5, 6], [BOS] * bos + [7], [BOS, 8]]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1], "padded on the left"
    plain = ["w1 w2 w3", "w4"]
    expected = tokenizer(plain, return_tensors="pt", padding=True, padding_side="left")
    found = tokenize(tokenizer, plain, padding=True, padding_side="left")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_prompt_from_a_chat_template_is_continued_as_its_text() -> None:
    model, tokenizer = tiny_lm.load()
    seen: list[list[int]] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].tolist()))
    text = "def read(path):"
    assert continuation(model, tokenizer, "<|bos|>" + text, 1) == continuation(model, tokenizer, text, 1)
    assert seen[0] == seen[1] == tokenizer(text)["input_ids"]


def test_a_model_in_training_writes_nothing() -> None:
    model, tokenizer = tiny_lm.load()
    with pytest.raises(ValueError, match=r"model is in training mode.*call model.eval\(\)"):
        continuation(model.train(), tokenizer, "def f", 2)
    assert continuation(model.eval(), tokenizer, "def f", 2)


def test_the_bundled_model_goes_by_its_name() -> None:
    model, tokenizer = load_language_model("tiny_lm")
    assert model.config.hidden_size == 256
    assert len(tokenizer) == 4096


def test_what_an_encoder_decoder_writes_is_not_cut() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 43, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, eos_token_id=None, **sizes)).eval()
    tokenizer, text, options = make_tokenizer(bos=True), "w1 w2 w3 w4 w5 w6", {"suppress_tokens": [0, 1, 2]}
    inputs = tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)  # which tokenizers of earlier versions return
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
    assert written.shape == (1, 5)
    expected = tokenizer.decode(written[0, 1:])
    assert len(expected.split()) == 4
    assert continuation(model, tokenizer, text, 4, **options) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fingerprints(architecture: str, tmp_path) -> None:
    """The same wherever a model is, and whatever its dtype; others of another size, or of other weights."""
    model = causal_lm(architecture)
    model.save_pretrained(tmp_path / "here")
    again = type(model).from_pretrained(tmp_path / "here")
    assert (fingerprint(again), weights_fingerprint(again)) == (fingerprint(model), weights_fingerprint(model))
    assert fingerprint(again.bfloat16()) == fingerprint(model)
    assert weights_fingerprint(again) != weights_fingerprint(model)
    others = [fingerprint(causal_lm(other)) for other in ARCHITECTURES if other != architecture]
    assert fingerprint(model) not in others
    model.config.num_hidden_layers += 1
    assert fingerprint(model) != fingerprint(again)
    assert fingerprint(nn.Linear(2, 3)) is None


def test_weights_of_every_kind_have_a_fingerprint() -> None:
    module = nn.Module()
    module.scalar, module.none = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.empty(0, 3))
    module.away = nn.Parameter(torch.empty(3, 3, device="meta"))
    module.transposed = nn.Parameter(torch.randn(3, 40).bfloat16().t())
    before = weights_fingerprint(module)
    assert weights_fingerprint(module) == before
    with torch.no_grad():
        module.scalar += 1
    assert weights_fingerprint(module) != before


def test_where_a_model_came_from() -> None:
    model, tokenizer = load_language_model()
    assert origin(model, tokenizer) == {
        "model": "tiny_lm", "tokenizer": "tiny_lm", "model_fingerprint": fingerprint(model),
    }  # fmt: skip
    model.name_or_path = tokenizer.name_or_path = "/home/anna/models/secret-project"
    assert origin(model, tokenizer)["model"] == origin(model, tokenizer)["tokenizer"] == "local:secret-project"
    assert origin(nn.Linear(2, 3), "x") == {"model": "Linear", "tokenizer": "str"}


def test_a_remembered_model(tmp_path) -> None:
    assert remembered_model("maker/model") == "maker/model"
    assert remembered_model("/of/anna/hub/models--maker--model/snapshots/0123") == "maker/model", "no folder here"
    assert remembered_model(str(tmp_path)) == str(tmp_path)
    assert remembered_model("/elsewhere/mfa_kernels/data/tiny_lm") == remembered_model("tiny_lm") == "tiny_lm"
    with pytest.raises(ValueError, match="it is of the local model 'secret', whose folder it does not say"):
        remembered_model("local:secret")
    with pytest.raises(ValueError, match="its model is /nowhere/secret, which is no folder here"):
        remembered_model("/nowhere/secret")


def test_wrong_calls_are_named():
    for given, message in (
        ({"dtype": "float32"}, "dtype must be a floating-point torch.dtype, got 'float32'"),
        ({"name": 0}, "name must be the name or the folder of a model, got 0"),  # which is an open file
        ({"tokenizer": 3.5}, "tokenizer must be the name or the folder of a model, got 3.5"),
    ):
        with pytest.raises(TypeError, match=message):
            load_language_model(**given)
    model, tokenizer = load_language_model()
    for given, message in (
        ({"prompt": ["a"]}, "prompt must be a string"), ({"new_tokens": 0}, "new_tokens must be an integer >= 1"),
        ({"temperature": -1}, "temperature must be >= 0"), ({"seed": "a"}, "seed must be an integer"),
        ({"tokenizer": None}, "tokenizer must be one of transformers, got None"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            continuation(**{"model": model, "tokenizer": tokenizer, "prompt": "a", "new_tokens": 1, **given})


def test_a_model_that_cannot_be_loaded_is_named(monkeypatch):
    def unreachable(*given, **options):
        raise OSError("We couldn't connect")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", unreachable)
    with pytest.raises(OSError, match=r"name: 'somebody/something' cannot be loaded \(We couldn't connect\)"):
        load_language_model("somebody/something")

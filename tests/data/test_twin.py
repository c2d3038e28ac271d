"""Outputs of layers are known before the model runs, and layers that cannot be steered or harvested are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mfa_kernels import harvest, steer
from mfa_kernels.data import twin
from mfa_kernels.data.harvest import stream
from mfa_kernels.data.twin import check_output
from mfa_kernels.steering import MFASteerer
from tests.helpers.language import make_tokenizer
from tests.helpers.offload import offloaded
from tests.steering.tiny import VERSION, WIDTH, causal_lm, count_hooks, fitting_mixture, prompts

pytestmark = pytest.mark.usefixtures("one_thread")

_OF_BERT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
_OF_TWO: dict[str, Any] = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
_OF_T5 = {"vocab_size": 64, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
NOT_TO_BE_STEERED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    # Two streams, time first.
    "xlnet": (
        "XLNetConfig", "XLNetLMHeadModel",
        {"vocab_size": 64, "d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 48},
        r"'transformer.layer.1' of XLNetLMHeadModel puts out shape \(3, 2, 32\)",
    ),
    "fsmt": (
        "FSMTConfig", "FSMTForConditionalGeneration",
        {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64, **_OF_TWO},
        r"'model.decoder.layers.1' of FSMTForConditionalGeneration puts out shape \([13], 2, 32\)",
    ),
    "prophetnet": (  # predicts several tokens at once, in a row
        "ProphetNetConfig", "ProphetNetForConditionalGeneration",
        {
            "vocab_size": 64, "hidden_size": WIDTH, "num_encoder_layers": 2, "num_decoder_layers": 2, "ngram": 2,
            "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        },
        r"puts out shape \(2, 9, 32\)",
    ),
    "longformer": (  # pads to its window: what was steered was nothing, without a word
        "LongformerConfig", "LongformerForMaskedLM", {**_OF_BERT, "attention_window": 8},
        r"puts out shape \(2, 8, 32\)",
    ),
    "squeezebert": (  # the same, past hooks
        "SqueezeBertConfig", "SqueezeBertForMaskedLM", {**_OF_BERT, "embedding_size": WIDTH},
        "'transformer.encoder.layers.1' of SqueezeBertForMaskedLM is not called as a module",
    ),
    "reformer": (
        "ReformerConfig", "ReformerForMaskedLM",
        {
            "vocab_size": 64, "hidden_size": WIDTH, "num_attention_heads": 4, "attention_head_size": 8,
            "feed_forward_size": 48, "attn_layers": ["local", "local"], "is_decoder": False, "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [16, 16], "max_position_embeddings": 64,
        },
        "'reformer.encoder.layers.1' of ReformerForMaskedLM puts out several streams of hidden states",
    ),
}  # fmt: skip


def made(config: str, model: str, options: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


@pytest.mark.parametrize("name", NOT_TO_BE_STEERED)
def test_refused_before_the_model_runs(name: str) -> None:
    config, kind, options, message = NOT_TO_BE_STEERED[name]
    model, mfa, tokenizer = made(config, kind, options), fitting_mixture(), make_tokenizer(bos=True)
    model.register_forward_pre_hook(lambda module, args: pytest.fail("the model was run"))
    calls: list[Callable[[], Any]] = [
        lambda: steer(model, mfa, 1, 0, 0.5),
        lambda: MFASteerer(model, mfa, 1),
        lambda: harvest(model, tokenizer, ["w1 w2 w3"], 1, progress=False),
        lambda: stream(model, tokenizer, ["w1 w2 w3"], 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "name another module by its path" in str(error.value)
    assert count_hooks(model) == 1


TO_BE_STEERED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", {**_OF_T5, "decoder_start_token_id": 0}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {"vocab_size": 64, **_OF_TWO, "decoder_start_token_id": 2}),
    "bert": ("BertConfig", "BertLMHeadModel", {**_OF_BERT, "is_decoder": True}),
    "masked": ("BertConfig", "BertForMaskedLM", _OF_BERT),
    "moe": (
        "MixtralConfig", "MixtralForCausalLM",
        {**_OF_BERT, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", TO_BE_STEERED)
def test_what_is_found_is_what_the_model_does(name: str) -> None:
    model, ids = made(*TO_BE_STEERED[name]), prompts()["input_ids"]
    drawn = torch.get_rng_state()
    with steer(model, fitting_mixture(), 1, 0, 0.5) as handle, torch.no_grad():
        ((path, _),) = twin._found[model]
        assert path == handle.layer
        found = twin._found[model][path, type(model.get_submodule(path))]
        # With transformers 4.51, experts ask which tokens are theirs: nothing can be told.
        assert found[0] == (2, 3, WIDTH) if name != "moe" or VERSION > (4, 51) else found is None
        assert torch.equal(torch.get_rng_state(), drawn)
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
        assert handle.stats()[:2] == (14, 14)


def test_a_layer_that_was_exchanged_or_is_of_no_known_model_is_not_judged() -> None:
    model = causal_lm()
    check_output(model, "model.layers.1.mlp", WIDTH)
    with pytest.raises(ValueError, match=r"n_features = 16, but 'model.layers.1.mlp' of LlamaForCausalLM is 32 wide"):
        check_output(model, "model.layers.1.mlp", 16)
    model.model.layers[1].mlp = nn.Linear(WIDTH, 16)
    check_output(model, "model.layers.1.mlp", 16)
    model.model.layers[0].mlp.gate_proj = nn.Linear(WIDTH, 96, bias=False)
    check_output(model, "model.layers.0.mlp", 16)
    check_output(nn.Sequential(nn.Linear(2, 2)), "0", 5)
    with pytest.raises(ValueError, match="'model.layers' of LlamaForCausalLM is not called as a module"):
        check_output(model, "model.layers")


@pytest.mark.parametrize("mode", ["device", "inference", "dtype", "training", "offloaded", "wrapped"])
def test_whatever_state_the_model_and_the_caller_are_in(mode: str) -> None:
    config, kind, options, message = NOT_TO_BE_STEERED["xlnet"]
    model: nn.Module = made(config, kind, options)
    path = "transformer.layer.1"
    before = torch.get_default_dtype()
    try:
        with torch.device("meta" if mode == "device" else "cpu"), torch.inference_mode(mode == "inference"):
            if mode == "dtype":
                torch.set_default_dtype(torch.float64)
            elif mode == "training":
                model.train()
            elif mode == "offloaded":
                offloaded(model)
            elif mode == "wrapped":
                model, path, message = (
                    nn.ModuleDict({"module": model}),
                    f"module.{path}",
                    r"puts out shape \(3, 2, 32\)",
                )
            with pytest.raises(ValueError, match=message):
                check_output(model, path, WIDTH)
    finally:
        torch.set_default_dtype(before)
    assert model.training == (mode in ("training", "wrapped"))


def test_a_decoder_that_reads_no_texts_is_not_harvested() -> None:
    tokenizer = make_tokenizer(bos=True)
    for name, decoder, encoder in (
        ("bart", "model.decoder.layers.1", "model.encoder.layers.0"),
        ("t5", 1, "encoder.block.0"),
    ):
        model = made(*TO_BE_STEERED[name])
        with pytest.raises(ValueError, match=r"is in the decoder of \w+, which reads texts with its encoder"):
            harvest(model, tokenizer, ["w1 w2 w3"], decoder, progress=False)
        store = harvest(model, tokenizer, ["w1 w2 w3"], encoder, progress=False)
        ids = torch.tensor([[0, 4, 5, 6]])
        with torch.no_grad():
            states = model.get_encoder()(input_ids=ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(store.tensor(), states[1][0, 1:])

"""From the residual stream to logits: what is measured against the models themselves, of many architectures."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import MFA
from mfa_kernels.interpret import logit_lens
from mfa_kernels.interpret.head import measured
from tests.helpers.mixtures import mixture

transformers = pytest.importorskip("transformers")

WIDTH, VOCABULARY = 16, 40
COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = {**COMMON, "intermediate_size": 8, "num_key_value_heads": 2, "pad_token_id": 0}
_GEMMA = {**LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8}


class Kind(NamedTuple):
    """A class of models: its options, the path of the final norm, what its logits are multiplied with, their cap."""

    class_name: str
    options: dict[str, Any]
    norm: str = "model.norm"
    scale: float = 1.0
    cap: float | None = None


MODELS = {
    "llama": Kind("LlamaForCausalLM", LLAMA_LIKE),
    "gpt2": Kind(
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 1, "n_head": 2},
        "transformer.ln_f",
    ),
    "neox": Kind("GPTNeoXForCausalLM", {**COMMON, "intermediate_size": 8}, "gpt_neox.final_layer_norm"),
    "phi, whose head has a bias": Kind("PhiForCausalLM", {**COMMON, "intermediate_size": 8}, "model.final_layernorm"),
    "cohere": Kind("CohereForCausalLM", {**LLAMA_LIKE, "logit_scale": 0.0625}, scale=0.0625),
    "granite": Kind("GraniteForCausalLM", {**LLAMA_LIKE, "logits_scaling": 8.0}, scale=0.125),
    "gemma2": Kind("Gemma2ForCausalLM", {**_GEMMA, "final_logit_softcapping": 30.0}, cap=30.0),
    "gemma2, a low cap": Kind("Gemma2ForCausalLM", {**_GEMMA, "final_logit_softcapping": 2.0}, cap=2.0),
    "gemma2, no cap": Kind("Gemma2ForCausalLM", {**_GEMMA, "final_logit_softcapping": None}),
    "nanochat, tanh of another way": Kind(
        "NanoChatForCausalLM", {**LLAMA_LIKE, "final_logit_softcapping": 15.0}, cap=15.0
    ),
    "hyperclovax, which multiplies": Kind("HyperCLOVAXForCausalLM", {**LLAMA_LIKE, "logits_scaling": 4.0}, scale=4.0),
}


def built(kind: Kind, dtype: torch.dtype = torch.float32) -> Any:
    made = getattr(transformers, kind.class_name, None)
    if made is None:
        pytest.skip(f"not applicable: this version of transformers has no {kind.class_name}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made(made.config_class(**kind.options)).eval()
        for parameter in model.get_submodule(kind.norm).parameters():  # not just ones and zeros
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype)


def _model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose logits are large enough for a cap to show."""
    model = built(MODELS[name])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.get_output_embeddings().parameters():
            nn.init.normal_(parameter)
    return model.to(dtype)


def some_mfa(components: int = 5, rank: int = 3) -> MFA:
    m = mixture(components, WIDTH, rank)
    return MFA.from_parameters(*m[:3], m.log_weights.exp())


def _own_logits(model: Any, norm: str, points: Tensor) -> Tensor:
    """The model's logits (n, V) where points (n, D) are what its final norm reads."""
    hook = model.get_submodule(norm).register_forward_pre_hook(lambda module, inputs: (points.unsqueeze(0),))
    try:
        with torch.no_grad():
            return model(input_ids=torch.ones(1, len(points), dtype=torch.long)).logits[0]
    finally:
        hook.remove()


def changes(model: Any, mfa: MFA, k: int, direction: int | None) -> Tensor:
    found = torch.zeros(VOCABULARY, dtype=torch.float64)
    for token in logit_lens(model, mfa, k, direction=direction, top=VOCABULARY).top:
        found[token.token_id] = token.change
    return found


def _expected(name: str, mfa: MFA, k: int, direction: int | None) -> Tensor:
    """By the definition, from the logits of the model in float64."""
    model, norm = _model(name, torch.float64), MODELS[name].norm
    means, w = mfa.means.detach().double(), mfa.loadings.detach().double()
    if direction is None:
        logits = _own_logits(model, norm, means)
        return logits[k] - mfa.log_weights.detach().double().exp() @ logits
    high, low = _own_logits(model, norm, torch.stack([means[k] + w[k, :, direction], means[k] - w[k, :, direction]]))
    return high - low


@pytest.mark.parametrize("name", MODELS)
def test_the_lens_has_the_logits_of_the_model(name: str) -> None:
    model, mfa = _model(name), some_mfa()
    for direction in (None, 1):
        expected = _expected(name, mfa, 2, direction)
        torch.testing.assert_close(changes(model, mfa, 2, direction), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_scale_and_cap_are_those_of_the_model(name: str, dtype: torch.dtype) -> None:
    _, _, norm, scale, cap = MODELS[name]
    head = measured(_model(name, dtype), WIDTH)
    tolerance = 1e-4 if dtype == torch.float32 else 0.01
    assert head.scale == pytest.approx(scale, rel=tolerance)
    assert head.cap == (None if cap is None else pytest.approx(cap, rel=tolerance))
    if scale == 1 and cap is None:
        assert head.scale == 1  # and so no rounding of it in results
    assert head.norm.state_dict().keys() == _model(name).get_submodule(norm).state_dict().keys()


def test_measuring_leaves_no_hook_and_takes_one_run() -> None:
    model = _model("gemma2")
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    logit_lens(model, some_mfa(), 0)
    assert len(runs) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in list(model.modules())[1:])


class _Other(transformers.LlamaForCausalLM):
    """A model whose logits are made in a way of their own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


def _other(change: Any) -> _Other:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Other(transformers.LlamaConfig(**LLAMA_LIKE)).eval()
    model.change = change
    return model


@pytest.mark.parametrize(
    "change", [lambda y: y + 0.2 * y.relu(), lambda y: y.log_softmax(-1), lambda y: y * torch.linspace(0.5, 1, 40)]
)
def test_logits_of_another_kind_are_refused(change: Any) -> None:
    with pytest.raises(ValueError, match="model: the logits of _Other are not a multiple"):
        logit_lens(_other(change), some_mfa(), 0)


def test_tokens_that_the_model_rules_out_do_not_change() -> None:
    def change(logits: Tensor) -> Tensor:
        return logits.masked_fill(torch.arange(VOCABULARY) >= 38, -torch.inf)

    found = changes(_other(change), some_mfa(), 1, None)
    assert (found[38:] == 0).all()
    assert (found[:38] != 0).all()


def test_a_norm_that_the_logits_do_not_come_from_is_refused() -> None:
    model = _model("gpt2")
    with pytest.raises(ValueError, match=r"norm: what 'transformer.h.0.ln_1' of GPT2LMHeadModel reads is not"):
        logit_lens(model, some_mfa(), 0, norm="transformer.h.0.ln_1")
    model.unused = nn.LayerNorm(WIDTH).eval()
    with pytest.raises(ValueError, match="norm: GPT2LMHeadModel does not call 'unused'"):
        logit_lens(model, some_mfa(), 0, norm="unused")


def test_what_comes_between_layers_and_norm_is_noticed() -> None:
    model = _model("llama")
    model.model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + torch.arange(16.0),))
    with pytest.raises(ValueError, match="reads is not the output of the last layer"):
        logit_lens(model, some_mfa(), 0)


def test_a_model_that_cannot_be_run_is_named() -> None:
    model = _model("llama")
    model.forward = lambda **_: 1 / 0
    with pytest.raises(ValueError, match="model: LlamaForCausalLM must run on token ids alone.*ZeroDivisionError"):
        logit_lens(model, some_mfa(), 0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_model_in_training_is_refused(name: str) -> None:
    model = _model(name)
    model.model.layers[1].train()
    with pytest.raises(ValueError, match="model is in training mode"):
        logit_lens(model, some_mfa(), 0)

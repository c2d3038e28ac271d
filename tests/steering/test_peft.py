"""Models with a learnt prompt of PEFT: its virtual tokens are prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mfa_kernels import steer
from mfa_kernels.data.language_model import hidden_states, with_hidden_states
from mfa_kernels.steering import Toward, intervene
from tests.steering.test_function_hook import installed
from tests.steering.tiny import LAYER, causal_lm, fitting_mixture, generated, prompts

VIRTUAL = 4


def learnt_prompt(kind: str) -> tuple[Any, nn.Module]:
    """A model of PEFT, and the language model inside it."""
    peft = installed("peft")
    configs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    inner = causal_lm()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(inner, configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)).eval()
        for parameter in model.prompt_encoder.parameters():
            nn.init.normal_(parameter)
    return model, inner


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("steered", ["the model of PEFT", "the model inside"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_prompt(kind: str, steered: str, positions: str) -> None:
    model, inner = learnt_prompt(kind)
    inputs, mfa, tokens = prompts(padded=True), fitting_mixture(), []
    layer = inner.model.layers[LAYER]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        tokens.append(hidden.shape[1])
        real = torch.nn.functional.pad(inputs["attention_mask"], (VIRTUAL, 0), value=1)[:, -hidden.shape[1] :, None]
        wanted = positions == "all" or (len(tokens) == 1) == (positions == "prompt")
        real = real > 0 if len(tokens) == 1 else torch.ones_like(real) > 0
        changed = intervene(hidden, mfa, Toward(2, 0.6))
        return with_hidden_states(output, torch.where(real, changed, hidden)) if wanted else None

    clean = generated(model, inputs)
    # Transformers 5.24 takes no cache by the name that PEFT 0.21 hands its prefix over by, says so, and goes on.
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.neg_()
    if torch.equal(generated(model, inputs)[1], clean[1]):
        pytest.skip("not applicable: with this transformers, the prompt that PEFT learnt does not reach the model")
    clean = generated(model, inputs)
    handle = layer.register_forward_hook(hook)
    expected = generated(model, inputs)
    handle.remove()
    if tokens[1:] != [1, 1, 1, 1]:
        pytest.skip(f"not applicable: with this transformers, PEFT reads its prompt anew at each step: {tokens}")
    with steer(model if steered == "the model of PEFT" else inner, mfa, LAYER, 2, 0.6, positions=positions):
        found = generated(model, inputs)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1], clean[1], rtol=1e-2)

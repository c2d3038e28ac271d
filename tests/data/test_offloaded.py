"""A model whose weights are on the meta device between passes does what it does with them in place, or says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mfa_kernels import harvest, steer
from mfa_kernels.data.harvest import stream
from mfa_kernels.data.language_model import continuation, input_device
from mfa_kernels.interpret import logit_lens, logit_shift
from mfa_kernels.steering import MFASteerer, alpha_for_kl
from tests.helpers.language import make_tokenizer
from tests.helpers.offload import offloaded
from tests.steering.tiny import causal_lm, fitting_mixture

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["w1 w2 w3", "w4 w5"]
PARTS: dict[str, tuple[str, ...]] = {
    "all": (), "embedding": ("model.embed_tokens",), "layers": ("model.layers",),
    "the steered one": ("model.layers.1",), "head": ("lm_head", "model.norm"),
}  # fmt: skip


@pytest.fixture(params=PARTS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model with some of its weights elsewhere, and one with all of them."""
    model = offloaded(causal_lm(), *PARTS[request.param])
    assert any(parameter.is_meta for parameter in model.parameters())
    return model, causal_lm()


def test_the_imitation_is_one() -> None:
    model, ids = offloaded(causal_lm()), torch.tensor([[3, 4, 5]])
    assert model.device.type == "meta"
    assert torch.equal(model(ids).logits, causal_lm()(ids).logits)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_it_is_read_steered_and_written_with(pair: tuple[Any, Any]) -> None:
    tokenizer, mfa, found = make_tokenizer(bos=True), fitting_mixture(), []
    for model in pair:
        own: dict[str, Any] = {"harvested": harvest(model, tokenizer, TEXTS, 1, progress=False).tensor()}
        own["streamed"] = torch.cat(list(stream(model, tokenizer, TEXTS, 1)))
        own["written"] = continuation(model, tokenizer, TEXTS[0], 5)
        own["sampled"] = continuation(model, tokenizer, TEXTS[0], 5, temperature=1.0)
        with steer(model, mfa, 1, 3, 0.7, torch.ones(3), positions="generated"):
            own["steered"] = continuation(model, tokenizer, TEXTS[0], 5)
        own["shift"] = logit_shift(model, tokenizer, TEXTS[0], lambda: steer(model, mfa, 1, 3, 0.5))  # noqa: B023
        with steer(model, mfa, 1, 3, 0.1) as handle:
            own["alpha"] = alpha_for_kl(model, tokenizer(TEXTS[0], return_tensors="pt"), handle, 0.02)
        own["logits"] = MFASteerer(model, mfa, 1, tokenizer).intervene(TEXTS[0], 0.5, 3)
        found.append(own)
    for name, value in found[1].items():
        same = torch.equal(found[0][name], value) if isinstance(value, torch.Tensor) else found[0][name] == value
        assert same, name
    assert found[1]["steered"] != found[1]["written"]
    assert found[1]["shift"].divergence > 0
    assert any(parameter.is_meta for parameter in pair[0].parameters()), "what was elsewhere is there again"


def test_the_lens_reads_weights_and_says_which_are_elsewhere(pair: tuple[Any, Any]) -> None:
    model, whole = pair
    mfa = fitting_mixture()
    if model.lm_head.weight.is_meta:
        with pytest.raises(ValueError, match=r"its unembedding of LlamaForCausalLM is on the meta device .*device_map"):
            logit_lens(model, mfa, 2)
        return
    assert logit_lens(model, mfa, 2, direction=1) == logit_lens(whole, mfa, 2, direction=1)
    norm = offloaded(causal_lm(), "model.norm")
    with pytest.raises(ValueError, match=r"'model.norm' of LlamaForCausalLM is on the meta device"):
        logit_lens(norm, mfa, 2)


def test_it_is_not_moved(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"device: LlamaForCausalLM is on (cpu, )?meta, .*leave device out"):
        harvest(pair[0], make_tokenizer(bos=True), TEXTS, 1, device="cpu", progress=False)


def test_weights_that_were_never_loaded() -> None:
    with torch.device("meta"):
        model, tokenizer = causal_lm().to("meta"), make_tokenizer(bos=True)
    with pytest.raises(ValueError, match="weights are not loaded"):
        harvest(model, tokenizer, TEXTS, 1, progress=False)
    with pytest.raises(ValueError, match="weights are not loaded"):
        logit_shift(model, tokenizer, TEXTS[0], lambda: steer(model, fitting_mixture(), 1, 3, 0.5))
    with (
        steer(model, fitting_mixture(), 1, 3, 0.1) as handle,
        pytest.raises(ValueError, match="weights are not loaded"),
    ):
        alpha_for_kl(model, tokenizer(TEXTS[0], return_tensors="pt"), handle, 0.02)
    with pytest.raises(ValueError, match="weights are not loaded"):
        continuation(model, tokenizer, TEXTS[0], 2)


def test_where_ids_go() -> None:
    assert input_device(nn.Linear(2, 2)) == torch.device("cpu")
    assert input_device(nn.Module()) == torch.device("cpu")
    assert input_device(causal_lm().to("meta")) == torch.device("cpu")

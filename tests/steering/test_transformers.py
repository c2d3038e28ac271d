"""Steering inside tools of transformers: streamers, pipelines, and layers that return tuples."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import steer
from mfa_kernels.data import tiny_lm
from mfa_kernels.data.language_model import hidden_states, with_hidden_states
from mfa_kernels.steering import Responsibility
from tests.steering.tiny import LAYER, causal_lm, fitting_mixture, generate, generated, layer_output

TEXTS = ["def read(path):", "The return value of this"]
SPECS: dict[str, dict[str, Any]] = {
    "fixed": {"component": 2, "alpha": 0.6},
    "gate": {"component": 2, "alpha": 0.6, "gate": Responsibility(0, 0.1), "norm": "keep"},
}


class Packed(nn.Module):
    """A decoder layer as in transformers 4: its hidden states come in a tuple, with something behind them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str]:
        self.output = self.layer(*args, **kwargs)
        return hidden_states(self.output), "attention"


class Unpacked(nn.Module):
    """A model that reads such a tuple; it must find what the layer left behind the hidden states."""

    def __init__(self, layer: Packed) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, rest = self.layer(*args, **kwargs)
        assert rest == "attention"
        return with_hidden_states(self.layer.output, hidden)


@pytest.mark.parametrize("name", SPECS)
def test_layers_that_return_tuples(padded: Any, mfa: Any, model: Any, name: str) -> None:
    """The same numbers, bit for bit, whichever way the layer returns them."""
    with steer(model, mfa, LAYER, **SPECS[name]) as handle:
        expected, stats = generated(model, padded), handle.stats()
    packed = causal_lm()
    for i, layer in enumerate(packed.model.layers):
        packed.model.layers[i] = Unpacked(Packed(layer))
    clean = generated(packed, padded)
    with steer(packed, mfa, f"model.layers.{LAYER}.layer", **SPECS[name]) as handle:
        assert all(torch.equal(*pair) for pair in zip(generated(packed, padded), expected))
        assert handle.stats() == stats
    assert not torch.equal(clean[1], expected[1])


def writing_model(gated: bool) -> tuple[Any, Any, dict[str, Any]]:
    """The package's model and tokenizer, and arguments of `steer` under which it writes something else."""
    model, tokenizer = tiny_lm.load()
    mfa = fitting_mixture(features=model.config.hidden_size)
    r = mfa.responsibilities(layer_output(model, tokenizer(TEXTS[0], return_tensors="pt"), 2))
    gate = Responsibility(int(r.mean((0, 1)).argmax()), 0.1) if gated else None
    return model, tokenizer, {"mfa": mfa, "layer": 2, "component": 2, "alpha": 0.9, "gate": gate}


@pytest.mark.parametrize("gated", [False, True])
def test_text_iterator_streamer(gated: bool) -> None:
    from transformers import TextIteratorStreamer

    model, tokenizer, spec = writing_model(gated)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    with steer(model, **spec):
        expected = generate(model, inputs, new=12).sequences
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        thread = threading.Thread(target=generate, args=(model, inputs, 12), kwargs={"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(expected[0])
    assert not torch.equal(generate(model, inputs, new=12).sequences, expected)


@pytest.mark.parametrize("gated", [False, True])
def test_pipeline(gated: bool) -> None:
    from transformers import pipeline

    model, tokenizer, spec = writing_model(gated)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    # Cleaning up takes spaces before punctuation away: the default in transformers 4, no longer in 5.
    options = {"max_new_tokens": 8, "do_sample": False, "clean_up_tokenization_spaces": False}
    clean = writer(TEXTS, **options)
    with steer(model, **spec):
        written = writer(TEXTS, **options)
        for text, (out,) in zip(TEXTS, written):
            inputs = tokenizer(text, return_tensors="pt")
            expected = generate(model, inputs, new=8).sequences[0]
            assert out["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert written != clean
    assert writer(TEXTS, **options) == clean

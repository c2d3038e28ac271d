"""Steering inside a trace of nnsight.

    python examples/nnsight_trace.py

`steer` works on a model that nnsight holds, too; a `SteeringFunction` is for traces, where one writes activations.
"""

from __future__ import annotations

import nnsight
import torch
from _small import LAYER, model_and_mixture, parser

from mfa_kernels.data.language_model import decoder_layers
from mfa_kernels.steering import SteeringFunction, Toward

PROMPT = "def close(self):\n"


def main() -> None:
    given = parser(__doc__).parse_args()
    model, tokenizer, mfa = model_and_mixture(given.model)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    function, held = SteeringFunction(mfa, Toward(3, 0.5)), nnsight.NNsight(model)
    layers = decoder_layers(model)[0]  # the path, such as "model.layers"
    stack = held
    for name in layers.split("."):
        stack = getattr(stack, name)
    with torch.no_grad():
        plain = model(ids).logits[0, -1].log_softmax(-1)
        with held.trace(ids):
            output = stack[LAYER].output
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[:] = function(hidden)
            logits = held.output.logits.save()
    for change, token in zip(*(logits[0, -1].log_softmax(-1) - plain).topk(5)):
        print(f"{change:+.2f} nats  {tokenizer.decode([int(token)])!r}")


if __name__ == "__main__":
    main()

"""Steering in a hook of TransformerLens.

    python examples/transformer_lens_hook.py

A `SteeringFunction` is a map of activations: what a hook takes. It works in `run_with_hooks` and in `hooks`.
"""

from __future__ import annotations

import torch
from _small import LAYER, model_and_mixture, parser
from transformer_lens.model_bridge import TransformerBridge

from mfa_kernels.steering import SteeringFunction, Toward

PROMPT = "def close(self):\n"


def main() -> None:
    given = parser(__doc__).parse_args()
    model, tokenizer, mfa = model_and_mixture(given.model)
    bridge = TransformerBridge.boot_transformers(
        model.name_or_path or "tiny_lm", hf_model=model, tokenizer=tokenizer, device="cpu"
    )
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    function = SteeringFunction(mfa, Toward(3, 0.5))
    with torch.no_grad():
        plain = bridge(ids)[0, -1].log_softmax(-1)
        steered = bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{LAYER}.hook_out", function)])[0, -1].log_softmax(-1)
    for change, token in zip(*(steered - plain).topk(5)):
        print(f"{change:+.2f} nats  {tokenizer.decode([int(token)])!r}")


if __name__ == "__main__":
    main()

"""Cost of steering per decode step: a Llama of 12 layers, hidden size 768, float32, with a KV cache, at batch 1 and 8.

    python -m bench.bench_steering [--rounds 60]

The ways take turns, so that what else the machine does weighs on all alike: each time is taken over that of the
unsteered step of the same round, and the median of these ratios is printed. The mixture has K = 2048 regions of rank
10: 69 MB of rows, beside 453 MB of weights. `gate` and what follows it hold every token against all regions, most of
which bounds rule out; `gate_dense` computes them all. The weights are random, and what a random network computes has no
regions: the layer's output is exchanged for activations of the small language model that ships with the package (three
of its layers side by side), to which the mixture is fitted; the unsteered step pays for the exchange too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import torch

from bench.screen_survivors import HELD_OUT, activations
from mfa_kernels import MFA, fit, steer
from mfa_kernels.data.language_model import hidden_states, with_hidden_states
from mfa_kernels.mixture import screening
from mfa_kernels.steering import Offset, Reconstruct, Remove, Toward

LAYER, CONTEXT, HIDDEN, REGIONS, RANK = 6, 128, 768, 2048, 10
ROWS = 60_000  # activations that the mixture is fitted to
Z = torch.linspace(-2, 2, RANK)
WAYS: dict[str, dict[str, Any] | None] = {
    "unsteered": None,
    "fixed": {"interventions": [Toward(17, 0.4), Offset(17, Z)]},
    "fixed_scheduled_generated": {"interventions": Toward(17, lambda step: 0.4), "positions": "generated"},
    "remove_latents": {"interventions": Remove(17)},
    "gate": {"interventions": [Toward(17, 0.4), Offset(17, Z)], "gate": (17, 0.5)},
    "gate_dense": {"interventions": [Toward(17, 0.4), Offset(17, Z)], "gate": (17, 0.5)},
    "mixture": {"interventions": [Toward(None, 0.4), Offset(None, Z)]},
    "mixture_gate_norm": {"interventions": [Toward(None, 0.4), Offset(None, Z)], "gate": (17, 0.5), "norm": "keep"},
    "reconstruct": {"interventions": Reconstruct(0.4)},
}


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
        max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_mixture() -> tuple[MFA, torch.Tensor]:
    """Fitted, and activations (n, D) that it was not fitted to."""
    x = activations(HIDDEN, ROWS)
    mfa = fit(x[:-HELD_OUT], REGIONS, RANK, method="em", epochs=2, progress=False)
    return mfa.requires_grad_(False), x[-HELD_OUT:]


def exchange(model: Any, tokens: Iterator[torch.Tensor]) -> None:
    """Makes these the layer's outputs from now on, one batch a pass."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        return with_hidden_states(output, next(tokens)[: len(hidden)].unsqueeze(1).expand_as(hidden).contiguous())

    model.model.layers[LAYER].register_forward_hook(hook)


def token_ids(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 32000, (batch, length), generator=torch.Generator().manual_seed(seed))


def times(model: Any, mfa: MFA, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a decode step after the same context, by way and round."""
    from transformers import DynamicCache

    context, ids = DynamicCache(), token_ids(batch, CONTEXT + 1, 0)
    model(ids[:, :-1], None, None, context)  # the cache by its place: its name differs between versions
    screened_at = screening._LONE_TOKEN_VALUES
    screening._LONE_TOKEN_VALUES = sys.maxsize
    dense = copy.deepcopy(mfa)  # the only one without a screen
    steer(model, dense, LAYER, gate=(17, 0.5), component=17, alpha=0.4).remove()
    screening._LONE_TOKEN_VALUES = screened_at
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds + 2):
        for way, spec in WAYS.items():
            cache = copy.deepcopy(context)
            with ExitStack() as stack:
                if way == "gate_dense":
                    screening._LONE_TOKEN_VALUES = sys.maxsize
                if spec is not None:
                    stack.enter_context(steer(model, dense if way == "gate_dense" else mfa, LAYER, **spec))
                screening._LONE_TOKEN_VALUES = screened_at
                begin = time.perf_counter()
                model(ids[:, -1:], None, None, cache)
                found[way].append(time.perf_counter() - begin)
    return {way: seconds[2:] for way, seconds in found.items()}  # the first rounds warm up


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    model = make_model()
    mfa, x = make_mixture()
    exchange(model, (part for part in cycle(x.split(8)) for _ in WAYS))  # a round sees the same tokens
    found = {batch: times(model, mfa, batch, rounds) for batch in (1, 8)}
    print("| | " + " | ".join(f"batch {batch}" for batch in found) + " |\n|---|" + "---|" * len(found))
    medians = (f"{statistics.median(of['unsteered']) * 1e3:.1f} ms" for of in found.values())
    print("| unsteered | " + " | ".join(medians) + " |")
    for way in list(WAYS)[1:]:
        ratios = [[a / b for a, b in zip(of[way], of["unsteered"])] for of in found.values()]
        print(f"| {way} | " + " | ".join(f"{statistics.median(r):.3f}" for r in ratios) + " |")


if __name__ == "__main__":
    main()

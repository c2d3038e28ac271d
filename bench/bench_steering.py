"""Cost of steering per decode step, with a KV cache, at batch 1 and 8: a real model, or a Llama of random weights.

    python -m bench.bench_steering [--rounds 60] [-K 4096] [--toy]

The ways take turns, so that what else the machine does weighs on all alike: each time is taken over that of the
unsteered step of the same round, and the median of these ratios is printed. `gate` and what follows it hold every token
against all regions, most of which bounds rule out; `gate_dense` computes them all.

SmolLM2-135M is steered at the layer that the mixture is of, after the beginnings of held-out documents. With --toy it
is a Llama of 12 layers and hidden size 768 with random weights, 453 MB of them. What a random network computes has no
regions: the layer's output is exchanged for activations of the small language model that ships with the package (three
of its layers side by side), to which the mixture is fitted; the unsteered step pays for the exchange too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from contextlib import ExitStack
from itertools import cycle
from typing import Any, NamedTuple

import torch

from bench import activations
from bench.activations import Toy
from bench.real import RANK, Real
from bench.texts import is_held_out
from mfa_kernels import MFA, steer
from mfa_kernels.data.language_model import hidden_states, with_hidden_states
from mfa_kernels.mixture import screening
from mfa_kernels.models import load_language_model
from mfa_kernels.steering import Offset, Reconstruct, Remove, Toward

CONTEXT, CONTEXTS = 128, 8  # tokens before the step; and how many such contexts rounds take in turn
TOY_LAYER, TOY_HIDDEN = 6, 768
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


class Ground(NamedTuple):
    """What is steered: the layer of a model, and tokens to begin with."""

    model: Any
    layer: int
    tokens: torch.Tensor  # (contexts, CONTEXT + 1)


def real_ground(found: Real) -> Ground:
    model, _ = load_language_model("smollm2")
    held = [document for document, source in enumerate(found.sources) if is_held_out(source)]
    beginnings = (found.store.document_tokens(document)[: CONTEXT + 1].long() for document in held)
    tokens = [ids for ids in beginnings if len(ids) > CONTEXT]
    return Ground(model, found.layer, torch.stack(tokens))


def toy_ground(found: Toy) -> Ground:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=TOY_HIDDEN, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    passes = (part for part in cycle(found.split()[1].split(8)) for _ in WAYS)  # a round sees the same rows

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        return with_hidden_states(output, next(passes)[: len(hidden)].unsqueeze(1).expand_as(hidden).contiguous())

    model.model.layers[TOY_LAYER].register_forward_hook(hook)
    tokens = torch.randint(3, 32000, (8, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    return Ground(model, TOY_LAYER, tokens)


def times(ground: Ground, mfa: MFA, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a decode step after a context, by way and round."""
    from transformers import DynamicCache

    model, layer, tokens = ground
    contexts = []
    for ids in tokens[: len(tokens) // batch * batch].split(batch)[:CONTEXTS]:
        cache = DynamicCache()
        model(ids[:, :-1], None, None, cache)  # the cache by its place: its name differs between versions
        contexts.append((cache, ids[:, -1:]))
    screened_at = screening._LONE_TOKEN_VALUES
    screening._LONE_TOKEN_VALUES = sys.maxsize
    dense = copy.deepcopy(mfa)  # the only one without a screen
    steer(model, dense, layer, gate=(17, 0.5), component=17, alpha=0.4).remove()
    screening._LONE_TOKEN_VALUES = screened_at
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for (context, last), _ in zip(cycle(contexts), range(rounds + 2)):
        for way, spec in WAYS.items():
            cache = copy.deepcopy(context)
            with ExitStack() as stack:
                if way == "gate_dense":
                    screening._LONE_TOKEN_VALUES = sys.maxsize
                if spec is not None:
                    stack.enter_context(steer(model, dense if way == "gate_dense" else mfa, layer, **spec))
                screening._LONE_TOKEN_VALUES = screened_at
                begin = time.perf_counter()
                model(last, None, None, cache)
                found[way].append(time.perf_counter() - begin)
    return {way: seconds[2:] for way, seconds in found.items()}  # the first rounds warm up


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("-K", "--components", type=int, default=4096)
    activations.add_arguments(parser)
    options = parser.parse_args()
    source = activations.chosen(options, TOY_HIDDEN)
    ground = toy_ground(source) if isinstance(source, Toy) else real_ground(source)
    mfa = source.mixture(options.components).requires_grad_(False)
    found = {batch: times(ground, mfa, batch, options.rounds) for batch in (1, 8)}
    print("| | " + " | ".join(f"batch {batch}" for batch in found) + " |\n|---|" + "---|" * len(found))
    medians = (f"{statistics.median(of['unsteered']) * 1e3:.1f} ms" for of in found.values())
    print("| unsteered | " + " | ".join(medians) + " |")
    for way in list(WAYS)[1:]:
        ratios = [[a / b for a, b in zip(of[way], of["unsteered"])] for of in found.values()]
        print(f"| {way} | " + " | ".join(f"{statistics.median(r):.3f}" for r in ratios) + " |")


if __name__ == "__main__":
    main()

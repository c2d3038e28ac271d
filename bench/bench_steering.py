"""What steering costs a decode step: a Llama of 12 layers, hidden size 768, float32, with a KV cache, at batch 1 and 8.

    python -m pytest bench/bench_steering.py --benchmark-disable-gc --benchmark-json=steering.json
    python -m bench.bench_steering steering.json

The second command prints each time over that of the unsteered step of the same run. The gate looks at one of K = 2048
regions of rank 10, so every token is held against all of them: 69 MB of rows, beside 453 MB of weights.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import baselines
from mfa_kernels import MFA, steer
from mfa_kernels.steering import Offset, Reconstruct, Remove, Toward

LAYER, CONTEXT, SHAPE = 6, 128, (1, 2048, 768, 10)
ROUNDS, WARMUP = 60, 5
Z = torch.linspace(-2, 2, SHAPE[3])
WAYS: dict[str, dict[str, Any] | None] = {
    "unsteered": None,
    "fixed": {"interventions": [Toward(17, 0.4), Offset(17, Z)]},
    "fixed_scheduled_generated": {"interventions": Toward(17, lambda step: 0.4), "positions": "generated"},
    "remove_latents": {"interventions": Remove(17)},
    "gate": {"interventions": [Toward(17, 0.4), Offset(17, Z)], "gate": (17, 0.5)},
    "mixture": {"interventions": [Toward(None, 0.4), Offset(None, Z)]},
    "mixture_gate_norm": {"interventions": [Toward(None, 0.4), Offset(None, Z)], "gate": (17, 0.5), "norm": "keep"},
    "reconstruct": {"interventions": Reconstruct(0.4)},
}


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SHAPE[2], intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
        max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def mfa() -> MFA:
    _, (means, loadings, noise_variance, log_weights) = baselines.problem(SHAPE)
    return MFA.from_parameters(means, loadings, noise_variance, log_weights.exp()).requires_grad_(False)


@pytest.fixture(params=[1, 8])
def step(request: pytest.FixtureRequest, model: Any) -> Iterator[Callable[[Any], Any]]:
    """One decode step after a context of the same length every time."""
    from transformers import DynamicCache

    batch, cache = request.param, DynamicCache()
    ids = torch.randint(3, 32000, (batch, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)

        def run(cache: Any) -> Any:
            return model(input_ids=ids[:, -1:], past_key_values=cache).logits

        run.batch = batch  # type: ignore[attr-defined]
        run.setup = lambda: ((copy.deepcopy(cache),), {})  # type: ignore[attr-defined]
        yield run


@pytest.mark.parametrize("way", WAYS)
def test_decode_step(benchmark: Any, step: Any, model: Any, mfa: MFA, way: str) -> None:
    benchmark.group = f"decode step, batch {step.batch}"
    benchmark.extra_info["way"] = way
    with ExitStack() as stack:
        spec = WAYS[way]
        if spec is not None:
            handle = stack.enter_context(steer(model, mfa, LAYER, **spec))
        benchmark.pedantic(step, setup=step.setup, rounds=ROUNDS, warmup_rounds=WARMUP)
        if spec is not None:
            seen, steered = handle.stats()[:2]
            assert seen == (ROUNDS + WARMUP) * step.batch
            benchmark.extra_info["steered"] = steered / seen


def table(report: dict[str, Any]) -> str:
    """One row per way, one column per batch: the median time over the unsteered step's."""
    times: dict[str, dict[str, float]] = {}
    for entry in report["benchmarks"]:
        times.setdefault(entry["group"], {})[entry["extra_info"]["way"]] = entry["stats"]["median"]
    lines = ["| | " + " | ".join(times) + " |", "|---|" + "---|" * len(times)]
    unsteered = " | ".join(f"{group['unsteered'] * 1e3:.2f} ms" for group in times.values())
    lines.append(f"| unsteered | {unsteered} |")
    for way in WAYS:
        if way != "unsteered":
            cells = [f"{(group[way] / group['unsteered'] - 1) * 100:+.1f}%" for group in times.values()]
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))

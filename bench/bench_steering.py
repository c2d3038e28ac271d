"""What steering costs a decode step: a Llama of 12 layers, hidden size 768, float32, with a KV cache, at batch 1 and 8.

    python -m pytest bench/bench_steering.py --benchmark-disable-gc --benchmark-json=steering.json
    python -m bench.bench_steering steering.json

The second command prints each time over that of the unsteered step of the same run. The mixture has K = 2048 regions of
rank 10, from K-means and cluster PCA of the layer's activations: 69 MB of rows, beside 453 MB of weights. `gate` and
what follows it hold every token against all regions, most of which bounds rule out; `gate_dense` computes them all.
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

from mfa_kernels import MFA, fit, steer
from mfa_kernels.models import hidden_states
from mfa_kernels.steering import Offset, Reconstruct, Remove, Toward, evidence

LAYER, CONTEXT, HIDDEN, REGIONS, RANK = 6, 128, 768, 2048, 10
ROUNDS, WARMUP = 60, 5
WORDS, ROWS = 4000, 40_000  # different tokens in the text, and its length
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


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000,
        max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def mfa(model: Any) -> MFA:
    kept: list[torch.Tensor] = []
    hook = model.model.layers[LAYER].register_forward_hook(
        lambda module, args, output: kept.append(hidden_states(output).flatten(0, 1))
    )
    with torch.no_grad():
        for seed in range(ROWS // (8 * CONTEXT)):
            model(input_ids=token_ids(8, CONTEXT, seed + 1))
    hook.remove()
    return fit(torch.cat(kept), REGIONS, RANK, epochs=0, progress=False).requires_grad_(False)


def token_ids(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 3 + WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 8])
def step(request: pytest.FixtureRequest, model: Any) -> Iterator[Callable[[Any], Any]]:
    """One decode step after a context of the same length every time."""
    from transformers import DynamicCache

    batch, cache = request.param, DynamicCache()
    ids = token_ids(batch, CONTEXT + 1, 0)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)

        def run(cache: Any) -> Any:
            return model(input_ids=ids[:, -1:], past_key_values=cache).logits

        run.batch = batch  # type: ignore[attr-defined]
        run.setup = lambda: ((copy.deepcopy(cache),), {})  # type: ignore[attr-defined]
        yield run


@pytest.mark.parametrize("way", WAYS)
def test_decode_step(
    benchmark: Any, step: Any, model: Any, mfa: MFA, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark.group = f"decode step, batch {step.batch}"
    benchmark.extra_info["way"] = way
    if way == "gate_dense":
        monkeypatch.setattr(evidence, "_SCREENED_VALUES", sys.maxsize)
        mfa = copy.deepcopy(mfa)  # without its screen
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

"""The steered decode step compiles whole: one graph, no break, the results of eager code, with a static cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import steer
from mfa_kernels.steering import Add, LogDensity, Reconstruct, Remove, Responsibility, Toward
from tests.steering.tiny import CACHE, LAYER, SLIDING, VERSION, WIDTH, causal_lm, fitting_mixture, prompts, static_cache

Z = torch.tensor([2.0, -3.0, 1.0])
WHOLE: dict[str, dict[str, Any]] = {
    "fixed": {"component": 2, "alpha": 0.6, "latents": Z},
    "gate": {"component": 2, "alpha": 0.6, "gate": Responsibility(0, 0.1) & ~LogDensity(-20.0)},
    "mixture": {"component": None, "alpha": 0.6, "latents": Z, "norm": "keep"},
    "several": {"interventions": [Remove(1, "region"), Remove(2), Add(torch.ones(WIDTH), 0.3), Reconstruct(0.5)]},
    "rows": {"rows": [Toward(1, 0.6), None], "gate": [None, (0, 0.1)], "positions": "generated"},
}
BROKEN: dict[str, dict[str, Any]] = {
    "schedule": {"component": 2, "alpha": lambda step: 0.2 * step},
    "slice": {"component": 2, "alpha": 0.6, "positions": slice(8, 10)},
    "prompt": {"component": 2, "alpha": 0.6, "positions": "prompt"},
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@torch.no_grad()
def decode(model: nn.Module, step: Any, new: int = 5) -> tuple[Tensor, Tensor]:
    """Tokens (B, new) and the logits after them, greedily: the prompt by the model, each token after it by `step`."""
    cache, tokens = static_cache(model), []
    logits = model(**prompts(), **{CACHE: cache}).logits[:, -1]
    for _ in range(new):
        tokens.append(logits.argmax(-1, keepdim=True))
        # As `generate` of transformers 4 does: without it, no step on a static cache compiles whole, steered or not.
        where = {"cache_position": torch.tensor([7 + len(tokens) - 1])} if VERSION < (5, 0) else {}
        logits = step(input_ids=tokens[-1], **{CACHE: cache}, **where).logits[:, -1]
    return torch.cat(tokens, 1), logits


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("name", "architecture"), [*((name, "llama") for name in WHOLE), ("gate", SLIDING)])
def test_one_graph(name: str, architecture: str) -> None:
    model, mfa = causal_lm(architecture), fitting_mixture()
    clean = decode(model, model)
    with steer(model, mfa, LAYER, **WHOLE[name]) as handle:
        expected, stats = decode(model, model), handle.stats()
    with steer(model, mfa, LAYER, **WHOLE[name]) as handle:
        tokens, logits = decode(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
        assert handle.stats()[:2] == stats[:2]
        if stats.mean_responsibility is not None:
            assert handle.stats().mean_responsibility == pytest.approx(stats.mean_responsibility, rel=1e-4)
    # Gemma's sliding windows count their tokens on the host, which makes a second graph, steered or not.
    assert graphs() == (1 if architecture == "llama" else 2)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, clean[1], rtol=1e-2)


@pytest.mark.parametrize(
    "name", [name if i < 1 else pytest.param(name, marks=pytest.mark.more) for i, name in enumerate(BROKEN)]
)
def test_what_depends_on_the_position_breaks_the_graph_and_is_right(model: Any, mfa: Any, name: str) -> None:
    with steer(model, mfa, LAYER, **BROKEN[name]):
        expected = decode(model, model)
        tokens, logits = decode(model, torch.compile(model, backend="eager"))
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            decode(model, torch.compile(model, fullgraph=True, backend="eager"))


def test_updates_reach_the_compiled_step(model: Any, mfa: Any) -> None:
    with steer(model, mfa, LAYER, 2, 0.6) as handle:
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        for change in ({}, {"alpha": 0.2}, {"component": 4}, {"alpha": 0.7}, {"gate": (0, 0.1)}):
            handle.update(**change)
            tokens, logits = decode(model, step)
            expected = decode(model, model)
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)
    assert graphs() <= 4  # a region and an alpha are inputs; a gate is another graph


def test_two_layers_and_removal(model: Any, mfa: Any) -> None:
    clean = decode(model, model)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with steer(model, mfa, 0, 1, 0.5), steer(model, mfa, 2, None, 0.5):
        expected = decode(model, model)
        torch.testing.assert_close(decode(model, step)[1], expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(model, step)[1], clean[1], rtol=1e-4, atol=1e-4)

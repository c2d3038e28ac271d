"""Text written under steering does not depend on how the sequence is read: cache, chunks, padding, beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfa_kernels import steer
from mfa_kernels.steering import Add, LogDensity, Offset, Reconstruct, Remove, Responsibility, Toward
from tests.steering import tiny


@pytest.mark.parametrize("arguments", [tiny.BOTH, tiny.MIXTURE], ids=["fixed", "mixture"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
class TestArchitectures:
    def test_layer_output_is_the_formula(self, architecture: str, arguments: dict[str, Any]) -> None:
        model, inputs = tiny.causal_lm(architecture), tiny.prompts()
        clean = tiny.layer_output(model, inputs)
        with steer(model, tiny.fitting_mixture(torch.float64), tiny.LAYER, **arguments):
            steered = tiny.layer_output(model, inputs)
        torch.testing.assert_close(steered.double(), tiny.dense(clean, **arguments), rtol=1e-6, atol=1e-6)

    def test_cache_equals_recomputation(self, architecture: str, arguments: dict[str, Any]) -> None:
        model, inputs = tiny.causal_lm(architecture), tiny.prompts(padded=True)
        clean, _ = tiny.generated(model, inputs)
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, **{**arguments, "alpha": tiny.ramp}):
            written = tiny.generated(model, inputs)
            for options in ({"use_cache": False}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 6}):
                if architecture == "gpt2" and "prefill_chunk_size" in options and tiny.VERSION <= (4, 51):
                    continue  # transformers knows no cache of chunks for it
                tiny.assert_written_alike(tiny.generated(model, inputs, **options), written)
        assert not torch.equal(written[0], clean)

    def test_padded_batch_equals_singles(self, architecture: str, arguments: dict[str, Any]) -> None:
        model, inputs = tiny.causal_lm(architecture), tiny.prompts(3, padded=True)
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, **arguments):
            written = tiny.generated(model, inputs)
            for row in range(3):
                single = {"input_ids": inputs["input_ids"][row : row + 1, row + 1 :]}
                tiny.assert_written_alike(tiny.row_of(written, row), tiny.generated(model, single))

    def test_removal_is_bitwise(self, architecture: str, arguments: dict[str, Any]) -> None:
        model, inputs = tiny.causal_lm(architecture), tiny.prompts()
        before = tiny.generated(model, inputs)
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, **arguments):
            assert not torch.equal(tiny.generated(model, inputs)[1], before[1])
        tiny.assert_same(tiny.generated(model, inputs), before)


@pytest.mark.parametrize(
    "positions",
    ["all", "prompt", "generated", "last", slice(2, 9, 2), torch.arange(10) % 3 == 0,
     torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 1, 1, 1, 0]]).bool()],
    ids=["all", "prompt", "generated", "last", "slice", "mask", "mask per row"],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [0.6, tiny.ramp], ids=["constant", "schedule"])
@pytest.mark.parametrize("component", [2, None], ids=["fixed", "mixture"])
def test_positions_do_not_depend_on_how_the_sequence_is_cut(component: Any, alpha: Any, positions: Any) -> None:
    model, inputs = tiny.causal_lm(tiny.SLIDING), tiny.prompts(padded=True)
    with steer(model, tiny.fitting_mixture(), tiny.LAYER, component, alpha, tiny.Z, positions=positions) as handle:
        written = tiny.generated(model, inputs)
        assert 0 < handle.stats().tokens_steered <= handle.stats().tokens_seen == 11 + 2 * 4
        for options in ({"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
            tiny.assert_written_alike(tiny.generated(model, inputs, **options), written)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last", slice(2, 13, 2)], ids=str)
def test_assisted_decoding_writes_what_greedy_decoding_does(positions: Any) -> None:
    """Guesses are read several at once, and the cache is cut where they are wrong; one model guesses for itself."""
    model, inputs = tiny.causal_lm(), {"input_ids": torch.tensor([[4, 5, 6, 4, 5, 6, 4, 5]])}
    options = {"new": 8, "output_logits": False, "eos_token_id": tiny.UNWRITTEN}
    with steer(model, tiny.fitting_mixture(), tiny.LAYER, 2, tiny.ramp, tiny.Z, positions=positions):
        expected = tiny.generate(model, inputs, **options).sequences
        for guesses in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model}, {"assistant_early_exit": 2}):
            assert torch.equal(tiny.generate(model, inputs, **options, **guesses).sequences, expected)
    assert not torch.equal(tiny.generate(model, inputs, **options).sequences, expected)


KINDS: dict[str, dict[str, Any]] = {
    "add": {"interventions": Add(torch.linspace(-1, 1, tiny.WIDTH), tiny.ramp)},
    "reconstruct": {"interventions": Reconstruct(0.8)},
    "remove latents": {"interventions": [Remove(2, "latents"), Offset(None, tiny.Z)]},
    "remove region": {"interventions": Remove(2, "region", tiny.ramp)},
    "norm": {**tiny.BOTH, "norm": "keep"},
    "gate": {**tiny.BOTH, "gate": Responsibility(0, 0.1) | Responsibility(1, 0.1)},
    "out of distribution": {**tiny.MIXTURE, "gate": ~LogDensity(-90.0)},
    "rows": {
        "rows": [[Remove(None), Toward(1, tiny.ramp)], [Reconstruct(0.5), Add(torch.ones(tiny.WIDTH), 0.2)]],
        "norm": ["keep", None],
        "gate": [None, ~Responsibility(3, 0.5)],
    },
}


@pytest.mark.parametrize("positions", ["all", slice(3, 10)], ids=["all", "slice"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_however_the_sequence_is_read(kind: str, positions: Any) -> None:
    """Cache, recomputation, chunks, beams that reorder the cache, and rows by themselves, all with left padding."""
    model, inputs = tiny.causal_lm(), tiny.prompts(padded=True)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
    with steer(model, tiny.fitting_mixture(), tiny.LAYER, **KINDS[kind], positions=positions) as handle:
        written = tiny.generated(model, inputs)
        assert 0 < handle.stats().tokens_steered <= handle.stats().tokens_seen
        for options in ({"use_cache": False}, {"prefill_chunk_size": 3}):
            tiny.assert_written_alike(tiny.generated(model, inputs, **options), written)
        searched = tiny.generate(model, inputs, **beams).sequences
        assert torch.equal(searched, tiny.generate(model, inputs, **beams, use_cache=False).sequences)
    for row in range(2):
        single = {"input_ids": inputs["input_ids"][row : row + 1, row + 1 :]}
        spec = {
            "interventions" if name == "rows" else name: value[row] if isinstance(value, list) else value
            for name, value in KINDS[kind].items()
        }
        if kind == "remove latents":
            spec = KINDS[kind]
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, **spec, positions=positions):
            tiny.assert_written_alike(tiny.row_of(written, row), tiny.generated(model, single))

"""Effects of `steer` on a layer's output: tokens, rows, gates, dtypes, and several layers and models."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mfa_kernels import steer
from mfa_kernels.data import tiny_lm
from mfa_kernels.steering import Handle, Offset, Reconstruct, Stats, Toward, intervene
from tests.steering import tiny


@pytest.mark.parametrize(
    ("positions", "steered", "count"),
    [("all", range(11), 11), ("prompt", range(7), 7), ("generated", range(7, 11), 4), ("last", range(6, 11), 5),
     (slice(1, 3), [1, 2], 2), (slice(8, None), [8, 9, 10], 3), (torch.arange(9) == 8, [8], 1)],
    ids=["all", "prompt", "generated", "last", "slice", "open slice", "mask"],
)  # fmt: skip
def test_each_kind_of_positions(positions: Any, steered: Any, count: int) -> None:
    """Of 7 prompt and 4 generated tokens, exactly the chosen ones leave the layer changed."""
    model, inputs, mfa = tiny.causal_lm(), tiny.prompts(1), tiny.fitting_mixture()
    before = tiny.outputs_of(model.model.layers[tiny.LAYER])
    with steer(model, mfa, tiny.LAYER, **tiny.BOTH, positions=positions) as handle:
        after = tiny.outputs_of(model.model.layers[tiny.LAYER])
        tiny.generate(model, inputs)
        assert handle.stats() == Stats(11, count)
    changed = (torch.cat(before, 1) != torch.cat(after, 1)).any(-1)[0]
    assert changed.nonzero().squeeze(-1).tolist() == list(steered)


def test_alpha_follows_the_schedule() -> None:
    model, mfa, seen = tiny.causal_lm(), tiny.fitting_mixture(), []

    def schedule(step: int) -> float:
        seen.append(step)
        return 1.0 if step % 2 else 0.0

    with steer(model, mfa, tiny.LAYER, 2, schedule):
        outputs = tiny.outputs_of(model.model.layers[tiny.LAYER])
        tiny.generate(model, tiny.prompts(), new=4)
    assert seen == [0, 1, 2, 3]
    reached = [torch.allclose(output, mfa.means[2].expand_as(output), atol=1e-6) for output in outputs]
    assert reached == [False, True, False, True]


def test_padding_is_never_touched(model: Any, padded: Any) -> None:
    padding = padded["attention_mask"] == 0
    clean = tiny.layer_output(model, padded)
    for arguments in (tiny.BOTH, tiny.MIXTURE):
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, **arguments) as handle:
            steered = tiny.layer_output(model, padded)
            assert handle.stats() == Stats(11, 11)
        assert torch.equal(steered[padding], clean[padding])
        assert (steered != clean).any(-1)[~padding].all()


class TestRows:
    """One intervention per batch row."""

    rows: tuple[Any, ...] = (
        Toward(0, 0.6),
        None,
        [Toward(None, 0.5), Offset(3, 2 * tiny.Z)],
        [Offset(None, tiny.Z), Toward(5, tiny.ramp)],
    )

    @pytest.mark.parametrize("padded", [False, True])
    def test_equal_separate_runs(self, padded: bool) -> None:
        model, inputs = tiny.causal_lm(), tiny.prompts(4, padded=padded)
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, rows=self.rows) as handle:
            written = tiny.generated(model, inputs)
            columns = 18 if padded else 28
            assert handle.stats() == Stats(columns + 16, columns + 16 - (5 if padded else 7) - 4)
        for row, spec in enumerate(self.rows):
            with steer(model, tiny.fitting_mixture(), tiny.LAYER, interventions=spec) if spec else nullcontext():
                tiny.assert_written_alike(tiny.row_of(written, row), tiny.generated(model, tiny.row_of(inputs, row)))

    def test_follow_beams(self) -> None:
        model, inputs = tiny.causal_lm(), tiny.prompts(4)
        options = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, rows=self.rows):
            tokens = tiny.generate(model, inputs, **options).sequences
        for row, spec in enumerate(self.rows):
            with steer(model, tiny.fitting_mixture(), tiny.LAYER, interventions=spec or []):
                expected = tiny.generate(model, tiny.row_of(inputs, row), **options).sequences
            assert torch.equal(tokens[2 * row : 2 * row + 2], expected)

    def test_tensors_per_row(self) -> None:
        model, inputs, mfa = tiny.causal_lm(), tiny.prompts(3), tiny.fitting_mixture()
        k, alpha = torch.tensor([4, 1, 0]), torch.tensor([0.2, 0.9, 0.5])
        z = torch.randn(3, tiny.RANK, generator=torch.Generator().manual_seed(0))
        clean = tiny.layer_output(model, inputs)
        with steer(model, mfa, tiny.LAYER, k, alpha, z):
            steered = tiny.layer_output(model, inputs)
        for row in range(3):
            expected = tiny.dense(clean[row : row + 1], int(k[row]), float(alpha[row]), z[row])
            torch.testing.assert_close(steered[row : row + 1].double(), expected, rtol=1e-5, atol=1e-5)

    def test_number_of_rows_must_divide_the_batch(self, model: Any) -> None:
        with (
            steer(model, tiny.fitting_mixture(), tiny.LAYER, rows=[None, Toward(1)]),
            pytest.raises(ValueError, match="for 2 batch rows do not fit a batch of 3"),
        ):
            model(**tiny.prompts(3))


def test_gate_acts_where_the_responsibility_exceeds_the_threshold() -> None:
    model, inputs, mfa = tiny.causal_lm(), tiny.prompts(4), tiny.fitting_mixture()
    clean = tiny.layer_output(model, inputs)
    r = mfa.responsibilities(clean)
    component = int(r.mean((0, 1)).argmax())
    low, high = r[..., component].flatten().sort().values[9:11].tolist()
    gated = r[..., component] > (low + high) / 2
    for arguments in (tiny.BOTH, tiny.MIXTURE):
        with steer(model, mfa, tiny.LAYER, **arguments, gate=(component, (low + high) / 2)) as handle:
            steered = tiny.layer_output(model, inputs)
            assert handle.stats()[:2] == (28, int(gated.sum()))
            assert handle.stats().mean_responsibility == pytest.approx(float(r[..., component].mean()), rel=1e-5)
        assert torch.equal((steered != clean).any(-1), gated)


@pytest.mark.parametrize("arguments", [tiny.BOTH, tiny.MIXTURE], ids=["fixed", "mixture"])
@pytest.mark.parametrize("mixture_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_model(arguments: dict[str, Any], mixture_dtype: torch.dtype) -> None:
    model, inputs = tiny.causal_lm("llama").bfloat16(), tiny.prompts()
    clean = tiny.layer_output(model, inputs)
    with steer(model, tiny.fitting_mixture().to(mixture_dtype), tiny.LAYER, **arguments) as handle:
        steered = tiny.layer_output(model, inputs)
        tiny.generate(model, inputs)
        assert handle.stats() == Stats(14 + 22, 14 + 22)
    assert steered.dtype == torch.bfloat16
    expected = tiny.dense(clean, **arguments)
    if mixture_dtype == torch.float32:
        scale = expected.abs().amax()
        assert (
            (steered.double() - expected).abs() <= 2**-8 * (expected.abs() + clean.double().abs() + scale / 4)
        ).all()


class TestNesting:
    def test_layers_and_mixtures(self) -> None:
        model, inputs, first = tiny.causal_lm(), tiny.prompts(), tiny.fitting_mixture()
        second = copy.deepcopy(first)
        second.means.mul_(-1)
        outer = steer(model, first, 0, 2, 0.6)
        with steer(model, second, 2, 3, 1.0):
            torch.testing.assert_close(tiny.layer_output(model, inputs, 2), second.means[3].expand(2, 7, -1))
        clean_after = tiny.layer_output(model, inputs, 2)
        outer.remove()
        with steer(model, first, 0, 2, 0.6):
            assert torch.equal(tiny.layer_output(model, inputs, 2), clean_after)

    def test_three_mixtures_on_three_layers_while_text_is_generated(self, model: Any, padded: Any) -> None:
        """Each layer's output is its own mixture's formula, at every step."""
        specs: list[dict[str, Any]] = [
            {"alpha": 0.4, "component": 1},
            tiny.MIXTURE,
            {"interventions": Reconstruct(0.5)},
        ]
        before, after, handles, mixtures = [], [], [], []
        for layer, spec in enumerate(specs):
            mfa = tiny.fitting_mixture()
            mfa.means.mul_(layer + 1)
            mixtures.append(mfa)
            module = model.model.layers[layer]
            before.append(tiny.outputs_of(module))
            handles.append(steer(model, mfa, layer, **spec, positions="generated"))
            after.append(tiny.outputs_of(module))
        tiny.generate(model, padded)
        handles[1].update(component=5)
        tiny.generate(model, padded)
        for layer, mfa in enumerate(mixtures):
            assert len(before[layer]) == 10
            for step, (x, out) in enumerate(zip(before[layer], after[layer])):
                spec = specs[layer] if layer != 1 or step < 5 else {**tiny.MIXTURE, "component": 5}
                entries = spec.get("interventions") or [
                    Toward(spec["component"], spec["alpha"]),
                    *([Offset(spec["component"], spec["latents"])] if "latents" in spec else []),
                ]
                expected = intervene(x, mfa, entries) if x.shape[1] == 1 else x
                torch.testing.assert_close(out, expected)
        assert [handle.stats().tokens_steered for handle in handles] == [16, 16, 16]

    def test_one_layer_in_order(self, model: Any, inputs: Any, mfa: Any) -> None:
        clean = tiny.layer_output(model, inputs)
        with steer(model, mfa, tiny.LAYER, 2, 0.6), steer(model, mfa, tiny.LAYER, None, 0.5):
            steered = tiny.layer_output(model, inputs)
        expected = intervene(intervene(clean, mfa, Toward(2, 0.6)), mfa, Toward(None, 0.5))
        torch.testing.assert_close(steered, expected)

    def test_removed_in_any_order(self, model: Any, padded: Any, mfa: Any) -> None:
        names, before = set(vars(model)), tiny.generated(model, padded)
        first, second = steer(model, mfa, 0, 1, 0.5), steer(model, mfa, 1, 2, tiny.ramp, positions="generated")
        first.remove()
        alone = tiny.generated(model, padded)
        second.remove()
        assert set(vars(model)) == names
        tiny.assert_same(tiny.generated(model, padded), before)
        with steer(model, mfa, 1, 2, tiny.ramp, positions="generated"):
            tiny.assert_same(tiny.generated(model, padded), alone)


class TestWhere:
    def test_module_path_with_a_width_of_its_own(self) -> None:
        model, inputs = tiny.causal_lm("gpt2"), tiny.prompts()
        wide = tiny.fitting_mixture(features=4 * tiny.WIDTH)
        with steer(model, wide, "transformer.h.1.mlp.act", component=2, alpha=1.0):
            kept = tiny.outputs_of(model.transformer.h[1].mlp.act)
            model(**inputs)
        torch.testing.assert_close(kept[0], wide.means[2].expand(2, 7, -1))

    def test_output_in_a_tuple(self, model: Any, inputs: Any, mfa: Any) -> None:
        attention = model.model.layers[1].self_attn
        kept: list[Any] = []
        with steer(model, mfa, "model.layers.1.self_attn", 2, 1.0):
            attention.register_forward_hook(lambda module, args, output: kept.append(output))
            model(**inputs)
        assert isinstance(kept[0], tuple)
        torch.testing.assert_close(kept[0][0], mfa.means[2].expand(2, 7, -1))

    def test_negative_index(self) -> None:
        handle = steer(tiny.causal_lm(), tiny.fitting_mixture(), -1, 2, 1.0)
        assert handle.layer == "model.layers.2"

    def test_compiled_model_is_steered_and_then_not(self, model: Any, inputs: Any, mfa: Any) -> None:
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            clean = compiled(**inputs).logits
            with steer(compiled, mfa, tiny.LAYER, **tiny.BOTH) as handle:
                steered = compiled(**inputs).logits
                assert handle.stats() == Stats(14, 14)
                torch.testing.assert_close(steered, model(**inputs).logits)
            assert torch.equal(compiled(**inputs).logits, clean)
        assert not torch.allclose(steered, clean)

    def test_gradients_pass_through(self, model: Any, inputs: Any) -> None:
        for arguments in (tiny.BOTH, tiny.MIXTURE):
            model.zero_grad()
            with steer(model, tiny.fitting_mixture(), tiny.LAYER, **arguments):
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
            grad = model.model.layers[0].mlp.up_proj.weight.grad
            assert grad.isfinite().all()
            assert grad.abs().max() > 0

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
    def test_training_with_recomputed_activations(self) -> None:
        inputs, gradients = tiny.prompts(padded=True), []
        for recompute in (False, True):
            model = tiny.causal_lm().train()
            if recompute:
                model.gradient_checkpointing_enable()
            with steer(model, tiny.fitting_mixture(), tiny.LAYER, **tiny.BOTH):
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
            gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
        torch.testing.assert_close(*gradients)


def test_real_model_writes_something_else() -> None:
    model, tokenizer = tiny_lm.load()
    inputs = tokenizer("def read(path):", return_tensors="pt")
    mfa = tiny.fitting_mixture(features=model.config.hidden_size)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD}
    before = model.generate(**inputs, **kwargs)
    with steer(model, mfa, 2, component=1, alpha=0.9) as handle:
        assert isinstance(handle, Handle)
        assert not torch.equal(model.generate(**inputs, **kwargs), before)
    assert torch.equal(model.generate(**inputs, **kwargs), before)

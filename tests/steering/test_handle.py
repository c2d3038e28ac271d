"""A `Handle`: updated, removed, entered again, and what is left where something was raised or did not fit."""

from __future__ import annotations

import gc
import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import steer
from mfa_kernels.steering import Offset, Responsibility, Stats, Toward
from tests.steering import tiny


class TestHandle:
    def test_update(self) -> None:
        model, inputs, mfa = tiny.causal_lm(), tiny.prompts(), tiny.fitting_mixture(torch.float64)
        clean = tiny.layer_output(model, inputs)
        handle = steer(model, mfa, tiny.LAYER, 2, 0.6)
        hooks = tiny.count_hooks(model)

        def check(component: int | None, alpha: float, latents: Tensor) -> None:
            torch.testing.assert_close(
                tiny.layer_output(model, inputs).double(),
                tiny.dense(clean, component, alpha, latents),
                rtol=1e-6,
                atol=1e-6,
            )

        check(2, 0.6, 0 * tiny.Z)
        assert handle.update(alpha=0.3) is handle
        check(2, 0.3, 0 * tiny.Z)
        handle.update(component=5, latents=tiny.Z)
        check(5, 0.3, tiny.Z)
        handle.update(component=None)
        check(None, 0.3, tiny.Z)
        handle.update(component=1, latents=None)
        check(1, 0.3, 0 * tiny.Z)
        handle.update(interventions=[Toward(3, 0.5), Offset(3, tiny.Z)])
        check(3, 0.5, tiny.Z)
        handle.update(rows=[None, Toward(3, 0.5)], positions="last", gate=(0, 0.0))
        handle.update(rows=None, component=4, alpha=0.2, positions="all", gate=None)
        check(4, 0.2, 0 * tiny.Z)
        assert tiny.count_hooks(model) == hooks
        assert handle.stats().tokens_seen == 14 * 7
        handle.remove()
        assert torch.equal(tiny.layer_output(model, inputs), clean)

    def test_update_rereads_the_mixture(self, model: Any, inputs: Any, mfa: Any) -> None:
        with steer(model, mfa, tiny.LAYER, 2, 1.0) as handle:
            mfa.means[2] += 1
            old = tiny.layer_output(model, inputs)
            handle.update()
            torch.testing.assert_close(tiny.layer_output(model, inputs), old + 1)

    @pytest.mark.parametrize("bad", [{"component": 99}, {"alpha": float("inf")}, {"latents": torch.ones(7)},
                                     {"positions": "first"}, {"gate": (0, 2.0)}, {"rows": [None]}])  # fmt: skip
    def test_a_bad_update_changes_nothing(self, model: Any, inputs: Any, bad: dict[str, Any]) -> None:
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, **tiny.BOTH) as handle:
            before = tiny.layer_output(model, inputs)
            with pytest.raises((IndexError, ValueError)):
                handle.update(**bad, **({"alpha": 0.1} if "rows" in bad else {}))
            assert torch.equal(tiny.layer_output(model, inputs), before)
            handle.update()
            assert torch.equal(tiny.layer_output(model, inputs), before)

    def test_remove_twice_and_enter_again(self, model: Any, inputs: Any) -> None:
        clean = tiny.layer_output(model, inputs)
        handle = steer(model, tiny.fitting_mixture(), tiny.LAYER, **tiny.BOTH)
        steered = tiny.layer_output(model, inputs)
        assert "removed" not in repr(handle)
        handle.remove()
        handle.remove()
        assert "removed" in repr(handle)
        with handle as entered:
            assert entered is handle
            assert torch.equal(tiny.layer_output(model, inputs), steered)
        assert torch.equal(tiny.layer_output(model, inputs), clean)
        assert handle.stats() == Stats(28, 28)

    def test_a_thousand_cycles_leave_nothing(self, model: Any, mfa: Any, inputs: Any) -> None:
        before, traces = tiny.layer_output(model, inputs), tiny.traces_on(model)
        tensors, memory, handle = 0, 0, None
        for cycle in range(1100):
            if cycle == 100:  # by then what is made once has been made
                del handle
                tensors, memory = _live_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with (
                steer(model, mfa, cycle % 3, **tiny.BOTH),
                steer(model, mfa, tiny.LAYER, 1, 0.5, gate=(1, 0.2)) as handle,
            ):
                assert tiny.count_hooks(model) == traces[1] + 4
                if cycle % 50 == 0:
                    tiny.layer_output(model, inputs)
                handle.update(component=None)
        assert tiny.traces_on(model) == traces
        assert torch.equal(tiny.layer_output(model, inputs), before)
        del handle
        assert _live_tensors() <= tensors  # fewer where garbage of earlier tests went meanwhile
        # Kilobytes: a thousand leaked programs would hold some 20 MB.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 4096

    @pytest.mark.parametrize(
        "arguments", [tiny.BOTH, {**tiny.MIXTURE, "gate": ~Responsibility(1, 0.1)}], ids=["fixed", "mixture"]
    )
    def test_made_and_used_inside_and_outside_inference_mode(self, arguments: dict[str, Any]) -> None:
        model, inputs, mfa = tiny.causal_lm(), tiny.prompts(padded=True), tiny.fitting_mixture()
        with steer(model, mfa, tiny.LAYER, **arguments) as handle:
            expected, stats = tiny.generated(model, inputs), handle.stats()
            with torch.inference_mode():
                tiny.assert_same(tiny.generated(model, inputs), expected)
        with torch.inference_mode():
            handle = steer(model, mfa, tiny.LAYER, **arguments)
            handle.update()
        with handle:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            tiny.assert_same(tiny.generated(model, inputs), expected)
            assert handle.stats().tokens_steered > stats.tokens_steered

    def test_stats_without_a_cache_count_every_reading(self, model: Any) -> None:
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, **tiny.BOTH) as handle:
            tiny.generate(model, tiny.prompts(1), new=3, use_cache=False)
            assert handle.stats() == Stats(7 + 8 + 9, 7 + 8 + 9)

    def test_an_error_inside_generate_leaves_the_model_clean(self, model: Any, inputs: Any) -> None:
        traces, before = tiny.traces_on(model), tiny.generated(model, inputs)
        calls = 0

        def schedule(step: int) -> float:
            nonlocal calls
            calls += 1
            return float("nan") if step == 2 else 0.5

        with (
            pytest.raises(ValueError, match=r"alpha\(2\) must be finite"),
            steer(model, tiny.fitting_mixture(), tiny.LAYER, 2, schedule),
        ):
            tiny.generate(model, inputs)
        assert calls == 3
        assert tiny.traces_on(model) == traces
        tiny.assert_same(tiny.generated(model, inputs), before)

    def test_a_run_after_a_failed_one_starts_anew(self, model: Any, padded: Any) -> None:
        with steer(model, tiny.fitting_mixture(), tiny.LAYER, **tiny.BOTH, positions="generated") as handle:
            expected = tiny.generated(model, padded)
            first = handle.stats()
            with pytest.raises(RuntimeError, match="stop"):
                tiny.generate(model, padded, logits_processor=[_Stop()])
            between = handle.stats()
            tiny.assert_same(tiny.generated(model, padded), expected)
            assert handle.stats().tokens_steered - between.tokens_steered == first.tokens_steered == 8

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.cuda.OutOfMemoryError])
    @pytest.mark.parametrize("where", ["layer", "streamer"])
    def test_whatever_is_raised_inside_generate_leaves_the_model_clean(
        self, where: str, error: type[BaseException]
    ) -> None:
        model, inputs, calls = tiny.causal_lm(), tiny.prompts(1), []
        traces, before = tiny.traces_on(model), tiny.generated(model, inputs)

        def fail(*args: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise error("stop")

        class Streamer:
            put = staticmethod(fail)
            end = staticmethod(lambda: None)

        hook = model.model.layers[2].register_forward_hook(fail) if where == "layer" else None
        first, second = (
            steer(model, tiny.fitting_mixture(), 0, 2, tiny.ramp),
            steer(model, tiny.fitting_mixture(), tiny.LAYER, **tiny.MIXTURE),
        )
        with pytest.raises(error), first, second:
            tiny.generate(model, inputs, streamer=Streamer() if hook is None else None)
        if hook is not None:
            hook.remove()
        assert tiny.traces_on(model) == traces
        tiny.assert_same(tiny.generated(model, inputs), before)


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


class _Stop:
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 9:
            raise RuntimeError("stop")
        return scores


class TestBadInput:
    def test_an_alpha_beyond_the_models_dtype(self) -> None:
        with pytest.raises(ValueError, match="alpha must be below 65504, as hidden states are in torch.float16"):
            steer(tiny.causal_lm().half(), tiny.fitting_mixture(), 1, 2, 1e5)

    def test_a_mixture_without_values(self) -> None:
        with pytest.raises(ValueError, match="mfa must hold values, got one on the meta device"):
            steer(tiny.causal_lm(), tiny.fitting_mixture().to("meta"), 1, 2, 0.5)

    @pytest.mark.parametrize(
        ("layer", "arguments", "error", "message"),
        [
            (3, tiny.BOTH, IndexError, r"layer must be in \[-3, 3\), got 3"),
            ("model.blocks.0", tiny.BOTH, ValueError, "has no module 'model.blocks.0'"),
            (1, {**tiny.BOTH, "component": 6}, IndexError, r"component must be in \[0, 6\), got 6"),
            (1, {**tiny.BOTH, "alpha": float("nan")}, ValueError, "alpha must be finite"),
            (1, {**tiny.BOTH, "latents": torch.ones(4)}, ValueError, r"latents must have shape \(R,\) = \(3,\)"),
            (1, {"component": 2}, ValueError, "alpha, latents: give at least one"),
            (1, {}, ValueError, "alpha, latents: give at least one"),
            (1, {"alpha": 0.5, "rows": [None]}, ValueError, "alpha: not together with interventions or rows"),
            (1, {"interventions": [], "rows": [None]}, ValueError, "exactly one of them"),
            (1, {**tiny.BOTH, "positions": "end"}, ValueError, "positions must be one of"),
            (1, {**tiny.BOTH, "gate": (9, 0.5)}, IndexError, "gate component"),
        ],
    )  # fmt: skip
    def test_is_named_and_leaves_no_hook(
        self, model: Any, layer: Any, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            steer(model, tiny.fitting_mixture(), layer, **arguments)
        assert tiny.count_hooks(model) == tiny.count_hooks(tiny.causal_lm())
        assert "generate" not in vars(model)

    def test_mixture_of_another_width(self, model: Any) -> None:
        with pytest.raises(ValueError, match=r"n_features = 16, but model.layers.1 of LlamaForCausalLM is 32 wide"):
            steer(model, tiny.fitting_mixture(features=16), tiny.LAYER, 0, 0.5)
        with pytest.raises(
            ValueError, match=r"n_features = 16, but 'model.layers.1.mlp' of LlamaForCausalLM is 32 wide"
        ):
            steer(model, tiny.fitting_mixture(features=16), "model.layers.1.mlp", 0, 0.5)
        # Of a module that is not what the configuration says, the width is known when it runs.
        model.model.layers[1].mlp = nn.Linear(32, 32)
        with (
            steer(model, tiny.fitting_mixture(features=16), "model.layers.1.mlp", 0, 0.5),
            pytest.raises(
                ValueError, match=r"output of model.layers.1.mlp must have shape \(..., 16\).*got \(2, 7, 32\)"
            ),
        ):
            model(**tiny.prompts())

    def test_mixture_of_rank_zero(self) -> None:
        with pytest.raises(ValueError, match="latents: the mixture has rank 0"):
            steer(tiny.causal_lm(), tiny.fitting_mixture(rank=0), tiny.LAYER, 0, 0.5, torch.ones(0))

    def test_a_module_that_does_not_return_tokens(self, model: Any) -> None:
        with pytest.raises(ValueError, match="'model' of LlamaForCausalLM puts out no tensor but BaseModel"):
            steer(model, tiny.fitting_mixture(), "model", 0, 0.5)
        model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp)
        model.model.layers[1].mlp[0].register_forward_hook(lambda module, args, output: {"hidden": output})
        with (
            steer(model, tiny.fitting_mixture(), "model.layers.1.mlp", 0, 0.5),
            pytest.raises(TypeError, match="the output of model.layers.1.mlp must be a tensor or an array, got dict"),
        ):
            model(**tiny.prompts())

    def test_not_a_mixture(self) -> None:
        with pytest.raises(TypeError, match="mfa must be an MFA, got Linear"):
            steer(tiny.causal_lm(), nn.Linear(2, 2), tiny.LAYER, 0, 0.5)

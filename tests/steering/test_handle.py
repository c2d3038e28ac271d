"""`steer` on models of several architectures: what it does, where, for whom, and that nothing is left behind."""

from __future__ import annotations

import copy
import gc
import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import steer
from mfa_kernels.data.language_model import hidden_states
from mfa_kernels.steering import (
    Add,
    Handle,
    LogDensity,
    Offset,
    Reconstruct,
    Remove,
    Responsibility,
    Stats,
    Toward,
    intervene,
)
from tests.steering.tiny import (
    ARCHITECTURES,
    LAYER,
    PAD,
    RANK,
    SLIDING,
    UNWRITTEN,
    VERSION,
    WIDTH,
    causal_lm,
    count_hooks,
    fitting_mixture,
    generate,
    generated,
    layer_output,
    prompts,
)

Z = torch.tensor([2.0, -3.0, 1.0])
BOTH = {"component": 2, "alpha": 0.6, "latents": Z}
MIXTURE = {"component": None, "alpha": 0.6, "latents": Z}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def ramp(step: int) -> float:
    return 0.9 - 0.1 * step


def dense(x: Tensor, component: int | None, alpha: float, latents: Tensor) -> Tensor:
    """Equations 14 and 15 in fp64."""
    mfa, x = fitting_mixture(torch.float64), x.double()
    r = mfa.responsibilities(x)
    if component is not None:
        r = torch.zeros_like(r).index_fill_(-1, torch.tensor(component), 1.0)
    return (1 - alpha) * x + alpha * r @ mfa.means + torch.einsum("btk,kdr,r->btd", r, mfa.loadings, latents.double())


@pytest.mark.parametrize("arguments", [BOTH, MIXTURE], ids=["fixed", "mixture"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestArchitectures:
    def test_layer_output_is_the_formula(self, architecture: str, arguments: dict[str, Any]) -> None:
        model, inputs = causal_lm(architecture), prompts()
        clean = layer_output(model, inputs)
        with steer(model, fitting_mixture(torch.float64), LAYER, **arguments):
            steered = layer_output(model, inputs)
        torch.testing.assert_close(steered.double(), dense(clean, **arguments), rtol=1e-6, atol=1e-6)

    def test_cache_equals_recomputation(self, architecture: str, arguments: dict[str, Any]) -> None:
        model, inputs = causal_lm(architecture), prompts(padded=True)
        clean, _ = generated(model, inputs)
        with steer(model, fitting_mixture(), LAYER, **{**arguments, "alpha": ramp}):
            tokens, logits = generated(model, inputs)
            for options in ({"use_cache": False}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 6}):
                if architecture == "gpt2" and "prefill_chunk_size" in options and VERSION <= (4, 51):
                    continue  # transformers knows no cache of chunks for it
                other_tokens, other_logits = generated(model, inputs, **options)
                assert torch.equal(tokens, other_tokens)
                torch.testing.assert_close(logits, other_logits, **TOLERANCE)
        assert not torch.equal(tokens, clean)

    def test_padded_batch_equals_singles(self, architecture: str, arguments: dict[str, Any]) -> None:
        model, inputs = causal_lm(architecture), prompts(3, padded=True)
        with steer(model, fitting_mixture(), LAYER, **arguments):
            tokens, logits = generated(model, inputs)
            for row in range(3):
                single = {"input_ids": inputs["input_ids"][row : row + 1, row + 1 :]}
                single_tokens, single_logits = generated(model, single)
                assert torch.equal(tokens[row], single_tokens[0])
                torch.testing.assert_close(logits[row], single_logits[0], **TOLERANCE)

    def test_removal_is_bitwise(self, architecture: str, arguments: dict[str, Any]) -> None:
        model, inputs = causal_lm(architecture), prompts()
        before = generated(model, inputs)
        with steer(model, fitting_mixture(), LAYER, **arguments):
            assert not torch.equal(generated(model, inputs)[1], before[1])
        for value, expected in zip(generated(model, inputs), before):
            assert torch.equal(value, expected)


@pytest.mark.parametrize(
    "positions",
    ["all", "prompt", "generated", "last", slice(2, 9, 2), torch.arange(10) % 3 == 0,
     torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 1, 1, 1, 0]]).bool()],
    ids=["all", "prompt", "generated", "last", "slice", "mask", "mask per row"],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [0.6, ramp], ids=["constant", "schedule"])
@pytest.mark.parametrize("component", [2, None], ids=["fixed", "mixture"])
def test_positions_do_not_depend_on_how_the_sequence_is_cut(component: Any, alpha: Any, positions: Any) -> None:
    model, inputs = causal_lm(SLIDING), prompts(padded=True)
    with steer(model, fitting_mixture(), LAYER, component, alpha, Z, positions=positions) as handle:
        tokens, logits = generated(model, inputs)
        assert 0 < handle.stats().tokens_steered <= handle.stats().tokens_seen == 11 + 2 * 4
        for options in ({"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}):
            other_tokens, other_logits = generated(model, inputs, **options)
            assert torch.equal(tokens, other_tokens)
            torch.testing.assert_close(logits, other_logits, **TOLERANCE)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last", slice(2, 13, 2)], ids=str)
def test_assisted_decoding_writes_what_greedy_decoding_does(positions: Any) -> None:
    """Guesses are read several at once, and the cache is cut where they are wrong; one model guesses for itself."""
    model, inputs = causal_lm(), {"input_ids": torch.tensor([[4, 5, 6, 4, 5, 6, 4, 5]])}
    options = {"new": 8, "output_logits": False, "eos_token_id": UNWRITTEN}
    with steer(model, fitting_mixture(), LAYER, 2, ramp, Z, positions=positions):
        expected = generate(model, inputs, **options).sequences
        for guesses in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": model}, {"assistant_early_exit": 2}):
            assert torch.equal(generate(model, inputs, **options, **guesses).sequences, expected)
    assert not torch.equal(generate(model, inputs, **options).sequences, expected)


KINDS: dict[str, dict[str, Any]] = {
    "add": {"interventions": Add(torch.linspace(-1, 1, WIDTH), ramp)},
    "reconstruct": {"interventions": Reconstruct(0.8)},
    "remove latents": {"interventions": [Remove(2, "latents"), Offset(None, Z)]},
    "remove region": {"interventions": Remove(2, "region", ramp)},
    "norm": {**BOTH, "norm": "keep"},
    "gate": {**BOTH, "gate": Responsibility(0, 0.1) | Responsibility(1, 0.1)},
    "out of distribution": {**MIXTURE, "gate": ~LogDensity(-90.0)},
    "rows": {
        "rows": [[Remove(None), Toward(1, ramp)], [Reconstruct(0.5), Add(torch.ones(WIDTH), 0.2)]],
        "norm": ["keep", None],
        "gate": [None, ~Responsibility(3, 0.5)],
    },
}


@pytest.mark.parametrize("positions", ["all", slice(3, 10)], ids=["all", "slice"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_however_the_sequence_is_read(kind: str, positions: Any) -> None:
    """Cache, recomputation, chunks, beams that reorder the cache, and rows by themselves, all with left padding."""
    model, inputs = causal_lm(), prompts(padded=True)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
    with steer(model, fitting_mixture(), LAYER, **KINDS[kind], positions=positions) as handle:
        tokens, logits = generated(model, inputs)
        assert 0 < handle.stats().tokens_steered <= handle.stats().tokens_seen
        for options in ({"use_cache": False}, {"prefill_chunk_size": 3}):
            other_tokens, other_logits = generated(model, inputs, **options)
            assert torch.equal(tokens, other_tokens)
            torch.testing.assert_close(logits, other_logits, **TOLERANCE)
        searched = generate(model, inputs, **beams).sequences
        assert torch.equal(searched, generate(model, inputs, **beams, use_cache=False).sequences)
    for row in range(2):
        single = {"input_ids": inputs["input_ids"][row : row + 1, row + 1 :]}
        spec = {
            "interventions" if name == "rows" else name: value[row] if isinstance(value, list) else value
            for name, value in KINDS[kind].items()
        }
        if kind == "remove latents":
            spec = KINDS[kind]
        with steer(model, fitting_mixture(), LAYER, **spec, positions=positions):
            single_tokens, single_logits = generated(model, single)
        assert torch.equal(tokens[row], single_tokens[0])
        torch.testing.assert_close(logits[row], single_logits[0], **TOLERANCE)


@pytest.mark.parametrize(
    ("positions", "steered", "count"),
    [("all", range(11), 11), ("prompt", range(7), 7), ("generated", range(7, 11), 4), ("last", range(6, 11), 5),
     (slice(1, 3), [1, 2], 2), (slice(8, None), [8, 9, 10], 3), (torch.arange(9) == 8, [8], 1)],
    ids=["all", "prompt", "generated", "last", "slice", "open slice", "mask"],
)  # fmt: skip
def test_each_kind_of_positions(positions: Any, steered: Any, count: int) -> None:
    """Which of the 7 prompt and 4 generated tokens change, looked at where they leave the layer."""
    model, inputs, mfa = causal_lm(), prompts(1), fitting_mixture()
    before: list[Tensor] = []
    after: list[Tensor] = []
    model.model.layers[LAYER].register_forward_hook(lambda module, args, output: before.append(hidden_states(output)))
    with steer(model, mfa, LAYER, **BOTH, positions=positions) as handle:
        model.model.layers[LAYER].register_forward_hook(
            lambda module, args, output: after.append(hidden_states(output))
        )
        generate(model, inputs)
        assert handle.stats() == Stats(11, count)
    changed = (torch.cat(before, 1) != torch.cat(after, 1)).any(-1)[0]
    assert changed.nonzero().squeeze(-1).tolist() == list(steered)


def test_alpha_follows_the_schedule() -> None:
    model, mfa, seen = causal_lm(), fitting_mixture(), []
    outputs: list[Tensor] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 1.0 if step % 2 else 0.0

    with steer(model, mfa, LAYER, 2, schedule):
        model.model.layers[LAYER].register_forward_hook(
            lambda module, args, output: outputs.append(hidden_states(output))
        )
        generate(model, prompts(), new=4)
    assert seen == [0, 1, 2, 3]
    reached = [torch.allclose(output, mfa.means[2].expand_as(output), atol=1e-6) for output in outputs]
    assert reached == [False, True, False, True]


def test_padding_is_never_touched() -> None:
    model, inputs = causal_lm(), prompts(padded=True)
    padding = inputs["attention_mask"] == 0
    clean = layer_output(model, inputs)
    for arguments in (BOTH, MIXTURE):
        with steer(model, fitting_mixture(), LAYER, **arguments) as handle:
            steered = layer_output(model, inputs)
            assert handle.stats() == Stats(11, 11)
        assert torch.equal(steered[padding], clean[padding])
        assert (steered != clean).any(-1)[~padding].all()


class TestRows:
    """One intervention per batch row."""

    rows: tuple[Any, ...] = (
        Toward(0, 0.6),
        None,
        [Toward(None, 0.5), Offset(3, 2 * Z)],
        [Offset(None, Z), Toward(5, ramp)],
    )

    def singly(self, model: nn.Module, inputs: dict[str, Tensor], row: int, **options: Any) -> tuple[Tensor, Tensor]:
        single = {name: value[row : row + 1] for name, value in inputs.items()}
        if self.rows[row] is None:
            return generated(model, single, **options)
        with steer(model, fitting_mixture(), LAYER, interventions=self.rows[row]):
            return generated(model, single, **options)

    @pytest.mark.parametrize("padded", [False, True])
    def test_equal_separate_runs(self, padded: bool) -> None:
        model, inputs = causal_lm(), prompts(4, padded=padded)
        with steer(model, fitting_mixture(), LAYER, rows=self.rows) as handle:
            tokens, logits = generated(model, inputs)
            columns = 18 if padded else 28
            assert handle.stats() == Stats(columns + 16, columns + 16 - (5 if padded else 7) - 4)
        for row in range(4):
            single_tokens, single_logits = self.singly(model, inputs, row)
            assert torch.equal(tokens[row], single_tokens[0])
            torch.testing.assert_close(logits[row], single_logits[0], **TOLERANCE)

    def test_follow_beams(self) -> None:
        model, inputs = causal_lm(), prompts(4)
        options = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False}
        with steer(model, fitting_mixture(), LAYER, rows=self.rows):
            tokens = generate(model, inputs, **options).sequences
        for row, spec in enumerate(self.rows):
            single = {name: value[row : row + 1] for name, value in inputs.items()}
            with steer(model, fitting_mixture(), LAYER, interventions=spec or []):
                expected = generate(model, single, **options).sequences
            assert torch.equal(tokens[2 * row : 2 * row + 2], expected)

    def test_tensors_per_row(self) -> None:
        model, inputs, mfa = causal_lm(), prompts(3), fitting_mixture()
        k, alpha = torch.tensor([4, 1, 0]), torch.tensor([0.2, 0.9, 0.5])
        z = torch.randn(3, RANK, generator=torch.Generator().manual_seed(0))
        clean = layer_output(model, inputs)
        with steer(model, mfa, LAYER, k, alpha, z):
            steered = layer_output(model, inputs)
        for row in range(3):
            expected = dense(clean[row : row + 1], int(k[row]), float(alpha[row]), z[row])
            torch.testing.assert_close(steered[row : row + 1].double(), expected, rtol=1e-5, atol=1e-5)

    def test_number_of_rows_must_divide_the_batch(self) -> None:
        model = causal_lm()
        with (
            steer(model, fitting_mixture(), LAYER, rows=[None, Toward(1)]),
            pytest.raises(ValueError, match="for 2 batch rows do not fit a batch of 3"),
        ):
            model(**prompts(3))


def test_gate_acts_where_the_responsibility_exceeds_the_threshold() -> None:
    model, inputs, mfa = causal_lm(), prompts(4), fitting_mixture()
    clean = layer_output(model, inputs)
    r = mfa.responsibilities(clean)
    component = int(r.mean((0, 1)).argmax())
    low, high = r[..., component].flatten().sort().values[9:11].tolist()
    gated = r[..., component] > (low + high) / 2
    for arguments in (BOTH, MIXTURE):
        with steer(model, mfa, LAYER, **arguments, gate=(component, (low + high) / 2)) as handle:
            steered = layer_output(model, inputs)
            assert handle.stats()[:2] == (28, int(gated.sum()))
            assert handle.stats().mean_responsibility == pytest.approx(float(r[..., component].mean()), rel=1e-5)
        assert torch.equal((steered != clean).any(-1), gated)


@pytest.mark.parametrize("arguments", [BOTH, MIXTURE], ids=["fixed", "mixture"])
@pytest.mark.parametrize("mixture_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_model(arguments: dict[str, Any], mixture_dtype: torch.dtype) -> None:
    model, inputs = causal_lm("llama").bfloat16(), prompts()
    clean = layer_output(model, inputs)
    with steer(model, fitting_mixture().to(mixture_dtype), LAYER, **arguments) as handle:
        steered = layer_output(model, inputs)
        generate(model, inputs)
        assert handle.stats() == Stats(14 + 22, 14 + 22)
    assert steered.dtype == torch.bfloat16
    expected = dense(clean, **arguments)
    if mixture_dtype == torch.float32:
        scale = expected.abs().amax()
        assert (
            (steered.double() - expected).abs() <= 2**-8 * (expected.abs() + clean.double().abs() + scale / 4)
        ).all()


class TestHandle:
    def test_update(self) -> None:
        model, inputs, mfa = causal_lm(), prompts(), fitting_mixture(torch.float64)
        clean = layer_output(model, inputs)
        handle = steer(model, mfa, LAYER, 2, 0.6)
        hooks = count_hooks(model)

        def check(component: int | None, alpha: float, latents: Tensor) -> None:
            torch.testing.assert_close(
                layer_output(model, inputs).double(), dense(clean, component, alpha, latents), rtol=1e-6, atol=1e-6
            )

        check(2, 0.6, 0 * Z)
        assert handle.update(alpha=0.3) is handle
        check(2, 0.3, 0 * Z)
        handle.update(component=5, latents=Z)
        check(5, 0.3, Z)
        handle.update(component=None)
        check(None, 0.3, Z)
        handle.update(component=1, latents=None)
        check(1, 0.3, 0 * Z)
        handle.update(interventions=[Toward(3, 0.5), Offset(3, Z)])
        check(3, 0.5, Z)
        handle.update(rows=[None, Toward(3, 0.5)], positions="last", gate=(0, 0.0))
        handle.update(rows=None, component=4, alpha=0.2, positions="all", gate=None)
        check(4, 0.2, 0 * Z)
        assert count_hooks(model) == hooks
        assert handle.stats().tokens_seen == 14 * 7
        handle.remove()
        assert torch.equal(layer_output(model, inputs), clean)

    def test_update_rereads_the_mixture(self) -> None:
        model, inputs, mfa = causal_lm(), prompts(), fitting_mixture()
        with steer(model, mfa, LAYER, 2, 1.0) as handle:
            mfa.means[2] += 1
            old = layer_output(model, inputs)
            handle.update()
            torch.testing.assert_close(layer_output(model, inputs), old + 1)

    @pytest.mark.parametrize("bad", [{"component": 99}, {"alpha": float("inf")}, {"latents": torch.ones(7)},
                                     {"positions": "first"}, {"gate": (0, 2.0)}, {"rows": [None]}])  # fmt: skip
    def test_a_bad_update_changes_nothing(self, bad: dict[str, Any]) -> None:
        model, inputs = causal_lm(), prompts()
        with steer(model, fitting_mixture(), LAYER, **BOTH) as handle:
            before = layer_output(model, inputs)
            with pytest.raises((IndexError, ValueError)):
                handle.update(**bad, **({"alpha": 0.1} if "rows" in bad else {}))
            assert torch.equal(layer_output(model, inputs), before)
            handle.update()
            assert torch.equal(layer_output(model, inputs), before)

    def test_remove_twice_and_enter_again(self) -> None:
        model, inputs = causal_lm(), prompts()
        clean = layer_output(model, inputs)
        handle = steer(model, fitting_mixture(), LAYER, **BOTH)
        steered = layer_output(model, inputs)
        assert "removed" not in repr(handle)
        handle.remove()
        handle.remove()
        assert "removed" in repr(handle)
        with handle as entered:
            assert entered is handle
            assert torch.equal(layer_output(model, inputs), steered)
        assert torch.equal(layer_output(model, inputs), clean)
        assert handle.stats() == Stats(28, 28)

    def test_a_thousand_cycles_leave_nothing(self) -> None:
        model, mfa, inputs = causal_lm(), fitting_mixture(), prompts()
        before, names, hooks = layer_output(model, inputs), set(vars(model)), count_hooks(model)
        tensors, memory, handle = 0, 0, None
        for cycle in range(1100):
            if cycle == 100:  # by then what is made once has been made
                del handle
                tensors, memory = _live_tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with steer(model, mfa, cycle % 3, **BOTH), steer(model, mfa, LAYER, 1, 0.5, gate=(1, 0.2)) as handle:
                assert count_hooks(model) == hooks + 4
                if cycle % 50 == 0:
                    layer_output(model, inputs)
                handle.update(component=None)
        assert (set(vars(model)), count_hooks(model)) == (names, hooks)
        assert torch.equal(layer_output(model, inputs), before)
        del handle
        assert _live_tensors() <= tensors  # fewer where garbage of earlier tests went meanwhile
        # Kilobytes: a thousand leaked programs would hold some 20 MB.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 4096

    @pytest.mark.parametrize(
        "arguments", [BOTH, {**MIXTURE, "gate": ~Responsibility(1, 0.1)}], ids=["fixed", "mixture"]
    )
    def test_made_and_used_inside_and_outside_inference_mode(self, arguments: dict[str, Any]) -> None:
        model, inputs, mfa = causal_lm(), prompts(padded=True), fitting_mixture()
        with steer(model, mfa, LAYER, **arguments) as handle:
            expected, stats = generated(model, inputs), handle.stats()
            with torch.inference_mode():
                assert all(torch.equal(*pair) for pair in zip(generated(model, inputs), expected))
        with torch.inference_mode():
            handle = steer(model, mfa, LAYER, **arguments)
            handle.update()
        with handle:
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            assert all(torch.equal(*pair) for pair in zip(generated(model, inputs), expected))
            assert handle.stats().tokens_steered > stats.tokens_steered

    def test_stats_without_a_cache_count_every_reading(self) -> None:
        model = causal_lm()
        with steer(model, fitting_mixture(), LAYER, **BOTH) as handle:
            generate(model, prompts(1), new=3, use_cache=False)
            assert handle.stats() == Stats(7 + 8 + 9, 7 + 8 + 9)

    def test_an_error_inside_generate_leaves_the_model_clean(self) -> None:
        model, inputs = causal_lm(), prompts()
        names, hooks, before = set(vars(model)), count_hooks(model), generated(model, inputs)
        calls = 0

        def schedule(step: int) -> float:
            nonlocal calls
            calls += 1
            return float("nan") if step == 2 else 0.5

        with (
            pytest.raises(ValueError, match=r"alpha\(2\) must be finite"),
            steer(model, fitting_mixture(), LAYER, 2, schedule),
        ):
            generate(model, inputs)
        assert calls == 3
        assert (set(vars(model)), count_hooks(model)) == (names, hooks)
        assert all(torch.equal(*pair) for pair in zip(generated(model, inputs), before))

    def test_a_run_after_a_failed_one_starts_anew(self) -> None:
        model, inputs = causal_lm(), prompts(padded=True)
        with steer(model, fitting_mixture(), LAYER, **BOTH, positions="generated") as handle:
            expected = generated(model, inputs)
            first = handle.stats()
            with pytest.raises(RuntimeError, match="stop"):
                generate(model, inputs, logits_processor=[_Stop()])
            between = handle.stats()
            assert all(torch.equal(*pair) for pair in zip(generated(model, inputs), expected))
            assert handle.stats().tokens_steered - between.tokens_steered == first.tokens_steered == 8

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.cuda.OutOfMemoryError])
    @pytest.mark.parametrize("where", ["layer", "streamer"])
    def test_whatever_is_raised_inside_generate_leaves_the_model_clean(
        self, where: str, error: type[BaseException]
    ) -> None:
        model, inputs, calls = causal_lm(), prompts(1), []
        names, hooks, before = set(vars(model)), count_hooks(model), generated(model, inputs)

        def fail(*args: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise error("stop")

        class Streamer:
            put = staticmethod(fail)
            end = staticmethod(lambda: None)

        hook = model.model.layers[2].register_forward_hook(fail) if where == "layer" else None
        first, second = steer(model, fitting_mixture(), 0, 2, ramp), steer(model, fitting_mixture(), LAYER, **MIXTURE)
        with pytest.raises(error), first, second:
            generate(model, inputs, streamer=Streamer() if hook is None else None)
        if hook is not None:
            hook.remove()
        assert (set(vars(model)), count_hooks(model)) == (names, hooks)
        assert all(torch.equal(*pair) for pair in zip(generated(model, inputs), before))


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


class _Stop:
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > 9:
            raise RuntimeError("stop")
        return scores


class TestNesting:
    def test_layers_and_mixtures(self) -> None:
        model, inputs, first = causal_lm(), prompts(), fitting_mixture()
        second = copy.deepcopy(first)
        second.means.mul_(-1)
        outer = steer(model, first, 0, 2, 0.6)
        with steer(model, second, 2, 3, 1.0):
            torch.testing.assert_close(layer_output(model, inputs, 2), second.means[3].expand(2, 7, -1))
        clean_after = layer_output(model, inputs, 2)
        outer.remove()
        with steer(model, first, 0, 2, 0.6):
            assert torch.equal(layer_output(model, inputs, 2), clean_after)

    def test_three_mixtures_on_three_layers_while_text_is_generated(self) -> None:
        """What leaves each layer is its own mixture's formula, at every step."""
        model, inputs = causal_lm(), prompts(padded=True)
        specs: list[dict[str, Any]] = [{"alpha": 0.4, "component": 1}, MIXTURE, {"interventions": Reconstruct(0.5)}]
        before: list[list[Tensor]] = [[], [], []]
        after: list[list[Tensor]] = [[], [], []]
        handles, mixtures = [], []
        for layer, spec in enumerate(specs):
            mfa = fitting_mixture()
            mfa.means.mul_(layer + 1)
            mixtures.append(mfa)
            module = model.model.layers[layer]
            module.register_forward_hook(lambda m, a, out, kept=before[layer]: kept.append(hidden_states(out)))
            handles.append(steer(model, mfa, layer, **spec, positions="generated"))
            module.register_forward_hook(lambda m, a, out, kept=after[layer]: kept.append(hidden_states(out)))
        generate(model, inputs)
        handles[1].update(component=5)
        generate(model, inputs)
        for layer, mfa in enumerate(mixtures):
            assert len(before[layer]) == 10
            for step, (x, out) in enumerate(zip(before[layer], after[layer])):
                spec = specs[layer] if layer != 1 or step < 5 else {**MIXTURE, "component": 5}
                entries = spec.get("interventions") or [
                    Toward(spec["component"], spec["alpha"]),
                    *([Offset(spec["component"], spec["latents"])] if "latents" in spec else []),
                ]
                expected = intervene(x, mfa, entries) if x.shape[1] == 1 else x
                torch.testing.assert_close(out, expected)
        assert [handle.stats().tokens_steered for handle in handles] == [16, 16, 16]

    def test_one_layer_in_order(self) -> None:
        model, inputs, mfa = causal_lm(), prompts(), fitting_mixture()
        clean = layer_output(model, inputs)
        with steer(model, mfa, LAYER, 2, 0.6), steer(model, mfa, LAYER, None, 0.5):
            steered = layer_output(model, inputs)
        expected = intervene(intervene(clean, mfa, Toward(2, 0.6)), mfa, Toward(None, 0.5))
        torch.testing.assert_close(steered, expected)

    def test_removed_in_any_order(self) -> None:
        model, inputs, mfa = causal_lm(), prompts(padded=True), fitting_mixture()
        names, before = set(vars(model)), generated(model, inputs)
        first, second = steer(model, mfa, 0, 1, 0.5), steer(model, mfa, 1, 2, ramp, positions="generated")
        first.remove()
        alone = generated(model, inputs)
        second.remove()
        assert set(vars(model)) == names
        assert all(torch.equal(*pair) for pair in zip(generated(model, inputs), before))
        with steer(model, mfa, 1, 2, ramp, positions="generated"):
            assert all(torch.equal(*pair) for pair in zip(generated(model, inputs), alone))


class TestWhere:
    def test_module_path_with_a_width_of_its_own(self) -> None:
        model, inputs = causal_lm("gpt2"), prompts()
        wide = fitting_mixture(features=4 * WIDTH)
        kept: list[Tensor] = []
        with steer(model, wide, "transformer.h.1.mlp.act", component=2, alpha=1.0):
            model.transformer.h[1].mlp.act.register_forward_hook(lambda m, a, output: kept.append(output))
            model(**inputs)
        torch.testing.assert_close(kept[0], wide.means[2].expand(2, 7, -1))

    def test_output_in_a_tuple(self) -> None:
        model, inputs, mfa = causal_lm(), prompts(), fitting_mixture()
        attention = model.model.layers[1].self_attn
        kept: list[Any] = []
        with steer(model, mfa, "model.layers.1.self_attn", 2, 1.0):
            attention.register_forward_hook(lambda module, args, output: kept.append(output))
            model(**inputs)
        assert isinstance(kept[0], tuple)
        torch.testing.assert_close(kept[0][0], mfa.means[2].expand(2, 7, -1))

    def test_negative_index(self) -> None:
        handle = steer(causal_lm(), fitting_mixture(), -1, 2, 1.0)
        assert handle.layer == "model.layers.2"

    def test_compiled_model_is_steered_and_then_not(self) -> None:
        model, inputs, mfa = causal_lm(), prompts(), fitting_mixture()
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            clean = compiled(**inputs).logits
            with steer(compiled, mfa, LAYER, **BOTH) as handle:
                steered = compiled(**inputs).logits
                assert handle.stats() == Stats(14, 14)
                torch.testing.assert_close(steered, model(**inputs).logits)
            assert torch.equal(compiled(**inputs).logits, clean)
        assert not torch.allclose(steered, clean)

    def test_gradients_pass_through(self) -> None:
        model, inputs = causal_lm(), prompts()
        for arguments in (BOTH, MIXTURE):
            model.zero_grad()
            with steer(model, fitting_mixture(), LAYER, **arguments):
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
            grad = model.model.layers[0].mlp.up_proj.weight.grad
            assert grad.isfinite().all()
            assert grad.abs().max() > 0

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
    def test_training_with_recomputed_activations(self) -> None:
        inputs, gradients = prompts(padded=True), []
        for recompute in (False, True):
            model = causal_lm().train()
            if recompute:
                model.gradient_checkpointing_enable()
            with steer(model, fitting_mixture(), LAYER, **BOTH):
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
            gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
        torch.testing.assert_close(*gradients)


class TestBadInput:
    def test_an_alpha_beyond_the_models_dtype(self) -> None:
        with pytest.raises(ValueError, match="alpha must be below 65504, as hidden states are in torch.float16"):
            steer(causal_lm().half(), fitting_mixture(), 1, 2, 1e5)

    def test_a_mixture_without_values(self) -> None:
        with pytest.raises(ValueError, match="mfa must hold values, got one on the meta device"):
            steer(causal_lm(), fitting_mixture().to("meta"), 1, 2, 0.5)

    @pytest.mark.parametrize(
        ("layer", "arguments", "error", "message"),
        [
            (3, BOTH, IndexError, r"layer must be in \[-3, 3\), got 3"),
            ("model.blocks.0", BOTH, ValueError, "has no module 'model.blocks.0'"),
            (1, {**BOTH, "component": 6}, IndexError, r"component must be in \[0, 6\), got 6"),
            (1, {**BOTH, "alpha": float("nan")}, ValueError, "alpha must be finite"),
            (1, {**BOTH, "latents": torch.ones(4)}, ValueError, r"latents must have shape \(R,\) = \(3,\)"),
            (1, {"component": 2}, ValueError, "alpha, latents: give at least one"),
            (1, {}, ValueError, "alpha, latents: give at least one"),
            (1, {"alpha": 0.5, "rows": [None]}, ValueError, "alpha: not together with interventions or rows"),
            (1, {"interventions": [], "rows": [None]}, ValueError, "exactly one of them"),
            (1, {**BOTH, "positions": "end"}, ValueError, "positions must be one of"),
            (1, {**BOTH, "gate": (9, 0.5)}, IndexError, "gate component"),
        ],
    )  # fmt: skip
    def test_is_named_and_leaves_no_hook(
        self, layer: Any, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        model = causal_lm()
        with pytest.raises(error, match=message):
            steer(model, fitting_mixture(), layer, **arguments)
        assert count_hooks(model) == count_hooks(causal_lm())
        assert "generate" not in vars(model)

    def test_mixture_of_another_width(self) -> None:
        model = causal_lm()
        with pytest.raises(ValueError, match=r"n_features = 16, but model.layers.1 of LlamaForCausalLM is 32 wide"):
            steer(model, fitting_mixture(features=16), LAYER, 0, 0.5)
        with pytest.raises(
            ValueError, match=r"n_features = 16, but 'model.layers.1.mlp' of LlamaForCausalLM is 32 wide"
        ):
            steer(model, fitting_mixture(features=16), "model.layers.1.mlp", 0, 0.5)
        # Of a module that is not what the configuration says, the width is known when it runs.
        model.model.layers[1].mlp = nn.Linear(32, 32)
        with (
            steer(model, fitting_mixture(features=16), "model.layers.1.mlp", 0, 0.5),
            pytest.raises(
                ValueError, match=r"output of model.layers.1.mlp must have shape \(..., 16\).*got \(2, 7, 32\)"
            ),
        ):
            model(**prompts())

    def test_mixture_of_rank_zero(self) -> None:
        with pytest.raises(ValueError, match="latents: the mixture has rank 0"):
            steer(causal_lm(), fitting_mixture(rank=0), LAYER, 0, 0.5, torch.ones(0))

    def test_a_module_that_does_not_return_tokens(self) -> None:
        model = causal_lm()
        with pytest.raises(ValueError, match="'model' of LlamaForCausalLM puts out no tensor but BaseModel"):
            steer(model, fitting_mixture(), "model", 0, 0.5)
        model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp)
        model.model.layers[1].mlp[0].register_forward_hook(lambda module, args, output: {"hidden": output})
        with (
            steer(model, fitting_mixture(), "model.layers.1.mlp", 0, 0.5),
            pytest.raises(TypeError, match="the output of model.layers.1.mlp must be a tensor or an array, got dict"),
        ):
            model(**prompts())

    def test_not_a_mixture(self) -> None:
        with pytest.raises(TypeError, match="mfa must be an MFA, got Linear"):
            steer(causal_lm(), nn.Linear(2, 2), LAYER, 0, 0.5)


def test_real_model_writes_something_else() -> None:
    from mfa_kernels.data import tiny_lm

    model, tokenizer = tiny_lm.load()
    inputs = tokenizer("def read(path):", return_tensors="pt")
    mfa = fitting_mixture(features=model.config.hidden_size)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    before = model.generate(**inputs, **kwargs)
    with steer(model, mfa, 2, component=1, alpha=0.9) as handle:
        assert isinstance(handle, Handle)
        assert not torch.equal(model.generate(**inputs, **kwargs), before)
    assert torch.equal(model.generate(**inputs, **kwargs), before)

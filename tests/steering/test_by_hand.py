"""`steer` beside a hook written by hand, which is told where the prompt ends.

On models that hand over their inputs in ways of their own, in several threads, and in code that was compiled before.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfa_kernels import steer
from mfa_kernels.data.language_model import hidden_states, resolve_layer, with_hidden_states
from mfa_kernels.steering import Toward, intervene
from mfa_kernels.steering.tracking import LostTrackError
from tests.steering.tiny import CACHE, LAYER, PAD, WIDTH, causal_lm, fitting_mixture, generated, prompts

TRAINED = torch.zeros((), requires_grad=True)  # without which a reentrant checkpoint makes no gradients
VIRTUAL = 4  # tokens of a learnt prompt
COMPONENT, ALPHA = 2, 0.6
POSITIONS = ("all", "prompt", "generated")


@contextmanager
def by_hand(model: nn.Module, layer: int | str, prompt: int, positions: str) -> Iterator[None]:
    """Steers the tokens of one run of a model, which reads `prompt` columns before it writes.

    A pass of several tokens begins anew, one of a single token goes on.
    """
    mfa, seen = fitting_mixture(), [0]

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        start = seen[0] if hidden.shape[1] == 1 else 0
        column = torch.arange(start, start + hidden.shape[1])
        seen[0] = start + hidden.shape[1]
        chosen = {"all": column >= 0, "prompt": column < prompt, "generated": column >= prompt}[positions]
        steered = intervene(hidden, mfa, Toward(COMPONENT, ALPHA))
        return with_hidden_states(output, torch.where(chosen[:, None], steered, hidden))

    handle = resolve_layer(model, layer)[1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def compare(model: nn.Module, run: Callable[[], tuple[Tensor, Tensor]], prompt: int, positions: str) -> None:
    """`steer` writes what the hook written by hand writes, and something else than nobody."""
    clean = run()
    with by_hand(model, LAYER, prompt, positions):
        expected = run()
    with steer(model, fitting_mixture(), LAYER, COMPONENT, ALPHA, positions=positions) as handle:
        found = run()
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[1], clean[1], rtol=1e-2)
    assert handle.stats().tokens_steered > 0


def seq2seq(kind: str) -> nn.Module:
    """An encoder-decoder of three layers each, as wide as `fitting_mixture`."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes: dict[str, Any] = {
        "t5": {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "initializer_factor": 2.0},
        "bart": {
            "d_model": WIDTH, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3,
            "forced_eos_token_id": None,
        },
    }[kind]  # fmt: skip
    config = AutoConfig.for_model(
        kind, vocab_size=64, pad_token_id=PAD, bos_token_id=1, eos_token_id=63, decoder_start_token_id=2, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSeq2SeqLM.from_config(config).eval()


def written(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens, and the logits that they were chosen by; no token ends the sequence."""
    out = model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("start", [1, 3], ids=["own start", "given start"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_decoder_of_an_encoder_decoder(kind: str, start: int, positions: str) -> None:
    """An index means its layers; the prompt is what the decoder begins with, not what the encoder reads."""
    model, inputs = seq2seq(kind), prompts(padded=True)
    if start > 1:
        inputs["decoder_input_ids"] = torch.tensor([[2, 7, 9], [2, 8, 5]])
    compare(model, lambda: written(model, **inputs), start, positions)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_encoder_of_an_encoder_decoder(kind: str) -> None:
    """Whatever it reads is prompt, and nothing is generated; its padding is left alone."""
    model, inputs = seq2seq(kind), prompts(padded=True)
    layer = {"t5": "encoder.block.1", "bart": "model.encoder.layers.1"}[kind]
    clean = written(model, **inputs)
    results = {}
    for positions in POSITIONS:
        with steer(model, fitting_mixture(), layer, COMPONENT, ALPHA, positions=positions) as handle:
            results[positions] = written(model, **inputs)[1]
            steered = 0 if positions == "generated" else int(inputs["attention_mask"].sum())
            assert handle.stats()[:2] == (int(inputs["attention_mask"].sum()), steered)
    assert torch.equal(results["all"], results["prompt"])
    assert torch.equal(results["generated"], clean[1])
    with by_hand(model, layer, 7, "all"):  # in padding too, which the decoder does not look at
        torch.testing.assert_close(results["all"], written(model, **inputs)[1], rtol=1e-4, atol=1e-4)


def test_teacher_forcing_is_all_prompt() -> None:
    model, inputs = seq2seq("t5"), prompts()
    labels = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), steer(model, fitting_mixture(), LAYER, COMPONENT, ALPHA, positions="prompt") as handle:
        model(**inputs, labels=labels)
        assert handle.stats()[:2] == (10, 10)


def soft_prompt(model: nn.Module, kind: str) -> None:
    """Puts a learnt prompt before both rows, as PEFT does: embeddings (prompt tuning), or a cache (prefix tuning)."""
    prepare, generator = model.prepare_inputs_for_generation, torch.Generator().manual_seed(5)
    embeddings = torch.randn(1, VIRTUAL, WIDTH, generator=generator).expand(2, -1, -1)
    with torch.no_grad():
        prefix = model(inputs_embeds=embeddings, use_cache=True)

    def prepared(ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        cache = kwargs.get(CACHE)
        begins = cache is None or not cache.get_seq_length()
        kwargs.pop("position_ids", None)
        given = prepare(ids, *args, **kwargs)
        given.pop("position_ids", None)
        given.pop("cache_position", None)
        if not begins:
            given["input_ids"] = ids[:, -1:]
        given["attention_mask"] = torch.ones(2, VIRTUAL + ids.shape[1])
        if begins and kind == "prompt":
            own = model.get_input_embeddings()(given.pop("input_ids"))
            given["inputs_embeds"] = torch.cat([embeddings, own], 1)
        elif begins:
            given[CACHE] = copy.deepcopy(prefix[CACHE])
        return given

    model.prepare_inputs_for_generation = prepared


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_learnt_prompt_counts_as_prompt(model: Any, inputs: Any, kind: str, positions: str) -> None:
    soft_prompt(model, kind)
    mfa, ends = fitting_mixture(), 7 + VIRTUAL
    with steer(model, mfa, LAYER, COMPONENT, ALPHA, positions=positions) as handle:
        tokens, logits = generated(model, inputs)
    steered = handle.stats().tokens_steered
    read = ends if kind == "prompt" else 7  # a prefix was read before
    assert steered == {"all": 2 * (read + 4), "prompt": 2 * read, "generated": 2 * 4}[positions]
    seen: list[int] = []
    hand = fitting_mixture()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_states(output)
        wanted = positions == "all" or (hidden.shape[1] > 1) == (positions == "prompt")
        seen.append(hidden.shape[1])
        return with_hidden_states(output, intervene(hidden, hand, Toward(COMPONENT, ALPHA))) if wanted else None

    hook_handle = model.model.layers[LAYER].register_forward_hook(hook)
    expected = generated(model, inputs)
    hook_handle.remove()
    assert seen == [read] + [1] * 4
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, generated(model, inputs)[1], rtol=1e-2)


class Plain(nn.Module):
    """As little as can be steered: compiling a model of transformers takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(64, WIDTH)
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **how: Any) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            # As transformers before 5: what is run again in the backward pass is the layer with its hooks.
            hidden = (checkpoint(layer, hidden, **how) if how else layer(hidden)).tanh()
        return SimpleNamespace(logits=hidden @ self.embed.weight.T)


def compiled(model: nn.Module, what: str) -> Callable[..., Any]:
    """The model, parts of which run compiled from now on, as a function."""
    if what == "a function of the model":
        return torch.compile(lambda **given: model(**given), backend="eager")
    if what == "the model's forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif what == "the model in place":
        model.compile(backend="eager")
    else:
        for _, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    layer.forward = torch.compile(layer.forward, backend="eager")
    return model


WAYS = ("the model's forward", "a function of the model", "the layers' forward", "the model in place")


@pytest.mark.parametrize(
    ("make", "what", "positions"),
    [*((Plain, what, positions) for what in WAYS for positions in ("all", "prompt")), (causal_lm, WAYS[0], "all")],
)
def test_compiled_before_it_is_steered(make: Any, what: str, positions: str) -> None:
    """Compiled and run once before, and again after it was steered: hooks come and go all the same."""
    torch.compiler.reset()
    model, inputs, mfa = make(), prompts(), fitting_mixture()
    layers = resolve_layer(model, LAYER)[1]
    with torch.no_grad():
        clean = model(**inputs).logits
        with by_hand(model, LAYER, 7, positions):
            expected = model(**inputs).logits
        run = compiled(model, what)
        torch.testing.assert_close(run(**inputs).logits, clean)
        owned = set(vars(layers))
        for component in (COMPONENT,) if make is causal_lm else (COMPONENT, 1, COMPONENT):
            with steer(model, mfa, LAYER, component, ALPHA, positions=positions) as handle:
                found = run(**inputs).logits
            assert handle.stats() == (14, 14, None)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4) == (component == COMPONENT)
            torch.testing.assert_close(run(**inputs).logits, clean)
        assert set(vars(layers)) == owned
    torch.compiler.reset()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "model"])
def test_layers_that_run_again_in_a_backward_pass_know_which_pass_they_are_of(reentrant: bool, whole: bool) -> None:
    """Two forward passes of other lengths and padding wait for one backward pass."""
    model, mfa, batches = Plain(), fitting_mixture(), [prompts(2, 9, padded=True), prompts(3, 5), prompts(2, 9)]

    def gradients(how: dict[str, Any]) -> list[Tensor]:
        model.zero_grad()
        loss = torch.zeros(())
        for inputs in batches:
            if how and whole:
                logits = checkpoint(lambda inputs, _: model(**inputs).logits, inputs, TRAINED, **how)
            else:
                logits = model(**inputs, **how).logits
            loss = loss + logits.square().mean()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    where = slice(0, 4)  # in absolute positions, which padding shifts
    with steer(model, mfa, LAYER, COMPONENT, ALPHA, positions=where), steer(model, mfa, 2, 1, ALPHA, positions="all"):
        expected, found = gradients({}), gradients({"use_reentrant": reentrant})
    for pair in zip(found, expected):
        torch.testing.assert_close(*pair)


def test_a_layer_that_runs_again_with_tensors_nobody_saw_is_an_error() -> None:
    model, mfa = Plain(), fitting_mixture()
    with steer(model, mfa, LAYER, COMPONENT, ALPHA):
        hidden = torch.randn(2, 9, WIDTH, requires_grad=True)

        class Again(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return model.layers[LAYER](grad)

        with pytest.raises(LostTrackError, match="run again in a backward pass"):
            Again.apply(hidden).sum().backward()


def test_a_copy_of_a_steered_model_calls_its_own_layers(model: Any, inputs: Any) -> None:
    with torch.no_grad(), steer(model, fitting_mixture(), LAYER, COMPONENT, ALPHA):
        copied = copy.deepcopy(model)
        steered = model(**inputs).logits
        assert torch.equal(copied(**inputs).logits, steered)
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        assert torch.equal(copied(**inputs).logits, steered)


def test_threads_do_not_disturb_each_other(model: Any, mfa: Any) -> None:
    """Prompts of other lengths, padding and steps, on one model at once, while its schedule asks where they are."""
    batches = [prompts(batch, length, padded=padded) for batch, length, padded in
               [(2, 7, True), (1, 5, False), (3, 9, True), (2, 12, False)]]  # fmt: skip
    for arguments in ({"positions": "generated"}, {"alpha": lambda step: 0.9 - 0.1 * step}, {"positions": "prompt"}):
        results: dict[tuple[int, int], Any] = {}
        with steer(model, mfa, LAYER, **{"component": COMPONENT, "alpha": ALPHA, **arguments}) as handle:
            expected = [generated(model, inputs) for inputs in batches]
            once = handle.stats()

            def work(number: int, results: dict = results) -> None:
                for turn in range(5):
                    try:
                        results[number, turn] = generated(model, batches[number])
                    except Exception as error:
                        results[number, turn] = error

            threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert handle.stats()[:2] == (6 * once[0], 6 * once[1])
        for (number, _), found in results.items():
            assert not isinstance(found, Exception), found
            assert torch.equal(found[0], expected[number][0])
            torch.testing.assert_close(found[1], expected[number][1], rtol=1e-4, atol=1e-4)


def test_hidden_states_asked_for_before_and_after_are_those_the_model_goes_on_with() -> None:
    model, inputs, mfa = causal_lm(), prompts(), fitting_mixture()
    with torch.no_grad():
        clean = model(**inputs, output_hidden_states=True).hidden_states
        with steer(model, mfa, LAYER, COMPONENT, ALPHA):
            steered = model(**inputs, output_hidden_states=True).hidden_states
        again = model(**inputs, output_hidden_states=True).hidden_states
        with steer(model, mfa, LAYER, COMPONENT, ALPHA), steer(model, mfa, LAYER, 1, 0.5):
            twice = model(**inputs, output_hidden_states=True, return_dict=False)
    both = [Toward(COMPONENT, ALPHA), Toward(1, 0.5)]
    recorded = next(part for part in twice if isinstance(part, tuple) and len(part) == len(clean))
    torch.testing.assert_close(recorded[LAYER + 1], intervene(clean[LAYER + 1], mfa, both))
    torch.testing.assert_close(steered[LAYER + 1], intervene(clean[LAYER + 1], mfa, Toward(COMPONENT, ALPHA)))
    assert torch.equal(steered[LAYER], clean[LAYER])
    assert all(torch.equal(*pair) for pair in zip(clean, again))

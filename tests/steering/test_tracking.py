"""Passes as they are recorded while models run: in `generate`, and in loops of one's own."""

from __future__ import annotations

import copy
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import steer
from mfa_kernels.data.language_model import resolve_layer
from mfa_kernels.steering import arguments
from mfa_kernels.steering.tracking import LostTrackError, Pass, Tracker
from tests.steering import tiny

USER = SimpleNamespace(asks_where=True)


def path(model: nn.Module) -> str:
    return resolve_layer(model, 1)[0]


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def acquired() -> Tracker:
    model = tiny.causal_lm()
    return Tracker.acquire(model, USER, path(model))


class Log:
    """A tracker whose passes are kept: (start, tokens, prompt_end), and positions with -1 for padding."""

    def __init__(self, model: nn.Module) -> None:
        self.tracker = Tracker.acquire(model, USER, path(model))
        self.passes: list[tuple[int, int, int]] = []
        self.positions: list[list[list[int]]] = []
        _, layer = next((n, m) for n, m in model.named_modules() if n.endswith(".1"))
        layer.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        now = self.tracker.at(hidden)
        self.passes.append((now.start, now.tokens, now.prompt_end))
        positions = now.positions(hidden.device).expand(hidden.shape[:2])
        if now.real is not None:
            positions = positions.masked_fill(~now.real, -1)
        self.positions.append(positions.tolist())


PADDED = tiny.prompts(padded=True)  # 7 columns, of which 1 and 2 are padding
PREFILL = [[-1, 0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_with_a_cache(cache: dict[str, Any], attention: str) -> None:
    model = tiny.causal_lm(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    log = Log(model)
    for _ in range(2):  # a new sequence begins anew
        tiny.generate(model, PADDED, new=4, **cache)
    assert log.passes == [(0, 7, 7), (7, 1, 7), (8, 1, 7), (9, 1, 7)] * 2
    assert log.positions == [PREFILL, [[6], [5]], [[7], [6]], [[8], [7]]] * 2


def test_a_static_cache_on_a_device_is_not_waited_for() -> None:
    """Its length is a tensor; one without a value would raise if it were read after the prompt."""

    class StaticCache:
        lengths = (0, torch.zeros((), device="meta"), torch.zeros((), device="meta"))
        calls = 0

        def get_seq_length(self) -> Any:
            self.calls += 1
            return self.lengths[self.calls - 1]

    def steps(input_ids: Tensor) -> None:
        for tokens in (input_ids, input_ids[:, :1], input_ids[:, :1]):
            tracker._observe(nn.Identity(), (), {"input_ids": tokens, "past_key_values": cache})
            starts.append(tracker.at(torch.zeros(*tokens.shape, 32)).start)

    model, cache, starts = tiny.causal_lm(), StaticCache(), []
    model.generate = steps
    tracker = Tracker.acquire(model, USER, path(model))
    model.generate(input_ids=PADDED["input_ids"])
    assert starts == [0, 7, 8]


def test_a_call_after_generate_is_a_prompt_of_its_own(model: Any) -> None:
    log = Log(model)
    tiny.generate(model, PADDED, new=1)
    model(**PADDED)
    model(input_ids=PADDED["input_ids"][:, :3])
    model(torch.full((1, 9), 5))
    assert log.passes == [(0, 7, 7), (0, 7, 7), (0, 3, 3), (0, 9, 9)]


def test_static_sliding_window_cache() -> None:
    model = tiny.causal_lm("gemma2")
    log = Log(model)
    tiny.generate(model, PADDED, new=4, cache_implementation=tiny.STATIC)
    assert log.passes == [(0, 7, 7), (7, 1, 7), (8, 1, 7), (9, 1, 7)]
    assert log.positions == [PREFILL, [[6], [5]], [[7], [6]], [[8], [7]]]


def test_generate_without_a_cache(model: Any) -> None:
    log = Log(model)
    tiny.generate(model, PADDED, new=3, use_cache=False)
    assert log.passes == [(0, 7, 7), (0, 8, 7), (0, 9, 7)]
    assert log.positions[0] == PREFILL
    assert log.positions[2] == [[*PREFILL[0], 6, 7], [*PREFILL[1], 5, 6]]


@pytest.mark.parametrize("chunk", [3, 6], ids=["short last chunk", "last chunk of one token"])
def test_chunked_prefill(model: Any, chunk: int) -> None:
    log = Log(model)
    tiny.generate(model, PADDED, new=3, prefill_chunk_size=chunk)
    assert [p[2] for p in log.passes] == [7] * len(log.passes)
    assert sum(tokens for start, tokens, _ in log.passes if start < 7) == 7
    joined = [[p for part in log.positions for p in part[row]] for row in range(2)]
    assert joined == [[*PREFILL[0], 6, 7], [*PREFILL[1], 5, 6]]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_turn_on_the_same_cache(model: Any, kind: str) -> None:
    # transformers 4 counts the keys of a static cache that are not zero, and those of this padding would be.
    model.get_input_embeddings().weight.data[tiny.PAD] = 1
    log = Log(model)
    first = tiny.generate(model, PADDED, new=3, **({} if kind == "dynamic" else {tiny.CACHE: tiny.static_cache(model)}))
    again = torch.cat([first.sequences, torch.tensor([[5, 6], [7, 8]])], 1)
    mask = torch.cat([PADDED["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    log.passes.clear()
    log.positions.clear()
    tiny.generate(model, {"input_ids": again, "attention_mask": mask}, new=2, **{tiny.CACHE: first[tiny.CACHE]})
    assert log.passes == [(9, 3, 12), (12, 1, 12)]
    assert log.positions == [[[8, 9, 10], [7, 8, 9]], [[11], [10]]]


def test_a_loop_of_ones_own_goes_on_where_generate_stopped(model: Any) -> None:
    log = Log(model)
    cache = tiny.generate(model, PADDED, new=3)[tiny.CACHE]
    log.passes.clear()
    log.positions.clear()
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=PADDED["input_ids"][:, -1:], **{tiny.CACHE: cache})
    assert log.passes == [(9, 1, 7), (10, 1, 7)]
    assert log.positions == [[[8], [7]], [[9], [8]]]


def test_guidance_runs_a_sequence_of_its_own() -> None:
    """Classifier-free guidance: the unconditional branch begins with the prompt's last token, on another cache."""
    log = Log(model := tiny.causal_lm())
    for cache in ({}, {"cache_implementation": "static"}):
        tiny.generate(model, PADDED, new=3, guidance_scale=1.5, **cache)
        assert log.passes == [(0, 7, 7), (0, 1, 1), (7, 1, 7), (1, 1, 1), (8, 1, 7), (2, 1, 1)]
        assert log.positions == [PREFILL, [[0], [0]], [[6], [5]], [[1], [1]], [[7], [6]], [[2], [2]]]
        log.passes.clear()
        log.positions.clear()


def test_assisted_decoding_reads_guesses_as_generated(model: Any) -> None:
    log = Log(model)
    ids = torch.tensor([[4, 5, 6, 4, 5, 6, 4, 5]])
    tiny.generate(model, {"input_ids": ids}, new=6, prompt_lookup_num_tokens=2, eos_token_id=tiny.UNWRITTEN)
    assert {end for _, _, end in log.passes} == {8}
    assert any(tokens > 1 for start, tokens, _ in log.passes if start >= 8) or log.passes[0][1] > 8


def test_loop_of_ones_own() -> None:
    model, ids, mask = tiny.causal_lm(), PADDED["input_ids"], PADDED["attention_mask"]
    log = Log(model)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], attention_mask=mask[:, :4])[tiny.CACHE]
        model(ids[:, 4:], mask, **{tiny.CACHE: cache})  # a second chunk, by position
        for _ in range(2):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            model(input_ids=ids[:, :1], attention_mask=mask, **{tiny.CACHE: cache})
        model(input_ids=ids[:, :2])
    assert log.passes == [(0, 4, 4), (4, 3, 7), (7, 1, 7), (8, 1, 7), (0, 2, 2)]
    assert log.positions[1] == [row[4:] for row in PREFILL]
    assert log.positions[3:] == [[[7], [6]], [[0, 1], [0, 1]]]


def test_joining_in_the_middle_of_a_sequence() -> None:
    model, ids = tiny.causal_lm(), PADDED["input_ids"]
    with torch.no_grad():
        cache = model(**PADDED)[tiny.CACHE]
        log = Log(model)
        model(input_ids=ids[:, :1], attention_mask=torch.cat([PADDED["attention_mask"], ids[:, -1:] ** 0], 1),
              **{tiny.CACHE: cache})  # fmt: skip
    assert log.passes == [(7, 1, 7)]
    assert log.positions == [[[6], [5]]]


def test_embeddings_instead_of_tokens(model: Any) -> None:
    log = Log(model)
    embeds = model.get_input_embeddings()(PADDED["input_ids"]).detach()
    model.generate(inputs_embeds=embeds, attention_mask=PADDED["attention_mask"], max_new_tokens=2, do_sample=False)
    assert log.passes == [(0, 7, 7), (7, 1, 7)]


def test_state_space_model_whose_cache_has_no_length() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    log = Log(model)
    tiny.generate(model, PADDED, new=3)
    assert log.passes == [(0, 7, 7), (7, 1, 7), (8, 1, 7)]
    assert log.positions == [PREFILL, [[6], [5]], [[7], [6]]]


def test_legacy_cache_of_tuples() -> None:
    tracker = acquired()
    legacy = ((torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 8)),)
    tracker._observe(nn.Identity(), (), {"input_ids": ids(2, 1), "past_key_values": legacy})
    now = tracker.at(torch.zeros(2, 1, 32))
    assert (now.start, now.tokens) == (5, 1)


def test_sequences_that_take_turns(model: Any) -> None:
    """Each is known by its cache, whoever holds it: the prompts' ends, padding and steps are not mixed up."""
    log = Log(model)
    short = tiny.prompts(1, 4)
    with torch.no_grad():
        first, second = model(**PADDED), model(**short)
        for _ in range(2):
            model(input_ids=PADDED["input_ids"][:, :1], **{tiny.CACHE: first[tiny.CACHE]})
            model(input_ids=short["input_ids"][:, :1], **{tiny.CACHE: second[tiny.CACHE]})
    assert log.passes == [(0, 7, 7), (0, 4, 4), (7, 1, 7), (4, 1, 4), (8, 1, 7), (5, 1, 4)]
    assert log.positions[2:] == [[[6], [5]], [[4]], [[7], [6]], [[5]]]


def test_legacy_caches_that_take_turns() -> None:
    """A new tuple at each pass, in the place of the one that was handed over."""
    tracker, steps = acquired(), []

    def read(tokens: int, cache: Any, columns: int) -> Any:
        tracker._observe(nn.Identity(), (), {"input_ids": ids(2, tokens), "past_key_values": cache})
        now = tracker.at(torch.zeros(2, tokens, 32))
        steps.append((now.start, now.steps()))
        made = ((torch.zeros(2, 4, columns, 8), torch.zeros(2, 4, columns, 8)),)
        tracker._leave(nn.Identity(), (), (torch.zeros(2, tokens, 32), made))
        return made

    a, b = read(5, None, 5), read(3, None, 3)
    for turn in range(3):
        a, b = read(1, a, 6 + turn), read(1, b, 4 + turn)
    assert steps[2:] == [(5, (1,)), (3, (1,)), (6, (2,)), (4, (2,)), (7, (3,)), (5, (3,))]


def forgetting(name: str, value: Any) -> bool:
    """A cache of a kind that nobody knows."""
    return False


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "spec",
    [{}, {"positions": "generated"}, {"positions": slice(2, 9)}, {"alpha": lambda step: 0.1 * step}],
    ids=["all", "generated", "slice", "schedule"],
)
def test_a_cache_nobody_knows_is_made_up_for(
    model: Any, mfa: Any, masked: bool, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a model that keeps it to itself: what was counted has to be what the mask says, or the positions."""
    inputs = tiny.prompts(padded=True) if masked else {"input_ids": PADDED["input_ids"]}
    with steer(model, mfa, 1, **{"component": 2, "alpha": 0.6, **spec}):
        expected = tiny.generated(model, inputs)
        monkeypatch.setattr(arguments, "is_cache", forgetting)
        found = tiny.generated(model, inputs)
    assert all(torch.equal(*pair) for pair in zip(found, expected))


def test_a_lost_track_is_said(model: Any, mfa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second turn: nothing was counted of what the cache, which nobody knows, holds."""
    again = {
        "input_ids": torch.cat([PADDED["input_ids"]] * 2, 1),
        "attention_mask": torch.ones(2, 14, dtype=torch.long),
    }

    def cache() -> dict[str, Any]:
        with torch.no_grad():
            return {tiny.CACHE: model(input_ids=PADDED["input_ids"])[tiny.CACHE]}

    kept = [cache() for _ in range(5)]
    with steer(model, mfa, 1, 2, 0.6):
        expected = tiny.generated(model, again, **kept.pop())
    monkeypatch.setattr(arguments, "is_cache", forgetting)
    for spec in ({"positions": "generated"}, {"positions": slice(0, 3)}, {"alpha": lambda step: 0.1}):
        with (
            steer(model, mfa, 1, **{"component": 2, "alpha": 0.6, **spec}),
            pytest.raises(
                LostTrackError, match=r"7 tokens per row and (a mask of 14 columns|position 7), but no cache is"
            ),
        ):
            tiny.generated(model, again, **kept.pop())
    with steer(model, mfa, 1, 2, 0.6):  # the same everywhere: does not depend on it
        found = tiny.generated(model, again, **kept.pop())
    assert all(torch.equal(*pair) for pair in zip(found, expected))


class Empty:
    """A cache that says that it holds nothing, whatever it holds."""

    def get_seq_length(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"attention_mask": ids(2, 9) + 1}, "a mask of 9 columns, but no cache is"),
        ({"position_ids": ids(1, 1) + 9}, "position 9, but no cache is"),
        ({}, "no mask or positions, but no cache is"),
        ({"cache": Empty(), "attention_mask": ids(2, 8) + 1}, "a mask of 8 columns, but only an empty Empty is"),
        ({"cache": Empty(), "position_ids": ids(1, 1) + 7}, "position 7, but only an empty Empty is"),
    ],
)
def test_what_contradicts_itself_inside_generate(further: dict[str, Any], message: str) -> None:
    model, found = tiny.causal_lm(), []

    def run(input_ids: Tensor) -> None:
        tracker._observe(nn.Identity(), (), {"input_ids": input_ids, "attention_mask": torch.ones(2, 7)})
        tracker._observe(nn.Identity(), (), {"input_ids": input_ids[:, :1], **further})
        with pytest.raises(LostTrackError) as error:
            tracker.at(torch.zeros(2, 1, 32))
        found.append(str(error.value))

    model.generate = run
    tracker = Tracker.acquire(model, USER, path(model))
    model.generate(input_ids=PADDED["input_ids"])
    assert message in found[0]


def test_a_lost_track_outside_generate_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "is_cache", forgetting)
    with torch.no_grad(), steer(model, tiny.fitting_mixture(), 1, 2, 0.6, positions="prompt"):
        cache = model(**PADDED)[tiny.CACHE]
        mask = nn.functional.pad(PADDED["attention_mask"], (0, 1), value=1)
        with pytest.raises(LostTrackError, match="a mask of 8 columns, but no cache is among"):
            model(input_ids=PADDED["input_ids"][:, :1], attention_mask=mask, **{tiny.CACHE: cache})


def test_rows_of_several_sequences_are_not_told_apart() -> None:
    tracker, hidden = acquired(), torch.zeros(1, 6, 32)
    packed = {"input_ids": ids(1, 6), "cu_seq_lens_q": torch.tensor([0, 2, 6])}
    tracker._observe(nn.Identity(), (), packed)
    with pytest.raises(LostTrackError, match="cu_seq_lens_q: several sequences share a row"):
        tracker.at(hidden)
    assert tracker.padding(hidden) is None


def test_a_state_space_loop_of_ones_own() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    log, token = Log(model), PADDED["input_ids"][:, :1]
    with torch.no_grad():
        out = model(input_ids=PADDED["input_ids"])
        name = next(name for name, value in out.items() if arguments.is_cache(name, value))
        where = {"cache_position": torch.tensor([7])} if "cache_position" in signature(model.forward).parameters else {}
        for _ in range(2):
            model(input_ids=token, **{name: out[name]}, **where)
        assert log.passes == [(0, 7, 7), (7, 1, 7), (8, 1, 7)]
        with pytest.raises(LostTrackError, match="1 tokens per row and a cache that does not say how long it is"):
            model(input_ids=token, **{name: copy.deepcopy(out[name])}, **where)


def test_steps() -> None:
    assert Pass(0, 4, 4).steps() == (0,)
    assert Pass(4, 1, 4).steps() == (1,)
    assert Pass(6, 1, 4).steps() == (3,)
    assert Pass(2, 4, 4).steps() == (0, 0, 1, 2)


def test_users_share_a_tracker_and_the_last_one_cleans_up(model: Any) -> None:
    hooks, names = tiny.count_hooks(model), set(vars(model))
    first, second = Tracker.acquire(model, USER, path(model)), Tracker.acquire(model, USER, path(model))
    assert first is second
    assert tiny.count_hooks(model) == hooks + 2
    first.release(USER)
    assert "generate" in vars(model)
    second.release(USER)
    assert (tiny.count_hooks(model), set(vars(model))) == (hooks, names)


def test_an_existing_wrapper_of_generate_is_put_back(model: Any) -> None:
    calls = []
    inner = model.generate

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return inner(*args, **kwargs)

    model.generate = wrapper
    tracker = Tracker.acquire(model, USER, path(model))
    tiny.generate(model, PADDED, new=1)
    tracker.release(USER)
    assert model.generate is wrapper
    assert len(calls) == 1


def test_layers_called_by_themselves() -> None:
    tracker = acquired()
    assert tracker.at(torch.zeros(2, 5, 32)) == Pass(0, 5, 5)
    tracker._observe(nn.Identity(), (), {"input_ids": ids(2, 3)})
    with pytest.raises(ValueError, match=r"shape \(2, 5, 32\), but the model was called with 3 tokens per row"):
        tracker.at(torch.zeros(2, 5, 32))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 2), ValueError, "attention_mask covers 2 columns, fewer than the 3 tokens"),
        (torch.ones(2, 3, 3), TypeError, r"attention_mask must be a tensor of shape \(B, T\).*got Tensor \(2, 3, 3\)"),
        ([1, 1, 1], TypeError, "got list"),
    ],
)  # fmt: skip
def test_masks_that_do_not_tell_padding(mask: Any, error: type[Exception], message: str) -> None:
    tracker = acquired()
    tracker._observe(nn.Identity(), (), {"input_ids": ids(2, 3), "attention_mask": mask})
    for ask in (tracker.at, tracker.padding):
        with pytest.raises(error, match=message):
            ask(torch.zeros(2, 3, 32))


def test_a_call_without_tokens_is_named() -> None:
    tracker = acquired()
    tracker._observe(nn.Identity(), (), {})
    for ask in (tracker.at, tracker.padding):
        with pytest.raises(ValueError, match="Identity was called without input_ids"):
            ask(torch.zeros(2, 3, 32))


def additive(real: Tensor) -> Tensor:
    """A causal mask (B, 1, T, T) to be added to attention scores."""
    columns = real.shape[1]
    allowed = real[:, None, None, :] & torch.ones(columns, columns).tril().bool()
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["bool", "additive", "dict"])
def test_padding_in_masks_of_four_dimensions(kind: str) -> None:
    real = PADDED["attention_mask"].bool()
    mask: Any = additive(real)
    if kind == "bool":
        mask = mask == 0
    elif kind == "dict":
        mask = {"sliding_attention": None, "full_attention": mask}
    tracker = acquired()
    tracker._observe(nn.Identity(), (), {"input_ids": PADDED["input_ids"], "attention_mask": mask})
    assert torch.equal(tracker.padding(torch.zeros(*real.shape, 32)), real)


@pytest.mark.parametrize("mask", [[[1, 1, 1, 1, 0, 0], [1] * 6], [[0, 0, 1, 1, 1, 1], [1] * 6]])
def test_a_mask_that_is_the_same_for_every_token_that_looks(mask: list[list[int]]) -> None:
    """(B, 1, 1, columns), as encoders of the kind of BERT make it: nothing of padding is steered, on either side."""
    from transformers import LayoutLMConfig, LayoutLMForMaskedLM

    config = LayoutLMConfig(
        vocab_size=64, hidden_size=tiny.WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    model, inputs = LayoutLMForMaskedLM(config).eval(), {**tiny.prompts(2, 6), "attention_mask": torch.tensor(mask)}
    with torch.no_grad(), steer(model, tiny.fitting_mixture(), 1, 0, 1.0) as handle:
        with handle.paused():
            unsteered = tiny.layer_output(model, inputs)
        changed = (tiny.layer_output(model, inputs) != unsteered).any(-1)
        assert handle.stats()[:2] == (10, 10)
    assert torch.equal(changed, inputs["attention_mask"].bool())

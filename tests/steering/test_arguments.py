"""Arguments are recognised by their kind, whatever their names are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels.steering.arguments import Arguments, cache_of, identity_of, is_cache, length_of, recognised
from tests.steering.tiny import causal_lm, prompts

IDS, EMBEDDINGS = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3, 8)
MASK, POSITIONS = torch.ones(2, 5, dtype=torch.long), torch.arange(3)[None]
KEYS = torch.zeros(2, 4, 5, 8)


class WithLength:
    def get_seq_length(self) -> int:
        return 2


class StateSpace:
    """A cache of a model whose state has no length."""


@pytest.mark.parametrize(
    "cache", [WithLength(), ((KEYS, KEYS), (KEYS, KEYS)), [(KEYS, KEYS)]], ids=["object", "tuples", "list"]
)
@pytest.mark.parametrize(
    "names",
    [
        ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"),
        ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds"),
        ("tokens", "padding_mask", "positions", "memory", "hidden_states"),
    ],
)
@pytest.mark.parametrize("embedded", [False, True])
def test_by_kind_not_by_name(names: tuple[str, ...], cache: Any, embedded: bool) -> None:
    ids, mask, positions, past, embeds = names
    given = {
        mask: MASK, positions: POSITIONS, past: cache, "use_cache": True, "return_dict": None,
        "position_embeddings": (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)), "head_mask": torch.ones(4),
        "encoder_hidden_states": torch.zeros(2, 9, 8), "encoder_attention_mask": torch.ones(2, 9),
        "token_type_ids": torch.zeros(2, 3, dtype=torch.long),
        ids: None if embedded else IDS, embeds: EMBEDDINGS if embedded else None,
    }  # fmt: skip
    found = recognised(given)
    assert found.inputs is (EMBEDDINGS if embedded else IDS)
    assert (found.mask is MASK, found.positions is POSITIONS, found.cache is cache) == (True, True, True)
    assert (found.tokens, found.mask_columns, found.has_embeddings) == (3, 5, embedded)
    assert found.packed is found.unknown is None


def test_caches_without_a_length_are_known_by_name() -> None:
    for name in ("cache_params", "past", "cache"):
        assert is_cache(name, StateSpace())
    for name in ("past_key_values", "state"):
        assert is_cache(name, [KEYS, KEYS])
    assert not is_cache("collector", StateSpace())
    for value in (True, 3, "static", KEYS, {}, [], (), ((),), None):
        assert not is_cache("use_cache", value)
    assert not is_cache("hidden_states", (EMBEDDINGS, EMBEDDINGS))


def test_lengths() -> None:
    rows = StateSpace()
    rows.key_cache, rows.get_seq_length = [torch.tensor([[]] * 2)], lambda: 2
    assert length_of(rows) == 0  # before anything was read, its "length" is the number of rows
    rows.key_cache = [torch.tensor([[]] * 2), None, KEYS]
    assert length_of(rows) == 2
    assert [length_of(cache) for cache in (None, WithLength(), ((KEYS, KEYS),))] == [0, 2, 5]
    assert [length_of(cache) for cache in (StateSpace(), [KEYS, KEYS])] == [None, None]


def test_what_stands_for_a_cache() -> None:
    cache = WithLength()
    assert identity_of(cache) is cache
    assert identity_of(((KEYS, MASK),)) is KEYS
    assert identity_of([KEYS, MASK]) is KEYS
    assert identity_of(None) is identity_of([]) is None


@pytest.mark.parametrize(
    ("given", "before"),
    [
        ({"attention_mask": MASK, "position_ids": POSITIONS}, 2),
        ({"position_ids": POSITIONS + 4}, 4),
        ({"attention_mask": MASK[:, :3]}, 0),
        ({}, None),
    ],
)
def test_what_mask_and_positions_say_of_earlier_tokens(given: dict[str, Any], before: int | None) -> None:
    assert recognised({"input_ids": IDS, **given}).before == before


def test_what_is_not_there() -> None:
    assert recognised({}) == Arguments(None)
    assert recognised({"attention_mask": None, "labels": IDS}).tokens == 0


def test_a_tensor_that_might_be_a_mask_is_named() -> None:
    assert recognised({"input_ids": IDS, "valid": MASK}).unknown == "valid"
    assert recognised({"input_ids": IDS, "valid": MASK.bool()}).unknown == "valid"
    assert recognised({"input_ids": IDS, "valid": MASK, "attention_mask": MASK}).unknown is None
    assert recognised({"input_ids": IDS, "block_ids": IDS}).unknown is None


def test_the_cache_in_an_output() -> None:
    model: nn.Module = causal_lm()
    with torch.no_grad():
        out = model(**prompts())
    for output in (out, out.to_tuple()):
        assert cache_of(output).get_seq_length() == 7
    assert cache_of(KEYS) is None
    assert cache_of((KEYS,)) is None


def test_masks_of_other_shapes_have_no_columns() -> None:
    masks: list[Any] = [None, torch.ones(2, 1, 3, 3), {"full_attention": MASK}, [1]]
    assert [recognised({"attention_mask": mask}).mask_columns for mask in masks] == [0, 0, 0, 0]
    assert isinstance(recognised({"attention_mask": masks[1]}).mask, Tensor)

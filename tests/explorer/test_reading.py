"""Texts of the user's own."""

from __future__ import annotations

import torch

from mfa_kernels.data.harvest import harvest
from mfa_kernels.explorer import Explorer, reading
from tests.helpers.language import make_model, make_tokenizer, words


def test_regions_are_those_that_a_harvest_would_find(explorer: Explorer, tmp_path) -> None:
    text = words(*range(5, 25))
    store = harvest(make_model("llama"), make_tokenizer(bos=True), [text], 2, tmp_path / "store", context=64, seed=None)
    expected = explorer.mfa.code(store.tensor(), top_k=1)
    found = reading.read(explorer, text)
    assert [token["component"] for token in found["tokens"]] == expected.components[:, 0].tolist()
    responsibilities = torch.tensor([token["responsibility"] for token in found["tokens"]])
    torch.testing.assert_close(responsibilities, expected.responsibilities[:, 0], rtol=1e-4, atol=1e-5)
    assert found["truncated"] is False
    assert {int(k) for k in found["regions"]} == set(expected.components[:, 0].tolist())


def test_a_long_text_is_cut(explorer: Explorer, monkeypatch) -> None:
    monkeypatch.setattr(reading, "MOST_TOKENS", 5)
    found = reading.read(explorer, words(*range(9)))
    assert (len(found["tokens"]), found["truncated"]) == (5, True)


def test_a_text_is_cut_where_the_model_reads_no_further(explorer: Explorer) -> None:
    found = reading.read(explorer, words(*range(40)) + " " + words(*range(40)))
    assert (len(found["tokens"]), found["truncated"]) == (63, True)  # and the first token, of 64 positions


def test_no_text_has_no_tokens(explorer: Explorer) -> None:
    assert reading.read(explorer, "")["tokens"] == []


def test_the_first_token_owns_no_region_without_bos(explorer: Explorer) -> None:
    explorer.tokenizer = make_tokenizer(bos=False)
    found = reading.read(explorer, "w4 w5")
    assert found["tokens"][0]["component"] == -1
    assert found["tokens"][1]["component"] >= 0
    assert [token["component"] for token in reading.read(explorer, "w4")["tokens"]] == [-1]

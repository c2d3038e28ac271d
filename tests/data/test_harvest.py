"""Harvested rows are the model's hidden states, to the bit, and the model is left as it was."""

from __future__ import annotations

import gc
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import harvest
from mfa_kernels.data import ActivationStore, language_model, tiny_lm
from mfa_kernels.data.harvest import read_tokens, similar_lengths, stream
from mfa_kernels.data.language_model import hidden_states, with_hidden_states
from tests.data.harvesting import LONG, TEXTS, hooks, quiet
from tests.helpers.language import BOS, EOS, UNKNOWN, VOCABULARY, make_model, make_tokenizer, templated, words

pytestmark = pytest.mark.usefixtures("one_thread")  # these models are too small for more


def hidden_states_of(model: Any, documents: list[Tensor], layer: int) -> list[Tensor]:
    """transformers' own hidden states after a layer, for documents that are padded to one batch."""
    longest = max(len(d) for d in documents)
    tokens = torch.full((len(documents), longest), EOS)
    mask = torch.zeros_like(tokens)
    for i, document in enumerate(documents):
        tokens[i, : len(document)] = document
        mask[i, : len(document)] = 1
    was = model.training
    model.eval()
    with torch.no_grad():
        states = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1]
    model.train(was)
    return [states[i, : len(document)] for i, document in enumerate(documents)]


@pytest.mark.parametrize("layer", [0, 2])
def test_rows_equal_the_hidden_states_of_transformers(lm: tuple, layer: int) -> None:
    model, tokenizer, _ = lm
    store = quiet(model, tokenizer, TEXTS, layer, context=8, batch_size=4)
    documents = [store.document_tokens(d) for d in range(store.n_documents)]
    assert len({len(d) for d in documents}) > 2, "no padding is exercised"
    assert store.n_documents > 8
    states: list[Tensor] = [torch.empty(0)] * len(documents)
    for chosen in similar_lengths([len(d) for d in documents], 4 * 8):
        for number, own in zip(chosen, hidden_states_of(model, [documents[i] for i in chosen], layer)):
            states[number] = own
            alone = hidden_states_of(model, [documents[number]], layer)[0]
            torch.testing.assert_close(own, alone, atol=1e-5, rtol=1e-5)
    row = 0
    for number, own in enumerate(states):
        # Every word but the first position, which is BOS where there is one.
        for position in range(1, len(documents[number])):
            assert (store.document(row), store.position(row)) == (number, position)
            assert torch.equal(store.rows(torch.tensor([row]))[0], own[position])
            row += 1
    assert row == len(store)


def test_windows_cover_the_texts(lm: tuple) -> None:
    model, tokenizer, bos = lm
    store = quiet(model, tokenizer, [("first", TEXTS[0]), ("last", TEXTS[-1])], 1, context=8, skip_first=0, seed=None)
    assert store.meta["skip_first"] == 0
    body = {"first": [], "last": []}  # type: dict[str, list[int]]
    for document in range(store.n_documents):
        tokens = store.document_tokens(document).tolist()
        assert len(tokens) <= 8
        assert (tokens[0] == BOS) == bos
        body[store.source(document)] += tokens[bos:]
    assert body["first"] == [3, 4, 5]
    assert body["last"] == list(range(8, 8 + 28))
    assert store.tokens.tolist() == body["first"] + body["last"]
    assert store.context(0, before=5, after=1) == (([BOS, 3, 4], 1) if bos else ([3, 4], 0))


def test_special_tokens_and_first_positions_are_dropped(model: Any, tokenizer: Any) -> None:
    text = "w1 w2 </s> w3 nonsense w4"
    kept = quiet(model, tokenizer, [text], 0, skip_first=2)
    assert kept.tokens.tolist() == [5, 6, 7]
    assert [kept.position(i) for i in range(3)] == [2, 4, 6]
    everything = quiet(model, tokenizer, [text], 0, skip_first=0, drop_special=False)
    assert everything.tokens.tolist() == [BOS, 4, 5, EOS, 6, UNKNOWN, 7]
    assert torch.equal(everything.rows(torch.tensor([2, 4, 6])), kept.tensor())


def test_the_forward_pass_stops_after_the_last_layer(model: Any, tokenizer: Any) -> None:
    called: list[int] = []
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: called.append(i))
    model.lm_head.register_forward_pre_hook(lambda *_: called.append(99))
    quiet(model, tokenizer, TEXTS[:2], 1)
    assert called == [0, 1]
    called.clear()
    quiet(model, tokenizer, TEXTS[:2], [2, 0])
    assert called == [0, 1, 2]


def test_tokens_are_read_as_a_harvest_reads_them(lm: tuple) -> None:
    model, tokenizer, _ = lm
    tokens = tokenizer(words(*range(9)))["input_ids"]
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states
    before = hooks(model)
    for layer in (0, 1, -2):
        states = read_tokens(model, tokens, layer)
        torch.testing.assert_close(states, expected[layer + 1 if layer >= 0 else 3][0])
    assert hooks(model) == before
    with pytest.raises(IndexError, match="layer must be in"):
        read_tokens(model, tokens, 4)


def test_several_layers_in_one_pass(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    calls: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    stores = quiet(model, tokenizer, TEXTS, [2, -4, "model.layers.1.mlp"], tmp_path, context=8, batch_size=4)
    passes = len(calls)
    assert list(stores) == [2, -4, "model.layers.1.mlp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.layers.0", "model.layers.1.mlp", "model.layers.2"]
    for layer, path in ((2, "model.layers.2"), (-4, "model.layers.0"), ("model.layers.1.mlp", "model.layers.1.mlp")):
        single = quiet(model, tokenizer, TEXTS, layer, context=8, batch_size=4)
        assert torch.equal(stores[layer].tensor(), single.tensor())
        assert torch.equal(stores[layer].tokens, single.tokens)
        assert stores[layer].meta["layer"] == path
    assert len(calls) == 4 * passes
    assert not torch.equal(stores[2].tensor(), stores[-4].tensor())


def test_the_same_layer_twice_is_one_store(llama: tuple, tmp_path: Path) -> None:
    stores = quiet(*llama, TEXTS, [3, -1], tmp_path)
    assert stores[3] is stores[-1]


def test_max_tokens_is_exact_and_takes_from_all_over(llama: tuple) -> None:
    texts = [(str(i), words(*range(i, i + 10))) for i in range(40)]
    state = torch.random.get_rng_state()
    store = quiet(*llama, texts, 0, max_tokens=95, batch_size=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(store) == 95
    assert store.complete
    sources = [int(store.source(d)) for d in range(store.n_documents)]
    assert len(sources) == 10
    assert max(sources) > 20
    assert torch.equal(quiet(*llama, texts, 0, max_tokens=95, batch_size=4).tensor(), store.tensor())
    other = quiet(*llama, texts, 0, max_tokens=95, batch_size=4, seed=1)
    assert [int(other.source(d)) for d in range(other.n_documents)] != sources


def test_without_a_seed_texts_are_read_as_needed(llama: tuple) -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield words(*range(taken, taken + 10))

    store = quiet(*llama, endless(), 0, max_tokens=30, batch_size=2, seed=None)
    assert len(store) == 30
    assert taken == 3  # ten rows each
    assert store.tokens[0] == 3 + 1


def test_texts_from_files_and_records(llama: tuple, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    expected = quiet(*llama, [TEXTS[0]], 0).tensor()
    for texts in (tmp_path, str(tmp_path / "a.txt"), [tmp_path / "a.txt"], [{"text": TEXTS[0]}], [("name", TEXTS[0])]):
        assert torch.equal(quiet(*llama, texts, 0).tensor(), expected)
    with pytest.raises(FileNotFoundError, match="given in a list"):
        quiet(*llama, TEXTS[0], 0)
    for wrong in (3, ("a", 3), {"body": "x"}):
        with pytest.raises(TypeError, match=r"texts\[1\] must be a string"):
            quiet(*llama, [TEXTS[0], wrong], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk(llama: tuple, tmp_path: Path, dtype: torch.dtype) -> None:
    full = quiet(*llama, TEXTS, 1)
    store = quiet(*llama, TEXTS, 1, tmp_path, dtype=dtype)
    assert ActivationStore(tmp_path).dtype == dtype
    assert torch.equal(store.tensor(dtype), full.tensor().to(dtype))


def test_a_bf16_model(model: Any, tokenizer: Any) -> None:
    model.to(torch.bfloat16)
    store = quiet(model, tokenizer, TEXTS[3:4], 1)
    assert torch.equal(store.tensor(), hidden_states_of(model, [store.document_tokens(0)], 1)[0][1:].float())


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])  # the last one's square is not finite
def test_rows_that_are_not_finite_are_left_out_of_every_layer(model: Any, tokenizer: Any, value: float) -> None:
    clean = quiet(model, tokenizer, TEXTS, [0, 1], seed=None)
    assert clean[0].meta["nonfinite_rows"] == 0
    token = 3 + 7
    seen: dict[str, Tensor] = {}

    def poison(module: nn.Module, args: Any, output: Any) -> Any:
        states = hidden_states(output).clone()
        states[seen["tokens"] == token, 0] = value
        return with_hidden_states(output, states)

    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0]))
    model.model.layers[1].register_forward_hook(poison)
    with pytest.warns(UserWarning, match="activations were not finite"):
        stores = quiet(model, tokenizer, TEXTS, [0, 1], seed=None)
    keep = clean[0].tokens != token
    assert int((~keep).sum()) > 1
    for layer in (0, 1):
        assert stores[layer].meta["nonfinite_rows"] == int((~keep).sum())
        assert torch.equal(stores[layer].tokens, clean[layer].tokens[keep])
        assert torch.equal(stores[layer].tensor(), clean[layer].tensor()[keep])


def test_a_model_that_gives_nothing_finite(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="hold no token to keep"):
        quiet(model, tokenizer, TEXTS, 1, tmp_path)
    assert not ActivationStore(tmp_path).complete


def test_overflow_of_the_dtype_on_disk_counts_as_not_finite(model: Any, tokenizer: Any) -> None:
    model.model.embed_tokens.weight.data[3 + 2] = 1e6
    with pytest.warns(UserWarning, match="1 activations were not finite in torch.float16"):
        store = quiet(model, tokenizer, [words(1, 2, 3)], 0, dtype=torch.float16)
    assert store.tokens.tolist() == [3 + 1, 3 + 3]


@pytest.mark.parametrize("seed", [0, 1])
def test_windows_of_similar_lengths_share_a_pass(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 33, (200,), generator=generator).tolist()
    most = 4 * 32
    passes = similar_lengths(lengths, most)
    assert sorted(i for chosen in passes for i in chosen) == list(range(200)), "each window once"
    padded = [len(chosen) * max(lengths[i] for i in chosen) for chosen in passes]
    assert max(padded) <= most
    assert all(n - sum(lengths[i] for i in chosen) <= most // 64 for n, chosen in zip(padded, passes)), "little padding"
    assert list(map(len, similar_lengths([7] * 50, 35))) == [5] * 10, "full passes, where lengths are equal"


def test_rows_come_in_the_order_of_the_texts_however_windows_are_put_together(llama: tuple) -> None:
    store = quiet(*llama, TEXTS + LONG, 1, context=9, batch_size=2, seed=None, skip_first=0, drop_special=False)
    alone = quiet(*llama, TEXTS + LONG, 1, context=9, batch_size=1000, seed=None, skip_first=0, drop_special=False)
    assert torch.equal(store.tokens, alone.tokens)
    torch.testing.assert_close(store.tensor(), alone.tensor(), rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was(model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[2].eval()
    flags, before = [m.training for m in model.modules()], hooks(model)
    quiet(model, tokenizer, TEXTS, 1)
    assert [m.training for m in model.modules()] == flags
    assert hooks(model) == before
    assert model(torch.tensor([[5, 6]])).logits.requires_grad  # and trainable: nothing of inference mode is left
    model(torch.tensor([[5, 6]])).logits.sum().backward()


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_after_a_failure(model: Any, tokenizer: Any, tmp_path: Path, failure: type) -> None:
    model.train()
    passes = 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 12:  # the second group of windows
            raise failure("on purpose")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    before = hooks(model)
    with pytest.raises(failure, match="on purpose"):
        quiet(model, tokenizer, LONG, 2, tmp_path, context=8, batch_size=2)
    assert all(m.training for m in model.modules())
    assert hooks(model) == before
    store = ActivationStore(tmp_path)
    assert not store.complete

    handle.remove()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        quiet(model, tokenizer, TEXTS, 2, tmp_path)
    assert quiet(model, tokenizer, TEXTS, 2, tmp_path, overwrite=True).complete


def test_a_temporary_store_lives_as_long_as_its_object(llama: tuple) -> None:
    store = quiet(*llama, TEXTS, 0)
    folder = store.folder
    batches = store.batches(5)
    del store
    gc.collect()
    assert folder.exists(), "the batches still need it"
    assert sum(len(b) for b in batches) > 0
    del batches
    gc.collect()
    assert not folder.exists()


def test_model_and_tokenizer_from_a_folder(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    expected = quiet(model, tokenizer, TEXTS, 1, device="cpu")
    for name in (tmp_path / "lm", str(tmp_path / "lm")):
        for also in (None, name):
            store = quiet(name, also, TEXTS, 1, device="cpu")
            assert torch.equal(store.tensor(), expected.tensor())
    assert (store.meta["model"], store.meta["tokenizer"]) == ("local:lm", "local:lm")
    assert store.meta["model_fingerprint"] == expected.meta["model_fingerprint"] == language_model.fingerprint(model)
    assert str(tmp_path) not in (store.folder / "manifest.json").read_text()
    for wrong in (b"bytes", 3, [tokenizer]):
        with pytest.raises(TypeError, match="tokenizer must be one of transformers"):
            quiet(model, wrong, TEXTS, 1)
    with pytest.raises(TypeError, match="tokenizer must be given"):
        quiet(model, None, TEXTS, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 0}, ValueError, "context must be an integer >= 1, got 0"),
        ({"context": 1}, ValueError, "context must be at least 2"),
        ({"context": 65, "texts": [words(*range(64))]}, ValueError, "context must be at most 64.* a window has 65"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"skip_first": -1}, ValueError, "skip_first"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"layer": 4}, IndexError, r"layer must be in \[-4, 4\), got 4"),
        ({"layer": []}, ValueError, "layer must name at least one"),
        ({"layer": "model.layers.9"}, ValueError, "no module 'model.layers.9'"),
        ({"layer": "model.layers"}, ValueError, "'model.layers' of LlamaForCausalLM is not called as a module"),
        (
            {"layer": "model.rotary_emb"},
            ValueError,
            r"'model.rotary_emb' of LlamaForCausalLM puts out shape \(1, 3, 8\)",
        ),
        ({"layer": "1.0"}, ValueError, "no module '1.0'; give an index, or a module path"),
        ({"layer": 1.0}, TypeError, r"layer must be an index or a module path, got 1.0; give 1"),
        ({"layer": True}, TypeError, "layer must be an index or a module path, got True"),
        ({"layer": [0, 2.0]}, TypeError, "got 2.0; give 2"),
        ({"texts": []}, ValueError, "texts hold no token to keep"),
        ({"texts": ["", "   ", "</s>"]}, ValueError, "texts hold no token to keep"),
        ({"dtype": torch.float64}, ValueError, "dtype must be one of"),
    ],
)
def test_bad_arguments(model: Any, tokenizer: Any, tmp_path: Path, options: dict, error: type, message: str) -> None:
    arguments: dict[str, Any] = {"texts": TEXTS, "layer": 0, "context": 8, "out": tmp_path / "s", **options}
    with pytest.raises(error, match=message):
        quiet(model, tokenizer, **arguments)
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert hooks(model) == [0] * len(hooks(model))


def test_layers_are_named_in_any_way(model: Any, tokenizer: Any) -> None:
    expected = quiet(model, tokenizer, TEXTS, 2)
    for layer in ("2", np.int64(2), torch.tensor(2), -2):
        store = quiet(model, tokenizer, TEXTS, layer)
        assert store.meta["layer"] == "model.layers.2"
        assert torch.equal(store.tensor(), expected.tensor())
        assert torch.equal(torch.cat(list(stream(model, tokenizer, TEXTS, layer))), expected.tensor())
    for layers in ([1, "2"], np.array([1, 2]), torch.tensor([1, 2]), (np.int64(1), torch.tensor(2))):
        stores = quiet(model, tokenizer, TEXTS, layers)
        assert list(stores) == ([1, "2"] if isinstance(layers, list) else [1, 2])
        assert torch.equal(list(stores.values())[1].tensor(), expected.tensor())


def test_a_tokenizer_that_does_not_fit(model: Any, tokenizer: Any) -> None:
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ValueError, match=f"tokenizer gives token {VOCABULARY}, the model knows {VOCABULARY}"):
        quiet(model, tokenizer, ["w1 extra"], 0)


def test_the_tokens_of_a_real_model_decode_to_the_text() -> None:
    model, tokenizer = tiny_lm.load()
    text = "def read(path):\n    with open(path) as file:\n        return file.read()\n"
    store = quiet(model, tokenizer, [("reader.py", text)], 2)
    assert tokenizer.decode(store.document_tokens(0).tolist(), skip_special_tokens=True) == text
    row = store.tokens.tolist().index(tokenizer(" open", add_special_tokens=False)["input_ids"][0])
    tokens, at = store.context(row, before=3, after=3)
    assert tokenizer.decode(tokens[at]) == " open"
    assert tokenizer.decode(tokens) in text
    assert store.source(store.document(row)) == "reader.py"
    assert store.n_features == model.config.hidden_size


def test_text_from_a_chat_template_has_one_bos(lm: tuple) -> None:
    model, tokenizer, bos = lm
    texts = [templated(tokenizer, words(*range(20)))]
    options = {"context": 8, "skip_first": 0, "drop_special": False, "seed": None}
    store = quiet(model, tokenizer, texts, 0, **options)
    documents = [store.document_tokens(d).tolist() for d in range(store.n_documents)]
    assert documents[0][:2] == [BOS, 3]
    body = [token for document in documents for token in document[document[0] == BOS :]]
    assert body == [*range(3, 23), EOS]
    assert [document[0] == BOS for document in documents] == [True] + [bos] * (len(documents) - 1)
    if bos:
        plain = quiet(model, tokenizer, [words(*range(20)) + "</s>"], 0, **options)
        assert torch.equal(store.tokens, plain.tokens)
        assert torch.equal(store.tensor(), plain.tensor())


def test_what_is_no_texts_is_refused_before_the_model_works(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    for texts in (["texts"], [*TEXTS, b"bytes"], b"bytes", {"text": TEXTS}):
        for call in (quiet, stream):
            with pytest.raises((TypeError, ValueError), match=r"^texts"):
                call(model, tokenizer, texts, 0)
    with pytest.raises(TypeError, match=r"texts\[2\] must be a string"):
        quiet(model, tokenizer, iter([TEXTS[0], TEXTS[1], {"body": TEXTS[2]}]), 0, tmp_path, batch_size=1)
    assert not passes
    with pytest.raises(ValueError, match="buffer_size must be an integer >= 1, got 0"):
        quiet(model, tokenizer, TEXTS, 0, buffer_size=0)


def test_a_harvest_that_fails_leaves_nothing_and_warns_of_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, tokenizer = make_model("llama").eval(), make_tokenizer(bos=True)
    used = iter(TEXTS)
    assert list(used)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"texts hold no token to keep: .* \(an iterator can be read only once\)"):
            harvest(model, tokenizer, used, [0, 1], progress=False)
        gc.collect()
    assert not list(tmp_path.iterdir())

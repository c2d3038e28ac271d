"""Harvested rows are the model's hidden states, to the bit, and the model is left as it was."""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import accumulate, count, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mfa_kernels import harvest
from mfa_kernels.common import locks
from mfa_kernels.common.locks import LOCK
from mfa_kernels.data import ActivationStore, ActivationStoreWriter, language_model
from mfa_kernels.data.harvest import stream
from mfa_kernels.data.language_model import hidden_states, with_hidden_states

pytestmark = pytest.mark.usefixtures("one_thread")  # these models are too small for more

BOS, EOS, UNKNOWN, WORDS = 0, 1, 2, 40
VOCABULARY = 3 + WORDS


def make_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """One token per word w0 ... w39; with `bos`, "<s>" in front of every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN, **{f"w{i}": 3 + i for i in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def templated(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """A conversation of one turn, as a template writes it: with the BOS token's text."""
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)


def make_model(kind: str, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            config: Any = LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
            )
            return LlamaForCausalLM(config)
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, n_positions=64)
        return GPT2LMHeadModel(config)


def words(*numbers: int) -> str:
    return " ".join(f"w{n % WORDS}" for n in numbers)


TEXTS = [words(*range(i, i + 3 + 5 * i)) for i in range(6)]  # 3 to 28 words
FOUR = (("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False))


@pytest.fixture(params=FOUR, ids=[f"{kind}-{'bos' if bos else 'plain'}" for kind, bos in FOUR])
def lm(request: pytest.FixtureRequest) -> tuple[Any, PreTrainedTokenizerFast, bool]:
    kind, bos = request.param
    return make_model(kind), make_tokenizer(bos), bos


@pytest.fixture
def llama() -> tuple[Any, PreTrainedTokenizerFast]:
    return make_model("llama"), make_tokenizer(bos=True)


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


def quiet(*args: Any, **options: Any) -> Any:
    return harvest(*args, progress=False, **options)


@pytest.mark.parametrize("layer", [0, 2])
def test_rows_equal_the_hidden_states_of_transformers(lm: tuple, layer: int) -> None:
    model, tokenizer, _ = lm
    store = quiet(model, tokenizer, TEXTS, layer, context=8, batch_size=4)
    documents = [store.document_tokens(d) for d in range(store.n_documents)]
    assert len({len(d) for d in documents}) > 2, "no padding is exercised"
    assert store.n_documents > 8
    row = 0
    for start in range(0, len(documents), 4):
        batch = documents[start : start + 4]
        for number, states in enumerate(hidden_states_of(model, batch, layer), start):
            # Every word but the first position, which is BOS where there is one.
            for position in range(1, len(documents[number])):
                assert (store.document(row), store.position(row)) == (number, position)
                assert torch.equal(store.rows(torch.tensor([row]))[0], states[position])
                row += 1
            alone = hidden_states_of(model, [documents[number]], layer)[0]
            torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-5)
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


def test_special_tokens_and_first_positions_are_dropped(llama: tuple) -> None:
    model, tokenizer = llama
    text = "w1 w2 </s> w3 nonsense w4"
    kept = quiet(model, tokenizer, [text], 0, skip_first=2)
    assert kept.tokens.tolist() == [5, 6, 7]
    assert [kept.position(i) for i in range(3)] == [2, 4, 6]
    everything = quiet(model, tokenizer, [text], 0, skip_first=0, drop_special=False)
    assert everything.tokens.tolist() == [BOS, 4, 5, EOS, 6, UNKNOWN, 7]
    assert torch.equal(everything.rows(torch.tensor([2, 4, 6])), kept.tensor())


def test_the_forward_pass_stops_after_the_last_layer(llama: tuple) -> None:
    model, tokenizer = llama
    called: list[int] = []
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, i=i: called.append(i))
    model.lm_head.register_forward_pre_hook(lambda *_: called.append(99))
    quiet(model, tokenizer, TEXTS[:2], 1)
    assert called == [0, 1]
    called.clear()
    quiet(model, tokenizer, TEXTS[:2], [2, 0])
    assert called == [0, 1, 2]


def test_several_layers_in_one_pass(llama: tuple, tmp_path: Path) -> None:
    model, tokenizer = llama
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
    assert taken == 4  # two batches of two
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


def test_a_bf16_model(llama: tuple) -> None:
    model, tokenizer = llama
    model.to(torch.bfloat16)
    store = quiet(model, tokenizer, TEXTS[3:4], 1)
    assert torch.equal(store.tensor(), hidden_states_of(model, [store.document_tokens(0)], 1)[0][1:].float())


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])  # the last one's square is not finite
def test_rows_that_are_not_finite_are_left_out_of_every_layer(llama: tuple, value: float) -> None:
    model, tokenizer = llama
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


def test_a_model_that_gives_nothing_finite(llama: tuple, tmp_path: Path) -> None:
    model, tokenizer = llama
    model.model.layers[1].mlp.down_proj.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="hold no token to keep"):
        quiet(model, tokenizer, TEXTS, 1, tmp_path)
    assert not ActivationStore(tmp_path).complete


def test_overflow_of_the_dtype_on_disk_counts_as_not_finite(llama: tuple) -> None:
    model, tokenizer = llama
    model.model.embed_tokens.weight.data[3 + 2] = 1e6
    with pytest.warns(UserWarning, match="1 activations were not finite in torch.float16"):
        store = quiet(model, tokenizer, [words(1, 2, 3)], 0, dtype=torch.float16)
    assert store.tokens.tolist() == [3 + 1, 3 + 3]


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_the_model_is_left_as_it_was(llama: tuple) -> None:
    model, tokenizer = llama
    model.train()
    model.model.layers[2].eval()
    flags, before = [m.training for m in model.modules()], hooks(model)
    quiet(model, tokenizer, TEXTS, 1)
    assert [m.training for m in model.modules()] == flags
    assert hooks(model) == before
    assert model(torch.tensor([[5, 6]])).logits.requires_grad  # and trainable: nothing of inference mode is left
    model(torch.tensor([[5, 6]])).logits.sum().backward()


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_left_as_it_was_after_a_failure(llama: tuple, tmp_path: Path, failure: type) -> None:
    model, tokenizer = llama
    model.train()
    passes = 0

    def fail(module: nn.Module, args: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise failure("on purpose")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    before = hooks(model)
    with pytest.raises(failure, match="on purpose"):
        quiet(model, tokenizer, TEXTS, 2, tmp_path, context=8, batch_size=2)
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


def test_model_and_tokenizer_from_a_folder(llama: tuple, tmp_path: Path) -> None:
    model, tokenizer = llama
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
def test_bad_arguments(llama: tuple, tmp_path: Path, options: dict, error: type, message: str) -> None:
    model, tokenizer = llama
    arguments: dict[str, Any] = {"texts": TEXTS, "layer": 0, "context": 8, "out": tmp_path / "s", **options}
    with pytest.raises(error, match=message):
        quiet(model, tokenizer, **arguments)
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert hooks(model) == [0] * len(hooks(model))


def test_layers_are_named_in_any_way(llama: tuple) -> None:
    model, tokenizer = llama
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


def test_a_tokenizer_that_does_not_fit(llama: tuple) -> None:
    model, tokenizer = llama
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ValueError, match=f"tokenizer gives token {VOCABULARY}, the model knows {VOCABULARY}"):
        quiet(model, tokenizer, ["w1 extra"], 0)


def test_the_tokens_of_a_real_model_decode_to_the_text() -> None:
    from mfa_kernels.data import tiny_lm

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


LONG = [words(*range(i, i + 20 + i % 7)) for i in range(30)]
CUT = {"context": 9, "batch_size": 3, "rows_per_shard": 40}


class CutOff(Exception):
    pass


def cut_off_after(writes: int, patch: pytest.MonkeyPatch) -> None:
    """The process 'dies' before it writes another manifest; a shard that the manifest lacks may be there."""
    whole, left = ActivationStoreWriter._write_manifest, [writes]

    def write(self: ActivationStoreWriter, complete: bool) -> None:
        if not left[0]:
            raise CutOff
        left[0] -= 1
        whole(self, complete)

    patch.setattr(ActivationStoreWriter, "_write_manifest", write)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("max_tokens", [None, 333])
def test_cut_off_anywhere_it_goes_on_to_the_same_files(
    llama: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int | None
) -> None:
    model, tokenizer = llama
    options = {**CUT, "max_tokens": max_tokens}
    whole = quiet(model, tokenizer, LONG, [0, 2], tmp_path / "whole", **options)
    assert len(whole[0].shards) > 8
    assert max_tokens is None or len(whole[0]) == 333
    cuts = 0
    while True:
        with monkeypatch.context() as patch:
            cut_off_after(3, patch)  # two stores begin with a manifest each: one more shard in each life
            try:
                quiet(model, tokenizer, LONG, [0, 2], tmp_path / "cut", resume=True, **options)
            except CutOff:
                cuts += 1
                continue
        break
    assert cuts > 8
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert "progress" not in (tmp_path / "cut" / "model.layers.0" / "manifest.json").read_text()


def test_going_on_the_model_reads_only_what_is_missing(
    llama: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = llama
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    quiet(model, tokenizer, LONG, 1, tmp_path / "whole", **CUT)
    total = len(passes)
    with monkeypatch.context() as patch:
        cut_off_after(7, patch)
        with pytest.raises(CutOff):
            quiet(model, tokenizer, LONG, 1, tmp_path / "cut", **CUT)
    passes.clear()
    quiet(model, tokenizer, LONG, 1, tmp_path / "cut", resume=True, **CUT)
    assert 0 < len(passes) < total * 3 // 4
    passes.clear()
    quiet(model, tokenizer, LONG, 1, tmp_path / "cut", resume=True, **CUT)
    assert not passes, "it is complete"
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_rows_that_are_not_finite_are_counted_once(
    llama: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = llama
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        quiet(model, tokenizer, LONG, 0, tmp_path / "whole", **CUT)
    with monkeypatch.context() as patch:
        cut_off_after(3, patch)
        with pytest.raises(CutOff):
            quiet(model, tokenizer, LONG, 0, tmp_path / "cut", **CUT)
    with pytest.warns(UserWarning, match="not finite"):
        quiet(model, tokenizer, LONG, 0, tmp_path / "cut", resume=True, **CUT)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.fixture
def cut(llama: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of four shards that is not complete."""
    with monkeypatch.context() as patch:
        cut_off_after(5, patch)
        with pytest.raises(CutOff):
            quiet(*llama, LONG, 1, tmp_path, **CUT)
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "activations-00002.safetensors: this shard is in the manifest"),
        (lambda path: path.write_bytes(b"x"), ValueError, "activations-00002.safetensors: 1 bytes found"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
            ValueError,
            "activations-00002.safetensors: corrupt",
        ),
    ],
    ids=["missing", "truncated", "corrupt"],
)
def test_damaged_shards_are_reported_by_name(
    llama: tuple, cut: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(cut / "activations-00002.safetensors")
    with pytest.raises(error, match=message):
        quiet(*llama, LONG, 1, cut, resume=True, **CUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 8}, "context = 8, there 9"),
        ({"batch_size": 4, "seed": 1}, "batch_size = 4, there 3; seed = 1, there 0"),
        ({"dtype": torch.bfloat16}, "dtype = 'torch.bfloat16', there 'torch.float32'"),
        ({"rows_per_shard": 50}, "rows_per_shard = 50, there 40"),
        ({"layer": 0}, "layer = 'model.layers.0', there 'model.layers.1'"),
        ({"texts": [*LONG[:-1], "w1"]}, "windows of texts are not those of the stores"),
    ],
)
def test_what_differs_is_named(llama: tuple, cut: Path, change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"texts": LONG, "layer": 1, **CUT, **change}
    with pytest.raises(ValueError, match=message):
        quiet(*llama, options.pop("texts"), options.pop("layer"), cut, resume=True, **options)


def test_what_a_killed_process_left_is_removed(llama: tuple, cut: Path) -> None:
    names = [".activations-00009.safetensors.0af.tmp", ".manifest.json.0af.tmp", ".tmpK3eXbq"]
    for name in [*names, ".mine"]:
        (cut / name).write_text("")
    quiet(*llama, LONG, 1, cut, resume=True, **CUT)
    assert {path.name for path in cut.iterdir() if path.name.startswith(".")} == {".mine", LOCK}


def edited(folder: Path, **changes: Any) -> None:
    """The manifest of a store as earlier versions wrote it; None takes a key away."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("checksum", None)
    manifest["meta"] = {key: value for key, value in {**manifest["meta"], **changes}.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_store_of_an_earlier_version_with_paths_goes_on(llama: tuple, tmp_path: Path) -> None:
    model, tokenizer = llama
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    lm = str(tmp_path / "lm")
    quiet(lm, None, LONG, 1, tmp_path / "store", **CUT)
    before = {"model": lm, "tokenizer": lm, "model_fingerprint": None, "weights_fingerprint": None}
    edited(tmp_path / "store", **before)
    assert quiet(lm, None, LONG, 1, tmp_path / "store", resume=True, **CUT).complete
    edited(tmp_path / "store", model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="other settings: here model = 'local:lm', there 'local:other'"):
        quiet(lm, None, LONG, 1, tmp_path / "store", resume=True, **CUT)


def test_resume_needs_the_same_weights(llama: tuple, tmp_path: Path) -> None:
    """Of two models of one name and size."""
    model, tokenizer = llama
    other = copy.deepcopy(model)
    assert language_model.weights_fingerprint(other) == language_model.weights_fingerprint(model)
    with torch.no_grad():
        other.model.norm.weight[3] += 0.5
    quiet(model, tokenizer, LONG, 1, tmp_path, **CUT)
    assert quiet(model, tokenizer, LONG, 1, tmp_path, resume=True, **CUT).complete
    with pytest.raises(ValueError, match="resume: .* was written with other settings: here weights_fingerprint = "):
        quiet(other, tokenizer, LONG, 1, tmp_path, resume=True, **CUT)


def test_resume_needs_a_folder_and_spares_it(llama: tuple, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it needs out"):
        quiet(*llama, TEXTS, 1, resume=True)
    with pytest.raises(ValueError, match="it needs no overwrite"):
        quiet(*llama, TEXTS, 1, tmp_path, resume=True, overwrite=True)


def test_a_stream_gives_the_rows_of_a_harvest(llama: tuple) -> None:
    model, tokenizer = llama
    model.train()
    options = {"context": 9, "batch_size": 3}
    expected = quiet(model, tokenizer, LONG, 1, **options).tensor()
    batches = []
    for batch in stream(model, tokenizer, LONG, 1, **options):
        assert model.training, "between two batches the model is as it was"
        assert not any(module._forward_hooks for module in model.modules())
        batches.append(batch)
    assert len(batches) > 10
    assert torch.equal(torch.cat(batches), expected)
    first = torch.cat(list(stream(model, tokenizer, LONG, 1, max_tokens=50, **options)))
    assert torch.equal(first, expected[:50])
    batches = list(stream(model, tokenizer, LONG, [0, -2, "model.layers.1"], max_tokens=50, **options))
    assert all(list(batch) == [0, -2, "model.layers.1"] for batch in batches)
    for layer in (0, 1, 2):
        alone = list(stream(model, tokenizer, LONG, layer, max_tokens=50, **options))
        together = [batch[{0: 0, 1: "model.layers.1", 2: -2}[layer]] for batch in batches]
        assert len(alone) == len(together) > 2
        assert all(torch.equal(a, b) for a, b in zip(alone, together))
    with pytest.raises(ValueError, match="layer must name at least one layer"):
        stream(model, tokenizer, LONG, [])
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        stream(model, tokenizer, LONG, 1, batch_size=0)
    with pytest.raises(IndexError, match="layer"):
        stream(model, tokenizer, LONG, 9)


def test_fit_while_harvesting(monkeypatch: pytest.MonkeyPatch) -> None:
    from mfa_kernels import fit
    from mfa_kernels.data.language_model import load_language_model
    from mfa_kernels.fitting import preparation

    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 1500)
    model, tokenizer = load_language_model(None)
    texts = [f"def function_{i}(self, x):\n    return self.value_{i % 7} + {i} * x\n\n" * 4 for i in range(60)]
    options = {"context": 64, "batch_size": 4, "max_tokens": 4000}

    def fitted(batches: Iterator[Tensor], **more: Any) -> Any:
        return fit(batches, 8, 2, method="auto", held_out=0.0, batch_size=300, progress=False, **more)

    mfa = fitted(stream(model, tokenizer, texts, 1, **options))
    assert mfa.fit_report.method == "online"
    batches = list(stream(model, tokenizer, texts, 1, **options))
    head = next(rows for rows in accumulate(map(len, batches)) if rows >= 1500)
    assert mfa.fit_report.best_step == -(-(4000 - head) // 300)
    later = torch.cat(batches)[1800:]
    assert mfa(later) < fitted(iter(batches), epochs=0)(later) - 1, "the start has not seen these"
    assert torch.equal(torch.cat(batches), quiet(model, tokenizer, texts, 1, **options).tensor())
    again = fitted(iter(batches))
    assert all(torch.equal(a, b) for a, b in zip(mfa.state_dict().values(), again.state_dict().values()))


def test_fit_several_layers_while_harvesting(monkeypatch: pytest.MonkeyPatch) -> None:
    import mfa_kernels
    from mfa_kernels.data.language_model import load_language_model
    from mfa_kernels.fitting import preparation

    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 1000)
    assert mfa_kernels.stream is stream
    model, tokenizer = load_language_model(None)
    passes = []
    model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    texts = [f"def function_{i}(self, x):\n    return self.value_{i % 7} + {i} * x\n\n" * 4 for i in range(40)]
    options = {"context": 64, "batch_size": 4, "max_tokens": 2500}
    fits = {
        "early": {"layer": 1, "n_components": 8, "rank": 2},
        "late": {"layer": 3, "n_components": 8, "rank": 2},
        "large": {"layer": 3, "n_components": 12, "rank": 3},
    }
    common: dict[str, Any] = {"batch_size": 250, "progress": False}
    mixtures = mfa_kernels.fit_many(stream(model, tokenizer, texts, [1, 3], **options), fits, **common)
    assert len(passes) == len(list(stream(model, tokenizer, texts, 0, **options)))
    for name, own in fits.items():
        assert mixtures[name].fit_report.history[-1]["step"] >= 3
        layer = own.pop("layer")
        alone = mfa_kernels.fit(stream(model, tokenizer, texts, layer, **options), **own, **common)
        assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), mixtures[name].state_dict().values()))


def test_a_folder_that_is_written_to_is_refused_before_the_texts_are_read(
    llama: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    taken: list[str] = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            taken.append(text)
            yield text

    with locks.alone(tmp_path / "model.layers.2"):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(TimeoutError, match=r"model\.layers\.2: another process.* is writing to this folder"):
                quiet(*llama, texts(), [0, 2], tmp_path, **options)
    assert not taken
    quiet(*llama, TEXTS, [0, 2], tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        quiet(*llama, texts(), [0, 2], tmp_path)
    assert not taken


def test_a_complete_store_is_given_back_without_a_lock(llama: tuple, tmp_path: Path) -> None:
    quiet(*llama, TEXTS, 0, tmp_path)
    (tmp_path / LOCK).unlink()  # as in a folder that may only be read
    assert quiet(*llama, TEXTS, 0, tmp_path, resume=True).complete
    assert not (tmp_path / LOCK).exists()


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


def numbered(taken: list[int]) -> Iterator[str]:
    """An endless stream that counts what is taken of it."""
    for i in count():
        taken.append(i)
        yield words(i, *range(9))  # with BOS and less of the first position, ten rows


class Streamed:
    """As `datasets.IterableDataset`: rows that are iterated, again and again."""

    def __init__(self, taken: list[int]) -> None:
        self.taken = taken

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i, text in enumerate(numbered(self.taken)):
            yield {"text": text, "id": i}


@pytest.mark.parametrize("kind", ["generator", "IterableDataset", "torch"])
def test_an_endless_iterable_ends_with_max_tokens(llama: tuple, tmp_path: Path, kind: str) -> None:
    class OfTorch(torch.utils.data.IterableDataset):
        def __init__(self, taken: list[int]) -> None:
            self.taken = taken

        def __iter__(self) -> Iterator[str]:
            return numbered(self.taken)

        def __len__(self) -> int:
            return 1 << 40

    make = {"generator": numbered, "IterableDataset": Streamed, "torch": OfTorch}[kind]
    options = {"max_tokens": 400, "batch_size": 4, "buffer_size": 50}
    taken: list[int] = []
    store = quiet(*llama, make(taken), 0, tmp_path / "a", **options)
    assert len(store) == 400
    assert store.meta["buffer_size"] == 50
    assert len(taken) == 50 + 40, "the buffer, and what is needed"
    numbers = [int(store.source(d).split()[1]) for d in range(store.n_documents)]
    assert len(set(numbers)) == 40
    assert numbers != sorted(numbers)
    assert max(numbers) > 60
    quiet(*llama, make([]), 0, tmp_path / "b", **options)
    assert files(tmp_path / "b") == files(tmp_path / "a")
    other = quiet(*llama, make([]), 0, seed=1, **options)
    assert not torch.equal(other.tokens, store.tokens)
    rows = torch.cat(list(stream(*llama, make([]), 0, **options)))
    assert torch.equal(rows, store.tensor())


def test_by_default_a_thousand_texts_are_buffered(llama: tuple) -> None:
    taken: list[int] = []
    quiet(*llama, numbered(taken), 0, max_tokens=100)
    assert len(taken) == 1000 + 16  # a batch


def test_a_buffer_larger_than_the_stream_gives_every_text_once(llama: tuple) -> None:
    store = quiet(*llama, islice(numbered([]), 30), 0, batch_size=4)
    sources = [store.source(d) for d in range(store.n_documents)]
    assert sorted(sources) == sorted(f"text {i}" for i in range(30))
    assert sources != sorted(sources, key=lambda name: int(name.split()[1]))
    small = quiet(*llama, islice(numbered([]), 30), 0, batch_size=4, buffer_size=7)
    assert sorted(small.source(d) for d in range(30)) == sorted(sources)
    assert [small.source(d) for d in range(30)] != sources


def test_the_order_of_sequences_is_that_of_earlier_versions(llama: tuple, tmp_path: Path) -> None:
    class Rows:  # as datasets.Dataset
        def __len__(self) -> int:
            return len(TEXTS)

        def __getitem__(self, i: int) -> dict[str, str]:
            return {"text": TEXTS[i]}

        def __iter__(self) -> Iterator[dict[str, str]]:
            return map(self.__getitem__, range(len(self)))

    expected = [f"text {i}" for i in torch.randperm(6, generator=torch.Generator().manual_seed(3)).tolist()]
    for texts in (TEXTS, tuple(TEXTS), Rows(), np.array(TEXTS)):
        store = quiet(*llama, texts, 0, seed=3, buffer_size=2)
        assert [store.source(d) for d in range(store.n_documents)] == expected
        assert "buffer_size" not in store.meta


def test_a_stream_that_was_cut_off_goes_on_to_the_same_files(
    llama: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**CUT, "max_tokens": 333, "buffer_size": 20}
    quiet(*llama, numbered([]), 1, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        cut_off_after(4, patch)
        with pytest.raises(CutOff):
            quiet(*llama, numbered([]), 1, tmp_path / "cut", **options)
    with pytest.raises(ValueError, match="buffer_size = 21, there 20"):
        quiet(*llama, numbered([]), 1, tmp_path / "cut", resume=True, **{**options, "buffer_size": 21})
    quiet(*llama, Streamed([]), 1, tmp_path / "cut", resume=True, **options)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_what_is_no_texts_is_refused_before_the_model_works(llama: tuple, tmp_path: Path) -> None:
    model, tokenizer = llama
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


def test_endless_texts_without_a_token_end(monkeypatch) -> None:
    monkeypatch.setattr("mfa_kernels.data.harvest._MOST_BARREN", 30)
    with pytest.raises(ValueError, match="texts: 30 in a row hold no token to keep"):
        harvest(make_model("llama"), make_tokenizer(bos=True), repeat(("empty", "")), 0, max_tokens=5)


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

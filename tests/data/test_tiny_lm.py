"""The package's own language model: its files, what it has learned, and the text it learned from."""

import math
import os

import pytest
import torch

from mfa_kernels.common import locks
from mfa_kernels.data import tiny_lm
from mfa_kernels.data.language_model import weights_in
from mfa_kernels.data.tiny_lm import corpus
from scripts import train_tiny_lm

CODE = '''class Stack:
    """A last-in, first-out list: \u00e9t\u00e9, \u03bb, \U0001f40d."""

    def pop(self, default=None):
\t\treturn self._items.pop() if self._items else default  # 0x1F
'''


@pytest.fixture(scope="module")
def loaded():
    return tiny_lm.load()


def nats_per_token(model, ids):
    """Returns the mean loss of predicting each of `ids` [tokens] from those before it."""
    with torch.no_grad():
        return float(model(input_ids=ids[None], labels=ids[None]).loss)


def held_out_ids(tokenizer, tokens):
    """Returns the first token ids, int64 [tokens], of every held-out text that is long enough."""
    texts = [text for _, text in corpus.stdlib_texts("held_out")]
    ids = [tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in texts]
    long = [row[:tokens] for row in ids if len(row) >= tokens]
    return long or pytest.skip("this Python has no standard library sources")


def test_size_and_parameters(loaded):
    model, tokenizer = loaded
    assert (tiny_lm.path() / "model.safetensors").stat().st_size <= 8_000_000
    assert sum(p.numel() for p in model.parameters()) <= 3_950_000
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert not model.training


def test_bfloat16_holds_the_same_weights(loaded):
    low = tiny_lm.load(torch.bfloat16)[0].state_dict()
    high = loaded[0].state_dict()
    assert {weights.dtype for weights in low.values()} == {torch.bfloat16}
    assert all(torch.equal(low[name].float(), high[name]) for name in high)


def test_generates_the_same_text_twice(loaded):
    model, tokenizer = loaded
    inputs = tokenizer("def __init__(self, ", return_tensors="pt")
    first, second = (model.generate(**inputs, max_new_tokens=24, do_sample=False) for _ in range(2))
    assert torch.equal(first, second)
    assert len(tokenizer.decode(first[0, inputs.input_ids.shape[1] :]).strip()) > 0


@pytest.mark.parametrize("text", [CODE, "", "   leading and trailing  \n\n", "\r\n\x00 any byte", "x" * 1000])
def test_tokenizer_round_trips(loaded, text):
    tokenizer = loaded[1]
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_padding_does_not_change_the_result(loaded):
    model, tokenizer = loaded
    texts = ["import os", "def main(argv=None):\n    parser = argparse.ArgumentParser()\n"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    alone = tokenizer(texts[0], return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits[0, batch.attention_mask[0].bool()]
        torch.testing.assert_close(together, model(**alone).logits[0], atol=1e-3, rtol=1e-3)


def test_held_out_loss_is_far_from_uniform(loaded):
    losses = [nats_per_token(loaded[0], ids) for ids in held_out_ids(loaded[1], 256)]
    assert sum(losses) / len(losses) < 4.0 < math.log(4096)


def test_every_position_is_trained(loaded):
    """At positions 256 to 511 the same tokens are predicted better than at 0 to 255, without the context."""
    late, early = 0.0, 0.0
    for ids in held_out_ids(loaded[1], 512):
        with torch.no_grad():
            logits = loaded[0](input_ids=ids[None]).logits[0]
        late += float(torch.nn.functional.cross_entropy(logits[256:-1], ids[257:]))
        early += nats_per_token(loaded[0], torch.cat([ids[:1], ids[256:]])) * 256 / 255
    assert late < early


def test_splits_are_disjoint_complete_and_deterministic():
    train, held_out, everything = (corpus.stdlib_texts(split) for split in ("train", "held_out", "all"))
    if not everything:
        pytest.skip("this Python has no standard library sources")
    assert train == corpus.stdlib_texts()
    assert sorted(train + held_out) == everything
    names = [name for name, _ in everything]
    assert len(set(names)) == len(names)
    assert 0 < len(held_out) < 0.1 * len(everything)
    assert not any("site-packages" in name or "_sysconfigdata" in name for name in names)
    tests = sum(len(text) for name, text in everything if name.startswith("test/"))
    assert tests <= corpus.TEST_SHARE * (sum(len(text) for _, text in everything) - tests)


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="held_out"):
        corpus.stdlib_texts("validation")


def test_tables_are_not_text():
    rows = "".join(f"    '\\x{i:02x}'  #  0x{i:02X} -> LETTER\n" for i in range(256))
    assert corpus._is_table(f"decoding_table = (\n{rows})\n")
    assert not corpus._is_table(CODE)


def test_a_missing_library_is_empty(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    assert corpus.stdlib_texts("all") == []


def test_help_topics_are_read_as_prose(monkeypatch, tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text("topics = {'a': 'One.', 'b': 'Two.', 'c': 'One.'}\n")
    (tmp_path / "latin.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "module.py").write_bytes(b"x = y\r\n")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    topics = [("pydoc_data/topics.py:a", "One."), ("pydoc_data/topics.py:b", "Two.")]
    assert corpus.stdlib_texts("all") == [("module.py", "x = y\n"), *topics]


def test_what_training_writes_is_loaded_again(loaded, tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = loaded
    for _ in range(2):  # the second time over what is there
        train_tiny_lm.save(tmp_path, model, Tokenizer.from_file(str(tiny_lm.path() / "tokenizer.json")), {"steps": 3})
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "training.json"}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **weights_in(torch.float32)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path)(CODE)["input_ids"] == tokenizer(CODE)["input_ids"]


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_one_process_trains_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    monkeypatch.setattr(train_tiny_lm, "stdlib_texts", lambda split: pytest.fail("the folder comes first"))
    with locks.alone(tmp_path), pytest.raises(TimeoutError, match=f"{tmp_path}: another process"):
        train_tiny_lm.main(["--out", str(tmp_path)])

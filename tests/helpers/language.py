"""A tokenizer with a token per word, and language models of four small layers that read it."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, UNKNOWN, WORDS = 0, 1, 2, 40
VOCABULARY = 3 + WORDS


def make_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """One token per word w0 ... w39; with `bos`, "<s>" in front of every text."""
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
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            )  # fmt: skip
            return LlamaForCausalLM(config)
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, n_positions=64)
        return GPT2LMHeadModel(config)


def words(*numbers: int) -> str:
    return " ".join(f"w{n % WORDS}" for n in numbers)

"""Trains the package's own small language model on the standard library: tokenizer, model, facts.

    python scripts/train_tiny_lm.py --minutes 35

A byte-level BPE tokenizer first, then a Llama of 3.9 million parameters by AdamW. The learning rate follows
the share of the time budget that is spent, so that it always ends at (almost) zero whatever the machine's
speed; the result therefore depends on that speed. Every file is written under a temporary name and renamed,
and the folder holds a loadable model from the first checkpoint on. One process at a time trains into a folder.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from mfa_kernels.common.files import atomic_path, atomic_save_safetensors, atomic_write_json
from mfa_kernels.common.locks import alone
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.data import tiny_lm
from mfa_kernels.data.tiny_lm.corpus import stdlib_texts

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"  # token ids 0, 1, 2
VOCABULARY = 4096
CONTEXT = 256  # tokens; every fourth step sees rows of LONG_CONTEXT, half as many of them
LONG_CONTEXT = 512
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
SEED = 0


def llama_config() -> transformers.LlamaConfig:
    """Returns the architecture: 3,877,632 parameters, 7.76 MB in bf16."""
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=480, max_position_embeddings=LONG_CONTEXT, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer (any text round-trips) that puts BOS before what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,  # leaves no room in the vocabulary for rulers such as "# -----------"
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Returns the token ids of all texts, each followed by EOS: int64 [tokens]."""
    end = [tokenizer.token_to_id(EOS)]
    ids = [np.array(e.ids + end) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return torch.from_numpy(np.concatenate(ids))


def rows_at(stream: Tensor, starts: Tensor, length: int) -> Tensor:
    """Returns rows of BOS and `length` tokens of the stream from each start: int64 [rows, 1 + length].

    Every row begins with BOS because that is how the tokenizer begins every text, also mid-file.
    """
    body = stream[starts[:, None] + torch.arange(length)]
    return torch.cat([torch.full((len(starts), 1), 1), body], dim=1)


def epochs(stream: Tensor, rows: int, generator: torch.Generator) -> Callable[[int], Tensor]:
    """Returns a function that gives the next batch: slices that tile the stream, in a new order every pass."""
    starts: dict[int, Tensor] = {}

    def next_batch(step: int) -> Tensor:
        length, count = (LONG_CONTEXT, rows // 2) if step % 4 == 3 else (CONTEXT, rows)
        if len(starts.get(length, ())) < count:
            # A new shift on each pass, so that rows do not break at the same places again.
            shift = int(torch.randint(length, (1,), generator=generator))
            tiles = torch.arange(shift, len(stream) - length, length)
            starts[length] = tiles[torch.randperm(len(tiles), generator=generator)]
        chosen, starts[length] = starts[length][:count], starts[length][count:]
        return rows_at(stream, chosen, length)

    return next_batch


def loss_of(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """Returns the mean next-token cross-entropy in nats over rows [rows, 1 + length]; BOS is only an input."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: Tensor, length: int) -> float:
    """Returns nats per token over a stream [tokens] cut into rows of `length` (a shorter end is left out)."""
    model.eval()
    starts = torch.arange(0, len(stream) - length + 1, length)
    losses = [loss_of(model, rows_at(stream, part, length)) * len(part) for part in starts.split(16)]
    model.train()
    return float(sum(losses) / len(starts))


def learning_rate(peak: float, step: int, spent: float) -> float:
    """Returns the rate: a linear warm-up by step times a cosine over `spent`, the budget's part used."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(spent, 1.0)))


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    with atomic_path(folder / "tokenizer.json") as path:
        tokenizer.save(str(path))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "bos_token": BOS, "eos_token": EOS,
        "model_max_length": LONG_CONTEXT, "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    atomic_write_json(folder / "tokenizer_config.json", config)


def save(folder: Path, model: transformers.LlamaForCausalLM, tokenizer: Tokenizer, facts: dict) -> None:
    """Writes the tokenizer, the weights as bf16 and the configs that transformers needs, old spellings and new."""
    save_tokenizer(folder, tokenizer)  # only now, so that it never stands next to the weights of an earlier run
    tied = {"lm_head.weight"}  # the same tensor as the embedding: stored once
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k not in tied}
    atomic_save_safetensors(weights, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config |= {"torch_dtype": "bfloat16", "rope_theta": 10000.0}  # transformers 4 reads these two
    config.pop("_name_or_path", None)
    atomic_write_json(folder / "config.json", config)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    atomic_write_json(folder / "generation_config.json", generation)
    atomic_write_json(folder / "training.json", facts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=35.0, help="wall-clock training budget")
    parser.add_argument("--out", type=Path, default=tiny_lm.path(), help="folder for the files")
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens in a batch")
    parser.add_argument("--peak", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0, help="at 1, 2, 4... times that")
    parser.add_argument("--no-autocast", action="store_true", help="for CPUs without bf16 products")
    parser.add_argument("--no-compile", action="store_true", help="for machines without a C++ compiler")
    args = parser.parse_args(argv)
    with alone(args.out):
        train(args)


def train(args: argparse.Namespace) -> None:
    """Trains into a folder that is locked."""
    torch.manual_seed(SEED)

    train_texts = [text for _, text in stdlib_texts("train")]
    held_texts = [text for _, text in stdlib_texts("held_out")]
    if not train_texts or not held_texts:
        raise SystemExit("this Python has no standard library sources to read")
    tokenizer = train_tokenizer(train_texts)
    stream, held_out = token_stream(tokenizer, train_texts), token_stream(tokenizer, held_texts)
    held_bytes = sum(len(text.encode()) for text in held_texts)
    print(f"{len(train_texts)} texts, {len(stream):,} tokens to train on, {len(held_out):,} held out")

    model = transformers.LlamaForCausalLM(llama_config()).train()
    parameters = sum(p.numel() for p in model.parameters())
    decayed = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]  # of the RMS norms: decay would pull them to zero
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.peak, betas=(0.9, 0.95), fused=True)
    fast: Any = model if args.no_compile else torch.compile(model, dynamic=False)
    next_batch = epochs(stream, args.rows, torch.Generator().manual_seed(SEED))

    def facts(steps: int, tokens: int) -> dict:
        minutes = (time.monotonic() - start) / 60
        nats = held_out_loss(model, held_out, CONTEXT)
        return {
            "parameters": parameters, "minutes": round(minutes, 1), "steps": steps, "tokens_seen": tokens,
            "tokens_in_corpus": len(stream), "passes": round(tokens / len(stream), 2),
            "held_out_tokens": len(held_out), "held_out_nats_per_token": round(nats, 4),
            "held_out_bits_per_byte": round(nats / math.log(2) * len(held_out) / held_bytes, 4),
            "uniform_nats_per_token": round(math.log(VOCABULARY), 4), "batch_tokens": args.rows * CONTEXT,
            "peak_learning_rate": args.peak, "seed": SEED, "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip

    start = time.monotonic()
    next_checkpoint, step, tokens, smooth = args.checkpoint_minutes, 0, 0, float("nan")
    layout = "{l_bar}{bar}| {n:.0f}/{total} s{postfix}"
    with progress_bar(total=round(args.minutes * 60), bar_format=layout, mininterval=1.0) as bar:
        while (spent := (time.monotonic() - start) / 60) < args.minutes:
            if spent >= next_checkpoint:
                now = facts(step, tokens)
                save(args.out, model, tokenizer, now | {"finished": False})
                bar.write(f"{now['minutes']} min: held-out loss {now['held_out_nats_per_token']:.3f}")
                next_checkpoint *= 2
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.peak, step, spent / args.minutes)
            rows = next_batch(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.no_autocast):
                loss = loss_of(fast, rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step, tokens = step + 1, tokens + rows[:, 1:].numel()
            smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
            seconds = time.monotonic() - start
            rate = tokens / seconds
            bar.set_postfix_str(f"step {step}, loss {smooth:.3f}, {rate:.0f} tokens/s", refresh=False)
            bar.update(min(seconds, bar.total) - bar.n)
    with torch.no_grad():  # measured on the values that are stored, not on finer ones
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    final = facts(step, tokens) | {"finished": True}
    final["held_out_nats_per_token_at_512"] = round(held_out_loss(model, held_out, LONG_CONTEXT), 4)
    save(args.out, model, tokenizer, final)
    print(json.dumps(final, indent=2))


if __name__ == "__main__":
    main()

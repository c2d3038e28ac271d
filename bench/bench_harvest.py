"""Harvesting against a plain loop over windows of one length: tokens that the model reads in a second.

    python -m bench.bench_harvest [--tokens 20000] [--rounds 3] [--dtype bfloat16]

The loop is the fastest that one would write by hand: the same texts one after the other, cut into windows of 256 tokens
without regard to where texts end, batches of --batch-size of them, the model's layers up to the one wanted, nothing
kept but the rows. Harvesting reads the texts as they are, most of them shorter, keeps their order, and writes a store.
The two take turns. SmolLM2-135M reads the texts of bench/real.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.activations import add_arguments
from bench.real import CONTEXT, Real
from mfa_kernels import harvest
from mfa_kernels.data.language_model import hidden_states, resolve_layer
from mfa_kernels.models import load_language_model


class _Enough(BaseException):
    """Ends a forward pass behind the layer."""


def windows_of(tokenizer: Any, texts: list[tuple[str, str]], most: int) -> torch.Tensor:
    """Returns windows of one length (n, CONTEXT) with `most` rows in all."""
    ids: list[int] = []
    for _, text in texts:
        ids += tokenizer(text)["input_ids"]
    count = min(len(ids) // CONTEXT, -(-most // (CONTEXT - 1)))
    return torch.tensor(ids[: count * CONTEXT]).view(count, CONTEXT)


@torch.no_grad()
def plain_loop(
    model: torch.nn.Module, layer: torch.nn.Module, windows: torch.Tensor, batch_size: int
) -> list[torch.Tensor]:
    """Returns the rows, without the first of each window."""
    rows: list[torch.Tensor] = []

    def keep(module: object, args: object, output: object) -> None:
        rows.append(hidden_states(output)[:, 1:].flatten(0, 1).clone())
        raise _Enough

    handle = layer.register_forward_hook(keep)
    try:
        for batch in windows.split(batch_size):
            with suppress(_Enough):
                model(input_ids=batch, use_cache=False)
    finally:
        handle.remove()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model")
    options = parser.parse_args()
    model, tokenizer = load_language_model("tiny_lm" if options.toy else "smollm2", getattr(torch, options.dtype))
    layer = 2 if options.toy else options.layer
    module = resolve_layer(model, layer)[1]
    texts = Real(options.layer, options.texts).chosen_texts(tokenizer, 2 * options.tokens)
    windows = windows_of(tokenizer, texts, options.tokens)
    print(f"layer {layer}, {options.dtype}, {torch.get_num_threads()} threads", flush=True)
    how = {"max_tokens": options.tokens, "context": CONTEXT, "batch_size": options.batch_size, "seed": None}
    rates: dict[str, list[float]] = {"plain loop": [], "harvest": []}
    for _ in range(options.rounds):
        began = time.perf_counter()
        plain_loop(model, module, windows, options.batch_size)
        rates["plain loop"].append(windows.numel() / (time.perf_counter() - began))
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            store = harvest(model, tokenizer, texts, layer, Path(folder) / "store", progress=False, **how)
            seconds = time.perf_counter() - began
            read = sum(len(store.document_tokens(document)) for document in range(store.n_documents))
            rates["harvest"].append(read / seconds)
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):.0f} tokens/s ({min(values):.0f} to {max(values):.0f})")
    ratios = [ours / plain for ours, plain in zip(rates["harvest"], rates["plain loop"])]
    print(f"harvest / plain loop: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()

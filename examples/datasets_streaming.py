"""A fit while a dataset streams by: nothing of it is kept but the statistics of the mixture.

    python examples/datasets_streaming.py                                          # a file that is made here
    python examples/datasets_streaming.py --dataset monology/pile-uncopyrighted --model gpt2

`stream` runs texts through the model and hands out batches of activations; `fit` reads such an iterator once.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _small import LAYER, TEXTS, parser

from mfa_kernels import fit, stream
from mfa_kernels.models import load_language_model


def texts(dataset: Any, column: str) -> Iterator[str]:
    """Yields the texts of a dataset as they come."""
    return (row[column] for row in dataset)


def main() -> None:
    import datasets

    options = parser(__doc__)
    options.add_argument("--dataset", help="of the hub; without it, a small file")
    options.add_argument("--column", default="text", help="that holds the texts")
    options.add_argument("--tokens", type=int, default=5000)
    given = options.parse_args()
    model, tokenizer = load_language_model(given.model)
    with tempfile.TemporaryDirectory() as folder:
        if given.dataset:
            found = datasets.load_dataset(given.dataset, split="train", streaming=True)
        else:
            file = Path(folder) / "texts.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
            found = datasets.load_dataset("json", data_files=str(file), split="train", streaming=True)
        batches = stream(model, tokenizer, texts(found, given.column), LAYER, max_tokens=given.tokens)
        mfa = fit(batches, n_components=16, rank=4)
    rows = mfa.fit_report.run["data"]["rows"]
    print(f"{rows:,} activations, read once: {mfa.fit_report.held_out_nll:.1f} nats per token on held-out ones")


if __name__ == "__main__":
    main()

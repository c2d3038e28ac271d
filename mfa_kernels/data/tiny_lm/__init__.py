"""The package's own small language model: a Llama of 3.9 million parameters, and its tokenizer.

It is what the demonstration and the tests read when no hub can be reached: a real `transformers` model,
trained by `scripts/train_tiny_lm.py` on real text, the standard library's own sources (`corpus.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def path() -> Path:
    """Returns the folder with the model's files, which is also a valid name for any `from_pretrained`."""
    return Path(__file__).resolve().parent


def load(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Returns (model, tokenizer) on the CPU, the model in eval mode with weights of `dtype`.

    The weights are stored as bf16, so float32 and bfloat16 hold the same values.
    """
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path(), local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path(), local_files_only=True)
    return model.to(dtype).eval(), tokenizer

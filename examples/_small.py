"""What the examples share: the small model, and a mixture of one of its layers."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from mfa_kernels import MFA, fit, harvest
from mfa_kernels.models import load_language_model

LAYER = 2
TEXTS = [inspect.getsource(module) for module in (argparse, inspect)]


def parser(text: str | None) -> argparse.ArgumentParser:
    """Returns a parser with --model."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="any that `load_language_model` takes; without it, the small one of the package")
    return made


def model_and_mixture(name: str | None = None) -> tuple[Any, Any, MFA]:
    """Returns a model, its tokenizer, and a mixture of its layer 2, fitted to 5,000 activations."""
    model, tokenizer = load_language_model(name)
    store = harvest(model, tokenizer, TEXTS, LAYER, max_tokens=5000)
    return model, tokenizer, fit(store, n_components=16, rank=4, epochs=3)

"""Language models: loading them, finding their layers, and text that they continue."""

from mfa_kernels.data.language_model import (
    continuation,
    decoder_layers,
    encoded,
    load_language_model,
    resolve_layer,
    tokenize,
)

__all__ = ["continuation", "decoder_layers", "encoded", "load_language_model", "resolve_layer", "tokenize"]

"""A text of the user's own: its tokens, each with the region that owns its activation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from mfa_kernels.data.harvest import read_tokens
from mfa_kernels.data.language_model import bos_prefix, positions_of, text_tokens
from mfa_kernels.explorer.texts import number

if TYPE_CHECKING:
    from mfa_kernels.explorer.explorer import Explorer

MOST_TOKENS = 256  # of a text, so that it is read in well under a second


@torch.no_grad()
def read(explorer: Explorer, text: str) -> dict[str, Any]:
    """Returns the tokens of a text with their regions; the model runs up to the mixture's layer.

    The model's first token is an attention sink, and harvested activations have none of it: it owns no region here
    either.
    """
    model, layer = explorer.steered()
    started = time.perf_counter()
    prefix = bos_prefix(explorer.tokenizer)
    tokens = text_tokens(explorer.tokenizer, text, prefix)
    most = min(MOST_TOKENS, positions_of(model) - len(prefix))
    truncated = len(tokens) > most
    tokens = tokens[:most]
    components, responsibilities = [-1] * len(tokens), [0.0] * len(tokens)
    if tokens and len(prefix) + len(tokens) > 1:
        with explorer.model_lock:
            states = read_tokens(model, [*prefix, *tokens], layer)
        code = explorer.mfa.code(states.to(explorer.mfa.means.device), top_k=1)
        own = slice(len(prefix), None)
        components = code.components[own, 0].tolist()
        responsibilities = code.responsibilities[own, 0].nan_to_num(0.0).tolist()
    if not prefix and tokens:
        components[0], responsibilities[0] = -1, 0.0
    lines = [
        {"text": piece, "component": k, "responsibility": number(r)}
        for piece, k, r in zip(explorer.texts.pieces(tokens), components, responsibilities)
    ]
    regions = {str(k): explorer.catalog.line(k) for k in sorted(set(components) - {-1})}
    return {"tokens": lines, "regions": regions, "truncated": truncated, "seconds": time.perf_counter() - started}

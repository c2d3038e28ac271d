"""Arguments of a forward pass, recognised by their kind: tokens, mask, positions and cache.

Names of arguments change from one release of transformers to the next (`past_key_values` became `cache`), so any
object that says how long it is counts as a cache, and the first tensor of their shape as the tokens. A word in the name
decides only where shapes cannot: masks and positions look like token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str)
# Encoder states and their mask, images and audio are not part of the sequence that is followed.
_FOREIGN = ("encoder_", "cross_", "pixel_", "image_", "video_", "audio_")


class Arguments(NamedTuple):
    """The arguments of a stack of decoder layers, or of `generate`.

    Attributes:
        inputs: token ids (B, T), or embeddings (B, T, D); None where there are none.
        mask: the padding or attention mask, as it was given.
        positions: position ids, (B or 1, T) or (axes, B, T).
        cache: keys and values (or states) of earlier passes.
        packed: the name of an argument that says that a row holds several sequences.
        unknown: the name of a tensor that might be a mask.
    """

    inputs: Tensor | None
    mask: Any = None
    positions: Tensor | None = None
    cache: Any = None
    packed: str | None = None
    unknown: str | None = None

    @property
    def tokens(self) -> int:
        """Returns T, or 0 where there are no inputs."""
        return 0 if self.inputs is None else self.inputs.shape[1]

    @property
    def has_embeddings(self) -> bool:
        return self.inputs is not None and self.inputs.is_floating_point()

    @property
    def before(self) -> int | None:
        """Returns the columns before the pass, by its mask or its positions (which asks the device), or None."""
        if self.mask_columns:
            return self.mask_columns - self.tokens
        return None if self.positions is None else int(self.positions.max()) + 1 - self.tokens

    @property
    def mask_columns(self) -> int:
        """Returns the number of columns of a mask (B, columns); 0 where there is no such mask."""
        return self.mask.shape[1] if isinstance(self.mask, Tensor) and self.mask.dim() == 2 else 0


def recognised(given: Mapping[str, Any]) -> Arguments:
    """Returns the arguments by their kind.

    Args:
        given: values by name, in the order of the signature; those of an encoder-decoder's decoder without "decoder_".
    """
    inputs, embeddings, mask, positions, cache, packed = None, None, None, None, None, None
    rest = []
    for name, value in given.items():
        if type(value) in _PLAIN or name.startswith(_FOREIGN):
            continue
        if name.startswith("cu_seq"):
            packed = packed or name
        elif "mask" in name and "head" not in name:
            mask = value if mask is None else mask
        elif not isinstance(value, Tensor):
            if cache is None and is_cache(name, value):
                cache = value
        elif "position" in name:
            positions = value if positions is None and value.dim() > 1 else positions
        elif value.is_floating_point():
            embeddings = value if embeddings is None and value.dim() == 3 else embeddings
        elif value.dim() == 2 and "type" not in name and name != "labels":
            if inputs is None and value.dtype in (torch.int64, torch.int32):
                inputs = value
            elif not name.endswith("ids"):
                rest.append(name)
    unknown = rest[0] if rest and mask is None else None
    return Arguments(embeddings if inputs is None else inputs, mask, positions, cache, packed, unknown)


def is_cache(name: str, value: Any) -> bool:
    """Returns True where a value is a cache: it has a length, or keys and values by layer, or the name of one.

    Caches of state-space models, and of some older models, have no length.
    """
    if callable(getattr(value, "get_seq_length", None)) or _is_keys_by_layer(value):
        return True
    if isinstance(value, tuple | list):
        is_holder = first_tensor(value) is not None
    else:
        is_holder = not isinstance(value, Tensor | bool | int | float | str | dict | None)
    return is_holder and not {"cache", "past", "state"}.isdisjoint(name.split("_"))


def length_of(cache: Any) -> int | Tensor | None:
    """Returns the number of tokens in a cache: a tensor where it is kept on a device, None where it is not known."""
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        return cache[0][0].shape[-2] if _is_keys_by_layer(cache) else None
    keys = getattr(cache, "key_cache", None)
    if isinstance(keys, list) and keys and not any(isinstance(key, Tensor) and key.numel() for key in keys):
        return 0  # hybrid models of transformers 4 say the number of rows before they have read anything
    try:
        return cache.get_seq_length()
    except (AttributeError, ValueError):
        return None


def identity_of(cache: Any) -> Any:
    """Returns the object that stays the same when a cache is handed from one pass to the next."""
    return first_tensor(cache) if isinstance(cache, tuple | list) else cache


def first_tensor(value: Any) -> Tensor | None:
    """Returns the first tensor in nested tuples and lists, or None."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _is_keys_by_layer(value: Any) -> bool:
    """Returns True for a tuple of (keys, values, ...) by layer, keys (B, heads, columns, size)."""
    if not isinstance(value, tuple | list) or not value or not isinstance(value[0], tuple | list):
        return False
    key = first_tensor(value)
    return len(value[0]) >= 2 and key is not None and key.dim() == 4


def cache_of(output: Any) -> Any:
    """Returns the cache in a model's output, or None."""
    items = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, tuple) else ()
    return next((value for name, value in items if value is not None and is_cache(str(name), value)), None)

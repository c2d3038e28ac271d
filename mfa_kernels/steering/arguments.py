"""What a forward pass was given: its tokens, mask, positions and cache, recognised by what they are.

Names of arguments change from one release of transformers to the next (`past_key_values` became `cache`), so a cache is
whatever says how long it is, and tokens are the first tensor that has their shape. Only what no shape can tell apart,
a mask or positions from token ids, is told by a word in its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str)
# Of encoder states and their mask, of image and audio inputs: none of them is of the sequence that is followed.
_FOREIGN = ("encoder_", "cross_", "pixel_", "image_", "video_", "audio_")


class Arguments(NamedTuple):
    """What a stack of decoder layers, or `generate`, was called with.

    Attributes:
        inputs: token ids (B, T), or embeddings (B, T, D); None where there are none.
        mask: of padding or of attention, as it was given.
        positions: position ids, (B or 1, T) or (axes, B, T).
        cache: what earlier passes left.
        packed: the name of an argument that says that a row holds several sequences.
        unknown: the name of a tensor that might be a mask and is not known as one.
    """

    inputs: Tensor | None
    mask: Any = None
    positions: Tensor | None = None
    cache: Any = None
    packed: str | None = None
    unknown: str | None = None

    @property
    def tokens(self) -> int:
        """T, or 0 where there are no inputs."""
        return 0 if self.inputs is None else self.inputs.shape[1]

    @property
    def has_embeddings(self) -> bool:
        return self.inputs is not None and self.inputs.is_floating_point()

    @property
    def before(self) -> int | None:
        """Columns before those of the pass, by its mask, or by its positions (which asks the device); None where
        neither is there."""
        if self.mask_columns:
            return self.mask_columns - self.tokens
        return None if self.positions is None else int(self.positions.max()) + 1 - self.tokens

    @property
    def mask_columns(self) -> int:
        """Columns of a mask of shape (B, columns); 0 where there is no such mask."""
        return self.mask.shape[1] if isinstance(self.mask, Tensor) and self.mask.dim() == 2 else 0


def recognised(given: Mapping[str, Any]) -> Arguments:
    """The arguments by their kind.

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
    """Whether a value is what earlier passes left: it says how long it is, or holds keys and values by layer, or its
    name says so (those of state-space models, and of some older ones, have no length)."""
    if callable(getattr(value, "get_seq_length", None)) or _is_keys_by_layer(value):
        return True
    if isinstance(value, tuple | list):
        is_holder = first_tensor(value) is not None
    else:
        is_holder = not isinstance(value, Tensor | bool | int | float | str | dict | None)
    return is_holder and not {"cache", "past", "state"}.isdisjoint(name.split("_"))


def length_of(cache: Any) -> int | Tensor | None:
    """Tokens in a cache: a tensor where it keeps their number on a device, None where it does not say."""
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
    """What stays the same of a cache from where one pass leaves it to where it is handed over to the next."""
    return first_tensor(cache) if isinstance(cache, tuple | list) else cache


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in tuples or lists of tuples or lists."""
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _is_keys_by_layer(value: Any) -> bool:
    """Whether it is a tuple of (keys, values, ...) by layer, keys (B, heads, columns, size)."""
    if not isinstance(value, tuple | list) or not value or not isinstance(value[0], tuple | list):
        return False
    key = first_tensor(value)
    return len(value[0]) >= 2 and key is not None and key.dim() == 4


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where there is none."""
    items = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, tuple) else ()
    return next((value for name, value in items if value is not None and is_cache(str(name), value)), None)

"""Keys and values of the tokens before a site, which no patch at the site changes.

A token of a causal model depends on those before it alone. So a pass that replaces what a layer puts out at one token
needs the tokens from there on, and of the earlier ones their keys and values in the layers above, which are computed
once. At the last of 70 tokens that is a pass over one token in place of 70.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.data.language_model import takes

_CACHES = ("past_key_values", "cache")
_Both = tuple[Tensor, Tensor]


def cache_argument(model: nn.Module) -> str | None:
    """Returns the argument in which a model takes keys and values; None where it takes none."""
    return next((name for name in _CACHES if takes(model, name)), None)


class Prefix:
    """Keys and values of the first tokens of some prompts, by layer; of layers below the site their shapes alone.

    Args:
        length: tokens.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._above: dict[int, _Both] = {}
        self._below: dict[int, _Both] = {}

    @contextmanager
    def recording(self, site: nn.Module) -> Iterator[Callable[[], Any]]:
        """Gives a function that makes a cache for a pass over some more prompts, and keeps what the passes put there.

        Args:
            site: the module behind whose output layers are above.
        """
        from transformers import DynamicCache

        passed: list[nn.Module] = []
        parts: dict[int, list[_Both]] = defaultdict(list)

        class Recorder(DynamicCache):
            def update(
                recorder, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
            ) -> tuple[Tensor, Tensor]:
                both = (key_states, value_states)
                if passed:
                    first, second = (part[:, :, : self.length].clone() for part in both)
                    parts[layer_idx].append((first, second))
                else:
                    first, second = (torch.zeros_like(part[:1, :, :1]) for part in both)
                    self._below[layer_idx] = (first, second)
                return super().update(key_states, value_states, layer_idx, *args, **kwargs)

        def new() -> Any:
            passed.clear()
            return Recorder()

        handle = site.register_forward_hook(lambda module, given, output: passed.append(module))
        try:
            yield new
        finally:
            handle.remove()
        for layer, several in parts.items():
            self._above[layer] = (
                torch.cat([keys for keys, _ in several]),
                torch.cat([values for _, values in several]),
            )

    def cache(self, prompts: Tensor) -> Any:
        """Returns a cache as the model has it after the first tokens of these prompts, (n,).

        Nobody reads the keys below the site; there have to be some for the cache to say how many tokens it holds.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in sorted(self._above | self._below):
            if layer in self._above:
                keys, values = (part[prompts] for part in self._above[layer])
            else:
                keys, values = (part.expand(len(prompts), -1, self.length, -1) for part in self._below[layer])
            cache.update(keys, values, layer)
        return cache


@contextmanager
def only_columns(model: nn.Module, columns: Tensor) -> Iterator[None]:
    """Meanwhile a model that shows its head the hidden states of all tokens makes logits of one token of each row.

    Args:
        model: a causal language model.
        columns: of that token, (n,).
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return

    def pick(module: nn.Module, given: tuple[Any, ...]) -> Any:
        hidden = given[0] if given else None
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or len(hidden) != len(columns):
            return None
        return (hidden[torch.arange(len(columns), device=hidden.device), columns].unsqueeze(1), *given[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()

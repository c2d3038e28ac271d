"""Calls to `model.generate` while they run: where the prompt ends is known to them alone.

A call is known to the thread that makes it, so that several threads may write with one model at once.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import nn

from mfa_kernels.data.language_model import is_encoder_decoder
from mfa_kernels.steering.arguments import recognised

_ATTRIBUTE = "_mfa_kernels_generate"
_DECODER = "decoder_"


class Call:
    """One call to `model.generate`.

    Attributes:
        prompt: columns of the decoder's prompt as `generate` was given it, with what a cache already holds; None where
            the model begins by itself, with a token or several.
        from_embeddings: whether the prompt came as embeddings.
        cache: the cache it was given.
        sequences: what each tracker of the model remembers of it.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], encoder_decoder: bool) -> None:
        given = recognised({"inputs": args[0] if args else None, **kwargs})
        self.cache = given.cache
        if encoder_decoder:
            # Its other inputs are the encoder's.
            given = recognised({n[len(_DECODER) :]: v for n, v in kwargs.items() if n.startswith(_DECODER)})
        self.prompt = given.mask_columns or given.tokens or None
        self.from_embeddings = given.has_embeddings
        self.sequences: dict[Any, Any] = {}


class Generate:
    """`model.generate`, wrapped as long as something wants to know of its calls."""

    @classmethod
    def watch(cls, model: nn.Module, user: object) -> Generate:
        """The wrapper of this model, installed with the first user."""
        found = vars(model).get(_ATTRIBUTE)
        if found is None:
            found = cls(model)
        found._users.append(user)
        return found

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._users: list[object] = []
        self._shadowed = vars(model).get("generate")
        self._inner: Any = getattr(model, "generate", None)
        setattr(model, _ATTRIBUTE, self)
        if self._inner is not None:
            model.generate = self.generate  # type: ignore[assignment]

    def release(self, user: object) -> None:
        """Puts `generate` back when the last user lets go."""
        self._users.remove(user)
        if self._users:
            return
        delattr(self._model, _ATTRIBUTE)
        if vars(self._model).get("generate") == self.generate:
            del self._model.generate
            if self._shadowed is not None:
                self._model.generate = self._shadowed

    @property
    def call(self) -> Call | None:
        """The call that is under way in this thread."""
        return _calls().get(id(self._model))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, noted for as long as it runs."""
        calls, key = _calls(), id(self._model)
        outer = calls.get(key)
        calls[key] = Call(args, kwargs, is_encoder_decoder(self._model))
        try:
            return self._inner(*args, **kwargs)
        finally:
            if outer is None:
                del calls[key]
            else:
                calls[key] = outer


_local = threading.local()


def _calls() -> dict[int, Call]:
    """Of this thread, by model."""
    if not hasattr(_local, "calls"):
        _local.calls = {}
    return _local.calls

"""Calls to `model.generate` while they run, and the length of the prompt that each was given.

Each thread knows its own call only, so that several threads may write with one model at once.
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
        prompt: columns of the decoder's prompt as `generate` was given it, with those that a cache already holds; None
            where the model begins by itself, with a token or several.
        from_embeddings: True where the prompt came as embeddings.
        cache: the cache it was given.
        sequences: by tracker of the model, the sequence that the call writes.
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
    """A wrapper of `model.generate`, which stays as long as it has users."""

    @classmethod
    def watch(cls, model: nn.Module, user: object) -> Generate:
        """Returns the wrapper of this model, installed with the first user."""
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
        """Puts `generate` back when the last user is released."""
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
        """Returns the call that is under way in this thread, or None."""
        return _calls().get(id(self._model))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Calls `model.generate`, and notes the call for as long as it runs."""
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
    """Returns the calls of this thread, by the id of their model."""
    if not hasattr(_local, "calls"):
        _local.calls = {}
    return _local.calls

"""Where in its sequence each token of a forward pass is: under a KV cache, padding, chunks and recomputation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mfa_kernels.models import decoder_layers

_UNKNOWN = 2**62  # the end of a prompt nobody has seen
_ATTRIBUTE = "_mfa_kernels_tracker"


class User(Protocol):
    """A handle. `asks_where` is whether it needs to know where the one token of a pass is."""

    @property
    def asks_where(self) -> bool: ...


@dataclass(frozen=True)
class Pass:
    """One forward pass: T columns of a (padded) batch of sequences.

    Attributes:
        start: column of the first token, padding included.
        tokens: T.
        prompt_end: first column that was generated.
        real: (B, T) bool, False for padding; None where there is none.
        padding: columns of padding before `start`, (B, 1); None where there are none.
    """

    start: int
    tokens: int
    prompt_end: int
    real: Tensor | None = None
    padding: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + self.tokens

    def steps(self) -> tuple[int, ...]:
        """Generation step of each column, 0 for the prompt; one number where all share it."""
        if self.end <= self.prompt_end:
            return (0,)
        return tuple(max(0, column - self.prompt_end + 1) for column in range(self.start, self.end))

    def columns(self, device: torch.device) -> Tensor:
        """(1, T)."""
        return torch.arange(self.start, self.end, device=device).unsqueeze(0)

    def positions(self, device: torch.device) -> Tensor:
        """Absolute positions, which count each row's real tokens from 0: (B, T), or (1, T) without padding.

        Those of padding mean nothing.
        """
        positions = self.columns(device)
        if self.padding is not None:
            positions = positions - self.padding.to(device)
        if self.real is not None:
            positions = positions - (~self.real.to(device)).cumsum(1)
        return positions


@dataclass
class _Sequence:
    """What is remembered of a (batch of) sequences between its passes.

    Attributes:
        prompt_end: first column that was generated.
        next: column after the last pass.
        padding: columns of padding so far, (B, 1).
        cache: that of its first pass, where it is an object that stays the same.
    """

    prompt_end: int = _UNKNOWN
    next: int = 0
    padding: Tensor | None = None
    cache: Any = None


class Tracker:
    """Follows the forward passes of one model, for all the handles that steer it.

    A pre-hook on the stack of decoder layers reads its arguments. What they cannot say, where the prompt ends when it
    comes in chunks or is recomputed at each step, is read from the call to `model.generate`, which is wrapped as long
    as the model is steered. In a loop of one's own, without `generate`, a pass of several tokens is a prompt (or a
    further chunk of it), and a pass of one token that extends a cache is generated. So it is for what runs the model
    on a cache of its own while `generate` does, as the unconditional branch of classifier-free guidance.
    """

    @classmethod
    def acquire(cls, model: nn.Module, user: User) -> Tracker:
        """The tracker of this model, installed with the first handle."""
        tracker = vars(model).get(_ATTRIBUTE)
        if tracker is None:
            tracker = cls(model)
        tracker._users.append(user)
        return tracker

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._users: list[User] = []
        self._own = _Sequence()
        self._generated: _Sequence | None = None  # by the call to `generate` that is under way
        self.current: Pass | None = None
        stack = _stack_owner(model)
        # Of the class: tools that wrap the forward of an instance may hide its arguments' names.
        self._names = list(inspect.signature(type(stack).forward).parameters)[1:]
        self._hook = stack.register_forward_pre_hook(self._observe, with_kwargs=True)
        setattr(model, _ATTRIBUTE, self)
        self._shadowed = vars(model).get("generate")
        self._generate: Any = getattr(model, "generate", None)
        if self._generate is not None:
            model.generate = self.generate  # type: ignore[assignment]

    def release(self, user: User) -> None:
        """Takes the hooks off when the last handle lets go."""
        self._users.remove(user)
        if self._users:
            return
        self._hook.remove()
        delattr(self._model, _ATTRIBUTE)
        if vars(self._model).get("generate") == self.generate:
            del self._model.generate
            if self._shadowed is not None:
                self._model.generate = self._shadowed

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, with the end of the prompt noted."""
        outer, sequence = self._generated, _Sequence(_prompt_columns(args, kwargs))
        self._generated = sequence
        try:
            return self._generate(*args, **kwargs)
        finally:
            self._generated, sequence.cache = outer, None
            if outer is None:
                self._own = sequence  # a loop of one's own may go on with its cache

    def at(self, hidden: Tensor) -> Pass:
        """The pass that hidden states (B, T, D) belong to; a layer called by itself starts a sequence."""
        batch, tokens = hidden.shape[:2]
        now = self.current or Pass(0, tokens, tokens)
        if now.tokens != tokens or (now.real is not None and now.real.shape[0] not in (1, batch)):
            raise ValueError(
                f"the steered layer returned hidden states of shape {tuple(hidden.shape)}, but the model was called "
                f"with {now.tokens} tokens per row: call the model itself, and steer a layer that sees every token"
            )
        return now

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args)), **kwargs}
        compiled = torch.compiler.is_compiling()
        if not compiled or _tokens(given) != 1 or any(user.asks_where for user in self._users):
            self._note(type(module).__name__, given, compiled)

    @torch.compiler.disable
    def _note(self, name: str, given: dict[str, Any], compiled: bool) -> None:
        inputs = _inputs(given)
        if inputs is None:
            raise ValueError(f"{name} was called without input_ids and inputs_embeds as tensors")
        tokens, cache = inputs.shape[1], _cache(given)
        sequence = self._generated or self._own
        start = self._start(cache, sequence, compiled)
        if sequence is self._generated:
            if not sequence.next:
                sequence.cache = None if isinstance(cache, tuple | list) else cache
            elif sequence.cache is not None and cache is not sequence.cache and start != sequence.next:
                sequence = self._own
        if start == 0:
            sequence.padding = None
        if sequence is self._own:
            extends = start > 0 and tokens == 1
            sequence.prompt_end = min(sequence.prompt_end, start) if extends else start + tokens
        real, padding = None, sequence.padding
        # What generate() appends is never masked: a mask needs no look after the prompt.
        if sequence is self._own or start < sequence.prompt_end:
            real, padding = _read_mask(given.get("attention_mask"), start, tokens, padding)
        self.current = Pass(start, tokens, sequence.prompt_end, real, padding)
        sequence.next = start + tokens
        if real is not None:
            added = (~real).sum(1, keepdim=True)
            sequence.padding = added if padding is None else padding + added

    def _start(self, cache: Any, sequence: _Sequence, compiled: bool) -> int:
        """Tokens in the cache."""
        if cache is None:
            return 0
        if isinstance(cache, tuple | list):
            return cache[0][0].shape[-2] if cache else 0
        try:
            length = cache.get_seq_length()
        except (AttributeError, ValueError):  # caches of state-space models have no length
            return sequence.next
        if isinstance(length, Tensor) and sequence is self._generated and sequence.next and not compiled:
            # A static cache keeps it on the device, and asking would wait for that; but what is compiled may have
            # passed tokens that nobody asked about.
            return sequence.next
        return int(length)


def _cache(given: dict[str, Any]) -> Any:
    """The cache among the arguments of the stack."""
    cache = given.get("past_key_values")
    return given.get("cache_params") if cache is None else cache


def _inputs(given: dict[str, Any]) -> Tensor | None:
    """(B, T), or (B, T, D), among the arguments of the stack."""
    inputs = given.get("input_ids")
    inputs = given.get("inputs_embeds") if inputs is None else inputs
    return inputs if isinstance(inputs, Tensor) else None


def _tokens(given: dict[str, Any]) -> int:
    inputs = _inputs(given)
    return 0 if inputs is None else inputs.shape[1]


def _stack_owner(model: nn.Module) -> nn.Module:
    """The module whose forward runs the decoder layers, and gets masks and cache as tensors."""
    try:
        path, _ = decoder_layers(model)
    except ValueError:
        return model
    return model.get_submodule(path.rpartition(".")[0])


def _prompt_columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Columns of the prompt given to `generate`, with what a cache already holds."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask.shape[1]
    for given in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]):
        if isinstance(given, Tensor):
            return given.shape[1]
    return 1  # generate starts from a beginning-of-sequence token


def _read_mask(mask: Any, start: int, tokens: int, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which of the pass's tokens are real, (B, T), and the columns of padding before it, (B, 1), as far as it says."""
    if isinstance(mask, dict):  # one per kind of attention
        mask = mask.get("full_attention", next((m for m in mask.values() if m is not None), None))
    if mask is None:
        return None, padding
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise TypeError(
            "attention_mask must be a tensor of shape (B, T), or (B, 1, T, columns), for padding to be told from "
            f"tokens; got {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}"
        )
    if mask.shape[-1] < tokens:
        raise ValueError(f"attention_mask covers {mask.shape[-1]} columns, fewer than the {tokens} tokens of the pass")
    known = mask.shape[-1] >= start + tokens
    first = start if known else mask.shape[-1] - tokens
    if mask.dim() == 2:
        real = mask != 0
        if known and start:
            padding = (~real[:, :start]).sum(1, keepdim=True)
        return real[:, first : first + tokens], padding
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    if known and start and padding is None:
        # The last token sees every real one before it; where passes were seen before, a sliding window hides nothing.
        padding = (~visible[:, -1, :start]).sum(1, keepdim=True)
    # A real token sees itself.
    return torch.diagonal(visible, offset=first, dim1=-2, dim2=-1), padding

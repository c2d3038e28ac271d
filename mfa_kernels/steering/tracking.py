"""Places of tokens in their sequence, and where the prompt ends, under a KV cache and padding."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mfa_kernels.data.language_model import decoder_layers, stack_of
from mfa_kernels.steering.arguments import Arguments, cache_of, identity_of, length_of, recognised
from mfa_kernels.steering.generation import Call, Generate

_UNKNOWN = 2**62  # stands for the end of a prompt that is not known yet
_ATTRIBUTE = "_mfa_kernels_trackers"
_REMEMBERED = 256  # so many passes are kept, because a backward pass may recompute their layers


class User(Protocol):
    """A handle; `asks_where` is True if it needs the places of tokens, and not only which are padding."""

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
        """Returns the generation step of each column, 0 for the prompt; one number where all share it."""
        if self.end <= self.prompt_end:
            return (0,)
        return tuple(max(0, column - self.prompt_end + 1) for column in range(self.start, self.end))

    def columns(self, device: torch.device) -> Tensor:
        """Returns the columns of the pass, (1, T)."""
        return torch.arange(self.start, self.end, device=device).unsqueeze(0)

    def positions(self, device: torch.device) -> Tensor:
        """Returns absolute positions, which count each row's real tokens from 0: (B, T), or (1, T) without padding.

        Entries at padding have no meaning.
        """
        positions = self.columns(device)
        if self.padding is not None:
            positions = positions - self.padding.to(device)
        if self.real is not None:
            positions = positions - (~self.real.to(device)).cumsum(1)
        return positions


_LOST = (
    "{0} was called with {1} tokens per row and {2}, but {3} among its arguments: mfa_kernels does not know how this "
    'model, or this version of transformers, hands over what was read before. Steering with positions="all" and a '
    "constant alpha does not depend on it"
)


class LostTrackError(RuntimeError):
    """The arguments of a model do not tell the places of its tokens in their sequence."""


@dataclass
class _Sequence:
    """The state of a (batch of) sequences between its passes.

    Attributes:
        prompt_end: first column that was generated.
        next: column after the last pass.
        padding: columns of padding so far, (B, 1).
        cache: a weak reference to the cache of its passes, by which it is recognised.
    """

    prompt_end: int = _UNKNOWN
    next: int = 0
    padding: Tensor | None = None
    cache: Any = None


@dataclass
class _Now:
    """The pass that a thread is in, or was in last.

    Attributes:
        where: the pass, or the error that says why it is not known.
        real: (B, T) bool, False for padding; None where there is none; or the error that says why it is not known.
        tokens: T.
        sequence: the sequence of the pass.
        backward: number of the backward pass that it recomputes, -1 outside of one.
        trains: True where a backward pass may recompute layers.
        runs: True until the stack has come to its end.
        steered: pairs of hidden states before and after steering.
    """

    where: Pass | Exception
    real: Tensor | None | Exception
    tokens: int
    sequence: _Sequence | None
    backward: int
    trains: bool
    runs: bool = True
    steered: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Tracker:
    """Follows the forward passes of one stack of layers, for all the handles that steer it.

    A pre-hook on the module that holds the stack reads its arguments. They do not tell where a prompt ends that comes
    in chunks or is recomputed at each step; this is read from the call to `model.generate`, which is wrapped as long as
    the model is steered. In a loop without `generate`, a pass of several tokens is a prompt (or a further chunk of it),
    and a pass of one token that extends a cache is generated. The same holds for code that runs the model on a cache of
    its own inside `generate`, such as the unconditional branch of classifier-free guidance.

    State belongs to a thread during a pass, and to the cache between passes, so that threads, and sequences that take
    turns, do not disturb each other.
    """

    @classmethod
    def acquire(cls, model: nn.Module, user: User, layer: str) -> Tracker:
        """Returns the tracker of the stack that a layer belongs to, installed with the first handle.

        Args:
            model: a language model.
            user: a handle.
            layer: path of a module of the model.
        """
        path = stack_of(model, layer)
        trackers = vars(model).setdefault(_ATTRIBUTE, {})
        tracker = trackers.get(path)
        if tracker is None:
            tracker = trackers[path] = cls(model, path)
        tracker._users.append(user)
        return tracker

    def __init__(self, model: nn.Module, path: str) -> None:
        self._model, self._path = model, path
        self._users: list[User] = []
        self._generate = Generate.watch(model, self)
        self._follows = _is_decoder(model, path)
        stack = model.get_submodule(path)
        # The class is asked, because tools that wrap the forward of an instance may hide its arguments' names.
        self._names = list(inspect.signature(type(stack).forward).parameters)[1:]
        self._hooks = (
            stack.register_forward_pre_hook(self._observe, with_kwargs=True),
            stack.register_forward_hook(self._leave),
        )
        self._recomputable: dict[Any, _Now] = {}

    def release(self, user: User) -> None:
        """Takes the hooks off when the last handle is released."""
        self._users.remove(user)
        if self._users:
            return
        for hook in self._hooks:
            hook.remove()
        self._generate.release(self)
        trackers = vars(self._model)[_ATTRIBUTE]
        del trackers[self._path]
        if not trackers:
            delattr(self._model, _ATTRIBUTE)

    def at(self, hidden: Tensor, given: Any = None) -> Pass:
        """Returns the pass that hidden states (B, T, D) belong to; a layer called by itself starts a sequence.

        Args:
            hidden: the output of the layer.
            given: its arguments, by which a layer that runs again in a backward pass is recognised.

        Raises:
            LostTrackError, TypeError, ValueError: the arguments of the pass do not say where it is.
        """
        now = self._now(hidden, given)
        return Pass(0, hidden.shape[1], hidden.shape[1]) if now is None else _known(now.where)

    def padding(self, hidden: Tensor, given: Any = None) -> Tensor | None:
        """Returns True for hidden states of real tokens, (B, T); None where all are real. Arguments are those of `at`.

        Raises:
            LostTrackError, TypeError, ValueError: the mask does not say which are padding.
        """
        now = self._now(hidden, given)
        return None if now is None else _known(now.real)

    def _now(self, hidden: Tensor, given: Any) -> _Now | None:
        now, backward = _states().get(self), _backward()
        if backward >= 0 and (now is None or now.backward != backward):
            # One layer runs again, not the model: its pass is the one in which it had the same tensors as arguments.
            now = self._recomputable.get(_fingerprint(given))
            if now is None:
                raise LostTrackError(
                    "a steered layer was run again in a backward pass with tensors it has not seen in a forward pass: "
                    "its tokens cannot be told from padding, nor prompt from generated ones"
                )
        elif now is not None and now.trains:
            while len(self._recomputable) >= _REMEMBERED:
                self._recomputable.pop(next(iter(self._recomputable)), None)
            self._recomputable[_fingerprint(given)] = now
        if now is None:
            return None
        batch, tokens = hidden.shape[:2]
        rows = now.real.shape[0] if isinstance(now.real, Tensor) else 1
        if now.tokens and (now.tokens != tokens or rows not in (1, batch)):
            raise ValueError(
                f"the steered layer returned hidden states of shape {tuple(hidden.shape)}, but the model was called "
                f"with {now.tokens} tokens per row: call the model itself, and steer a layer that sees every token"
            )
        return now

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = recognised({**dict(zip(self._names, args)), **kwargs})
        compiled = torch.compiler.is_compiling()
        if not compiled or given.tokens != 1 or any(user.asks_where for user in self._users):
            self._note(type(module).__name__, given, compiled)

    @torch.compiler.disable
    def _note(self, name: str, given: Arguments, compiled: bool) -> None:
        """Sets the pass of this thread; errors are kept for handles that ask for what is not known."""
        where: Pass | Exception
        real: Tensor | None | Exception
        sequence: _Sequence | None = None
        try:
            if self._follows:
                where, sequence = self._followed(name, given, compiled)
            else:
                _check_inputs(name, given)
                real, _ = _read_mask(given.mask, 0, given.tokens, None)
                where = Pass(0, given.tokens, given.tokens, real)
            real = where.real
        except (LostTrackError, TypeError, ValueError) as error:
            error = error.with_traceback(None)  # a traceback would keep tensors alive as long as the error is kept
            where, real = error, _padding_alone(given, error)
        trains = torch.is_grad_enabled() and _backward() < 0
        _states()[self] = _Now(where, real, given.tokens, sequence, _backward(), trains)

    def _followed(self, name: str, given: Arguments, compiled: bool) -> tuple[Pass, _Sequence]:
        """Returns the pass, by its arguments and the state of its sequence, and that sequence."""
        tokens, call = given.tokens, self._generate.call
        _check_inputs(name, given)
        sequence, is_own = self._sequence(name, given, call)
        start = sequence.next if _is_kept(given, sequence) else _start(given.cache, sequence, compiled or is_own)
        self._check(name, given, start, call)
        if start == 0:
            sequence.padding = None
        if is_own:
            extends = start > 0 and tokens == 1
            sequence.prompt_end = min(sequence.prompt_end, start) if extends else start + tokens
        elif sequence.prompt_end == _UNKNOWN:
            assert call is not None
            sequence.prompt_end = _prompt_end(call, given, start)
        real, padding = None, sequence.padding
        # generate() appends only real tokens, so that the mask need not be read after the prompt.
        if is_own or start < sequence.prompt_end:
            real, padding = _read_mask(given.mask, start, tokens, padding)
        now = Pass(start, tokens, sequence.prompt_end, real, padding)
        sequence.next = start + tokens
        if real is not None:
            added = (~real).sum(1, keepdim=True)
            sequence.padding = added if padding is None else padding + added
        return now, sequence

    def _sequence(self, name: str, given: Arguments, call: Call | None) -> tuple[_Sequence, bool]:
        """Returns the sequence of a pass, and True if it is not that of the call to `generate`."""
        cache, ours = given.cache, None
        if call is not None:
            ours = call.sequences.get(self)
            if ours is None:  # the first pass of the call
                ours = call.sequences[self] = _Sequence()
                _remember(cache, ours)
                return ours, False
            if cache is None:
                # A pass that begins anew with fewer tokens than were read is of another sequence.
                is_ours = given.tokens >= ours.next or ours.next < ours.prompt_end or _is_kept(given, ours)
                if not is_ours and given.before is None:
                    raise LostTrackError(_LOST.format(name, given.tokens, "no mask or positions", "no cache is"))
            else:
                is_ours = ours.cache is None or ours.cache() is identity_of(cache)
                # The cache may be exchanged for another that holds the same.
                is_ours = is_ours or _start(cache, ours, True) == ours.next
            if is_ours:
                return ours, False
        sequence = None if cache is None else _SEQUENCES.get(identity_of(cache))
        if sequence is None or sequence is ours:
            sequence = _Sequence()
            if call is None and given.tokens == 1 and length_of(cache) is None:
                raise LostTrackError(_LOST.format(name, 1, "a cache that does not say how long it is", "no other is"))
            _remember(cache, sequence)
        return sequence, True

    def _check(self, name: str, given: Arguments, start: int, call: Call | None) -> None:
        """Raises LostTrackError where the arguments of a pass contradict each other."""
        ours, seen = None if call is None else call.sequences.get(self), start + given.tokens
        is_empty = given.cache is None or start == 0
        is_late = is_empty and ours is not None and call is not None and _is_short(given, ours, call)
        if given.mask_columns > seen and (given.cache is None or is_late):
            found = f"a mask of {given.mask_columns} columns"
        elif is_late and given.before is not None and given.before > start:  # asks the device where it looks impossible
            found = f"position {given.before}"
        else:
            return
        cache = "no cache" if given.cache is None else f"only an empty {type(given.cache).__name__}"
        raise LostTrackError(_LOST.format(name, given.tokens, found, f"{cache} is"))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Notes the cache that a pass leaves, and puts steered hidden states where others were recorded."""
        now = None if torch.compiler.is_compiling() else _states().get(self)
        if now is None:
            return None
        cache = cache_of(output)
        if cache is not None and now.sequence is not None:
            _remember(cache, now.sequence)
        steered, now.steered, now.runs = now.steered, [], False
        for before, after in steered:
            output = _exchanged(output, before, after)
        return output

    def note(self, before: Tensor, after: Tensor) -> None:
        """Notes that hidden states were steered."""
        now = _states().get(self)
        if now is not None and now.runs and _backward() < 0:
            now.steered.append((before, after))


# By cache: another thread that holds it may continue its sequence.
_SEQUENCES = WeakIdKeyDictionary()
_local = threading.local()


def _states() -> WeakKeyDictionary[Tracker, _Now]:
    """Returns the passes of this thread, by tracker."""
    if not hasattr(_local, "states"):
        _local.states = WeakKeyDictionary()
    return _local.states


def _known(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def _remember(cache: Any, sequence: _Sequence) -> None:
    """Notes that passes with this cache continue the sequence."""
    key = identity_of(cache)
    if key is None or (sequence.cache is not None and sequence.cache() is key):
        return
    with contextlib.suppress(TypeError):  # without weak references to it, its sequence is not recognised
        sequence.cache = ref(key)
        _SEQUENCES[key] = sequence


def _is_short(given: Arguments, sequence: _Sequence, call: Call) -> bool:
    """True where a pass of `generate` reads less than its sequence holds, so that a cache should hold the rest.

    The first pass of a prompt in chunks, or of a sequence of another kind, is short too.
    """
    if sequence.next:
        return given.tokens == 1 < sequence.next
    return call.prompt is not None and given.tokens < call.prompt


def _is_kept(given: Arguments, sequence: _Sequence) -> bool:
    """True where a pass continues a sequence without a recognised cache.

    The model then keeps what it has read in a way of its own; the mask or the positions agree with the tokens counted.
    """
    is_short = given.cache is None and given.tokens < sequence.next
    return is_short and given.before == sequence.next


def _start(cache: Any, sequence: _Sequence, asks: bool) -> int:
    """Returns the number of tokens in the cache.

    Args:
        cache: the cache of the pass, or None.
        sequence: the sequence that it belongs to.
        asks: True to ask the device for a length that is kept there.
    """
    length = length_of(cache)
    if length is None:  # as those of state-space models
        return sequence.next
    if isinstance(length, Tensor) and not asks and sequence.next:
        # A static cache keeps its length on the device, and reading it would wait for the device. Compiled code has
        # to read it (asks), because it may have passed tokens that were not counted here.
        return sequence.next
    return int(length)


def _check_inputs(name: str, given: Arguments) -> None:
    """Raises where a pass has no tokens, or does not tell which of them are padding."""
    if given.inputs is None:
        raise ValueError(f"{name} was called without input_ids and inputs_embeds as tensors")
    if given.unknown is not None:
        raise LostTrackError(f"{name} was called with {given.unknown}, which may be a mask of padding, or not")
    if given.packed is not None:
        raise LostTrackError(f"{name} was called with {given.packed}: several sequences share a row")


def _padding_alone(given: Arguments, error: Exception) -> Tensor | None | Exception:
    """Returns the real tokens, (B, T), of a pass whose place is not known; `error`, if they are not known either."""
    if given.inputs is None or given.unknown is not None:
        return error
    if given.mask is None:
        return None
    if given.mask_columns < given.tokens:  # the mask has another shape, or does not cover all tokens
        return error
    return given.mask[:, -given.tokens :] != 0  # its last columns are those of the pass


def _prompt_end(call: Call, given: Arguments, start: int) -> int:
    """Returns the column after the prompt of a call to `generate`, from its first pass.

    Columns that are not among the arguments of `generate` come before the prompt: those of a cache that the model
    brings itself (prefix tuning), and embeddings that stand before those of the tokens (prompt tuning).
    """
    seen = start + given.tokens
    if call.prompt is None:  # a token that the model begins with, or several
        return seen
    before = start if start and call.cache is None else 0
    if given.has_embeddings and not call.from_embeddings:
        before = max(before, seen - call.prompt)
    return call.prompt + before


def _exchanged(output: Any, before: Tensor, after: Tensor) -> Any:
    """Returns a model's output with one tensor replaced in its tuples of tensors, such as the hidden states."""
    if not isinstance(output, Mapping | tuple):
        return output
    for name, value in list(output.items() if isinstance(output, Mapping) else enumerate(output)):
        if type(value) is tuple and any(entry is before for entry in value):
            changed = tuple(after if entry is before else entry for entry in value)
            if isinstance(output, tuple):
                output = (*output[:name], changed, *output[name + 1 :])
            else:
                output[name] = changed  # type: ignore[index]
    return output


def _is_decoder(model: nn.Module, path: str) -> bool:
    """True where a stack reads the sequence that is written; others, such as encoders, read whole inputs."""
    try:
        return decoder_layers(model)[0].rpartition(".")[0] == path
    except ValueError:
        return True


def _backward() -> int:
    """Returns the number of the backward pass that this thread is in, -1 outside of one."""
    return torch._C._current_graph_task_id()


def _fingerprint(given: Any) -> tuple[int, ...]:
    """Returns the addresses of the tensors among arguments, which stay the same when a layer is run again."""
    if isinstance(given, Tensor):
        try:
            return (given.data_ptr(),)
        except RuntimeError:  # no storage of its own
            return ()
    if isinstance(given, dict):
        given = given.values()
    elif not isinstance(given, tuple | list):
        return ()
    return tuple(address for entry in given for address in _fingerprint(entry))


def _read_mask(mask: Any, start: int, tokens: int, padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the real tokens of a pass, (B, T), and the columns of padding before it, (B, 1); None where unknown."""
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
        # The last token sees every real one before it: a sliding window hides none where earlier passes were seen.
        padding = (~visible[:, -1, :start]).sum(1, keepdim=True)
    if visible.shape[1] == 1:  # every token of the pass shares this row
        return visible[:, 0, first : first + tokens], padding
    # A real token sees itself.
    return torch.diagonal(visible, offset=first, dim1=-2, dim2=-1), padding

"""Shapes of the outputs of a language model's layers, found without running it.

A twin of the model is made from its configuration on the meta device, where tensors have shapes and no values, and
called on a few tokens: no weights are read, wherever they are, and no hook, counter, cache or compiled code of the
model is touched. It takes a fraction of a second for the largest models, once for each layer.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mfa_kernels.common.modes import ordinary
from mfa_kernels.data.language_model import decoder_layers, is_encoder_decoder

_ROWS, _TOKENS = 2, 3  # different, so that an output with its axes in another order is known

_UNTRIED: Any = object()
_patching = threading.Lock()
# By model, path and class: the shapes found for a layer; None where the twin could not tell.
_found: WeakKeyDictionary[nn.Module, dict[tuple[str, type], Any]] = WeakKeyDictionary()


def check_output(model: nn.Module, path: str, features: int | None = None) -> None:
    """Raises for a layer that is known not to return one tensor of hidden states, (batch, tokens, D).

    Models that are not of transformers, or were changed since they were made, pass; their output is checked when they
    run.

    Args:
        model: a language model, wrapped or not.
        path: the path of one of its modules.
        features: D, where that is known.

    Raises:
        ValueError: naming the model's class, and the output of the layer.
    """
    module, known = model.get_submodule(path), _found.setdefault(model, {})
    kind = type(module)
    is_container = kind.forward is nn.Module.forward and "forward" not in vars(module)  # nothing calls it
    shapes = [] if is_container else known.get((path, kind), _UNTRIED)
    if shapes is _UNTRIED:
        shapes = known[path, kind] = _by_twin(model, path)
    if shapes is None:
        return
    name = f"layer: {path!r} of {type(model).__name__}"
    otherwise = "name another module by its path, as in model.named_modules()"
    expected = (_ROWS, _TOKENS)
    if not shapes:
        if is_container or _is_decoder_layer(model, path):
            raise ValueError(
                f"{name} is not called as a module when the model runs, so its output cannot be reached; {otherwise}"
            )
        return  # it may be a layer for images
    first = shapes[0]
    if not isinstance(first, tuple) or len(first) != 3 or first[:2] != expected:
        found = f"shape {first}" if isinstance(first, tuple) else f"no tensor but {first}"
        raise ValueError(
            f"{name} puts out {found} for {_ROWS} rows of {_TOKENS} tokens, where (batch, tokens, D) = "
            f"({_ROWS}, {_TOKENS}, D) is expected; {otherwise}"
        )
    if first in shapes[1:]:
        raise ValueError(f"{name} puts out several streams of hidden states, where one is expected; {otherwise}")
    if features is not None and first[2] != features:
        raise ValueError(f"mfa has n_features = {features}, but {path!r} of {type(model).__name__} is {first[2]} wide")


def _by_twin(model: nn.Module, path: str) -> list[Any] | None:
    """Returns the shapes of the tensors in a layer's output for a few tokens (the types of other entries).

    The list is empty where the layer is not called; None where the twin cannot tell.
    """
    kept: list[Any] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output)
        raise _Enough

    try:
        prefix, inner = _of_transformers(model)
        layer, own = model.get_submodule(path), path[len(prefix) :]
        config = copy.deepcopy(inner.config)
        config._attn_implementation = "eager"  # other kinds ask for packages that may not be here
        autocast = patch.object(torch, "autocast", _Autocast)
        # Without the lock, one of two threads might put back what the other had put there.
        with (
            _patching,
            autocast,
            ordinary(),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            torch.device("meta"),
            _Meta(),
        ):
            # Not in float32: some operators have no shapes for it.
            twin: Any = type(inner)(config).eval().to("meta", torch.bfloat16)
            actor = twin.get_submodule(own)
            if not _are_alike(actor, layer):
                return None
            actor.register_forward_hook(keep)
            ids = torch.ones(_ROWS, _TOKENS, dtype=torch.long)
            twin(input_ids=ids, **({"decoder_input_ids": ids} if is_encoder_decoder(inner) else {}))
    except _Enough:
        output = kept[0]
        entries = list(output) if isinstance(output, tuple | list) else [output]
        return [tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__ for entry in entries]
    except Exception:  # any kind: models are not made for this
        return None
    return []


class _Autocast(torch.autocast):
    """Lets `torch.autocast` accept the meta device, which older models name where they turn autocast off."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


class _Enough(BaseException):
    """Ends the twin's pass; no Exception, so that no handler inside a model takes it for an error."""


def _of_transformers(model: nn.Module) -> tuple[str, Any]:
    """Returns the outermost model of transformers inside a (wrapped) model, and the prefix of its paths."""
    transformers = sys.modules.get("transformers")
    for path, module in model.named_modules():
        if transformers is not None and isinstance(module, transformers.PreTrainedModel):
            return f"{path}." if path else "", module
    raise ValueError("not a model of transformers")


def _are_alike(actor: nn.Module, layer: nn.Module) -> bool:
    """True where a layer is as its configuration makes it: it may have been exchanged, or its weights packed."""
    own = dict(layer.named_parameters())
    parts = actor.named_parameters()
    return type(actor) is type(layer) and all(name in own and own[name].shape == p.shape for name, p in parts)


def _is_decoder_layer(model: nn.Module, path: str) -> bool:
    try:
        return decoder_layers(model)[0] == path.rpartition(".")[0]
    except ValueError:
        return False


def _zero(tensor: Tensor) -> Any:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu").tolist()


# Models ask for values on the way: whether a mask masks anything, or a value overflowed.
_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.item: lambda tensor: _zero(tensor.reshape(())),
    Tensor.tolist: _zero,
    Tensor.__bool__: lambda tensor: False,
    Tensor.__int__: lambda tensor: 0,
    Tensor.__index__: lambda tensor: 0,
    Tensor.__float__: lambda tensor: 0.0,
    Tensor.__contains__: lambda tensor, value: False,
    Tensor.cpu: lambda tensor: tensor,
    torch.equal: lambda first, second: True,
}


class _Meta(TorchFunctionMode):
    """Answers, with zeros, where code asks for the value of a tensor that has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ANSWERS and isinstance(args[0], Tensor) and args[0].is_meta:
            return _ANSWERS[func](*args)
        return func(*args, **(kwargs or {}))

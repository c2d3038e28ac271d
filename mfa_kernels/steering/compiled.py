"""Recompilation of compiled code when hooks come or go, which it does not notice by itself."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

# By module: the number of notices, the `forward` of its own before the first, and the one that was put there.
_noticed: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def notice(module: nn.Module) -> None:
    """Makes compiled code that contains this module be compiled again when it next runs.

    Guards of compiled code check whether a module has a `forward` of its own, and which; they do not check its hooks.
    So the module gets a new `forward`, which does what the module did.
    """
    if module not in _noticed:
        _noticed[module] = [0, vars(module).get("forward"), None]
    entry = _noticed[module]
    entry[0] += 1
    _renew(module, entry)


def unnotice(module: nn.Module) -> None:
    """Takes a notice back; after the last one the module has the `forward` it had before."""
    entry = _noticed[module]
    entry[0] -= 1
    if entry[0]:
        _renew(module, entry)
        return
    del _noticed[module]
    if vars(module).get("forward") is entry[2]:  # else another tool has wrapped it since, and calls it
        del module.forward
        if entry[1] is not None:
            module.forward = entry[1]


def _renew(module: nn.Module, entry: list[Any]) -> None:
    _, own, ours = entry
    if ours is None or vars(module).get("forward") is ours:
        # A partial of the class's function, so that a copy of the module calls the copy.
        entry[2] = functools.partial(type(module).forward, module) if own is None else functools.partial(own)
        module.forward = entry[2]


def forget(model: nn.Module) -> None:
    """Drops compiled code if the model is compiled, so that recompiling often does not reach the limit of PyTorch."""
    if hasattr(model, "_orig_mod") or any(_is_compiled(module) for module in model.modules()):
        torch.compiler.reset()


def _is_compiled(module: nn.Module) -> bool:
    own = vars(module)
    return (
        own.get("_compiled_call_impl") is not None
        or "_compiled_call" in own
        or hasattr(own.get("forward"), "_torchdynamo_orig_callable")
    )

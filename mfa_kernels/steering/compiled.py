"""Compiled code does not notice hooks that come and go: here it is made to."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

# How many notices stand on a module, and the `forward` of its own that it had before the first.
_noticed: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def notice(module: nn.Module) -> None:
    """Makes code that was compiled with this module in it, by whomever, be compiled again when it next runs.

    Compiled code is guarded by whether a module has a `forward` of its own, and by which; not by its hooks. So it gets
    one, which does what the module did.
    """
    if module not in _noticed:
        _noticed[module] = [0, vars(module).get("forward"), None]
    entry = _noticed[module]
    entry[0] += 1
    _renew(module, entry)


def unnotice(module: nn.Module) -> None:
    """Takes a notice back; with the last one the module has the `forward` it had."""
    entry = _noticed[module]
    entry[0] -= 1
    if entry[0]:
        _renew(module, entry)
        return
    del _noticed[module]
    if vars(module).get("forward") is entry[2]:  # else somebody has wrapped it since, and calls it
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
    """Where a model is known to be compiled, compiled code is dropped: it may be compiled again any number of times."""
    if hasattr(model, "_orig_mod") or any(_is_compiled(module) for module in model.modules()):
        torch.compiler.reset()


def _is_compiled(module: nn.Module) -> bool:
    own = vars(module)
    return (
        own.get("_compiled_call_impl") is not None
        or "_compiled_call" in own
        or hasattr(own.get("forward"), "_torchdynamo_orig_callable")
    )

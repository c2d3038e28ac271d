"""Registers operators: a function and its checks become ``torch.ops.mfa_kernels.<name>`` on CPUs and GPUs
(of Intel and Apple too, where plain PyTorch serves them).

An implementation takes tensors, numbers, and nouns: classes that are made of tensors. The operator takes the tensors of
a noun one by one, since PyTorch knows no classes, and each call checks them and makes the noun.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from mfa_kernels.ops.common import trust

F = TypeVar("F", bound=Callable[..., Any])
KERNELS: dict[str, Callable[..., Any]] = {}
"""The registered functions, checks included, by operator."""

NO_SECOND_DERIVATIVE = "mfa_kernels::{name} has no second derivative: use precision='reference' for one"

_OUTSIDE_OF_GRAPHS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_LIBRARY = torch.library.Library("mfa_kernels", "FRAGMENT")
_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", list[bool]: "bool[]",
    bool: "bool", int: "int", float: "float",
}  # fmt: skip


def operator(
    name: str,
    schema: str,
    checks: dict[str, str],
    *,
    fake: Callable[[Any], Any] = lambda given: None,
    gradient: Callable[..., Sequence[Tensor | None]] | str | None = None,
    saves: Callable[[Any, Any], Sequence[Tensor]] = lambda inputs, output: (),
    devices: tuple[str, ...] = ("CPU", "CUDA", "XPU", "MPS"),
    waits: bool = False,
    **rules: Any,
) -> Callable[[F], F]:
    """Decorates the implementation of an operator, which it returns unchanged.

    Args:
        name: of the operator.
        schema: its results, "-> Tensor"; its arguments too, where the annotations of the implementation do not give
            them. An annotation is a type of `_TYPES` or a noun: a NamedTuple, or a class whose `of_tensors` makes it;
            those of a noun that may be None are optional.
        checks: descriptions of the arguments by name, as `trust.checks` takes them; others are not checked.
        fake: makes empty results; it is given the operator's arguments as attributes.
        gradient: of the saved tensors, of which inputs need a gradient, and of the results' gradients; returns those of
            the first inputs, and the others have none. A text is the message of the RuntimeError that refuses one.
        saves: of inputs and results, what `gradient` is given.
        devices: on which the operator exists.
        waits: whether it reads a value back from the device: torch.compile leaves it out of the CUDA graphs that
            mode="reduce-overhead" makes, where PyTorch knows such a thing.
        rules: further arguments of `trust.checks`.
    """

    def register(function: F) -> F:
        call, scope, text = None, {"function": function}, schema
        if schema.startswith("->"):
            arguments, call = _inferred(function, rules.get("written", ()), scope)
            text = f"({arguments}) {schema}"
        given = torch._C.parse_schema(f"{name}{text}").arguments
        names = [argument.name for argument in given]
        defaults = [f"={argument.default_value!r}" if argument.has_default_value() else "" for argument in given]
        signature = ", ".join(own + default for own, default in zip(names, defaults))
        body = trust.checks(name, {own: checks.get(own, "") for own in names}, **rules)
        kernel = trust.compiled(name, signature, f"{body}\n    return function({call or ', '.join(names)})", scope)
        KERNELS[name] = kernel
        _LIBRARY.define(name + text, tags=_OUTSIDE_OF_GRAPHS if waits else ())
        for device in devices:
            # PyTorch calls that of the CPU only where every tensor is on it.
            _LIBRARY.impl(name, kernel if device == "CPU" else on_one_device(name, kernel, names), device)
        qualified = f"mfa_kernels::{name}"
        torch.library.register_fake(
            qualified, lambda *given: fake(SimpleNamespace(**dict(zip(names, given)))), lib=_LIBRARY
        )
        if gradient is not None:
            backward = _refused(gradient.format(name=name)) if isinstance(gradient, str) else _backward(gradient)
            torch.library.register_autograd(qualified, backward, setup_context=_context(saves), lib=_LIBRARY)
        return function

    return register


def _inferred(function: Callable[..., Any], written: Sequence[str], scope: dict[str, Any]) -> tuple[str, str]:
    """The arguments of a schema, and those of the call, in which `scope` gets what makes the nouns."""
    arguments, given = list[str](), list[str]()

    def add(kind: str, name: str, default: Any) -> None:
        if name in written:
            kind = f"Tensor({chr(ord('a') + written.index(name))}!)"
        arguments.append(f"{kind} {name}" + ("" if default is inspect.Parameter.empty else f"={default}"))

    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, default = parameter.annotation, parameter.default
        if kind in _TYPES:
            add(_TYPES[kind], name, default)
            given.append(name)
            continue
        noun, *optional = get_args(kind) or (kind,)
        make = getattr(noun, "of_tensors", noun)
        parts, hints = inspect.signature(make).parameters, get_type_hints(make)
        for part in parts:
            own = _TYPES[hints.get(part, Tensor)]
            add(f"{own}?" if optional and not own.endswith("?") else own, part, default)
        call = f"make_{name}({', '.join(parts)})"
        given.append(f"None if {next(iter(parts))} is None else {call}" if optional else call)
        scope[f"make_{name}"] = make
    return ", ".join(arguments), ", ".join(given)


def _context(saves: Callable[[Any, Any], Sequence[Tensor]]) -> Callable[..., None]:
    def context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*saves(inputs, output))
        ctx.none = [[None] * len(one) if isinstance(one, list | tuple) else None for one in inputs]

    return context


def _backward(gradient: Callable[..., Sequence[Tensor | None]]) -> Callable[..., Any]:
    def backward(ctx, *gradients):
        found = gradient(ctx.saved_tensors, ctx.needs_input_grad, *gradients)
        return *found, *ctx.none[len(found) :]

    return backward


def _refused(message: str) -> Callable[..., NoReturn]:
    def refuse(ctx, *gradients):
        raise RuntimeError(message)

    return refuse


def on_one_device(operator: str, function: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """The function, for tensors that are all on one device.

    It raises ValueError for others, naming the first that is not where the one before it is.
    """

    def checked(*arguments: Any) -> Any:
        device = None
        for name, tensor in zip(names, arguments):
            if isinstance(tensor, Tensor):
                if device is not None and tensor.device != device:
                    raise ValueError(
                        f"{operator}: {name} must be on the device of the other tensors, {device}, got {tensor.device}"
                    )
                device = tensor.device
        return function(*arguments)

    return checked

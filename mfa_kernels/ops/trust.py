"""Operators trust nobody: kernels read raw memory, so every tensor handed to one must be what it takes it for.

An operator's tensors are described once, by dtype and sizes. The function that checks them is written from that, as
`namedtuple` writes its methods: it runs at every call, and a loop over descriptions would cost more than a token does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from mfa_kernels.ops import native

_KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "any": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "real": (torch.float32, torch.float64),
    "double": (torch.float64,),
    "half": (torch.float16,),
    "int32": (torch.int32,),
    "int64": (torch.int64,),
    "bool": (torch.bool,),
}
_LETTER = re.compile(r"[A-Z]")
_FORM = re.compile(r"(\w+)\((.*)\)")


# What several operators take: a mixture's parameters, and the terms that are computed from them beforehand.
PARAMETERS = {"means": "real(K, D)", "loadings": "means(K, D, R)", "noise_variance": "means(D) or means(K, D)"}
FACTORS = {
    "rows": "means(K, R + noise_variance.dim(), D)"
    " or means(K, -(-D // lanes(means)), R + noise_variance.dim(), lanes(means))",
    "cholesky": "means(K, R, R)",
    "log_det": "means(K)",
    "scale": "means(D)",
    "center": "means(D)",
}


# The rows of those terms, where no noise_variance says whether it is per component.
ROWS = (
    "cholesky(K, R + 1 + per_component, D)"
    " or cholesky(K, -(-D // lanes(cholesky)), R + 1 + per_component, lanes(cholesky))"
)


def checker(
    operator: str,
    arguments: dict[str, str],
    *,
    last: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    written: tuple[str, ...] = (),
    where: dict[str, str] | None = None,
) -> Callable[..., None]:
    """A function of an operator's arguments, in this order, that raises where a tensor is not what it has to be.

    Args:
        operator: its name, for messages.
        arguments: by name, in the order of the operator's. A tensor's is "dtype(sizes)", or several such of different
            numbers of dimensions with "or" between them. The dtype is `any` float, `real` (float32 or float64),
            `double`, `half`, `int32`, `int64` or `bool`, or the name of a tensor before it, whose dtype it has. A size
            is a number, a capital letter, which stands for the same wherever it is (the first tensor with it says
            what), or an expression of these and of earlier arguments. "" is an argument that is no tensor, and
            "positive" a number of at least 1.
        last: tensors that are looked at after the others, so that it is they that do not fit.
        optional: tensors that may be None.
        written: tensors that results are added to, which must be contiguous.
        where: by name of a tensor, what must hold of its sizes beyond their being equal; an expression of letters.

    Returns:
        The function. It raises TypeError or ValueError, naming the operator and the tensor, what was found and what was
        expected. All tensors have to be on the device of the first one.
    """
    scope: dict[str, Any] = {"refuse": _refuse, "refuse_sizes": _refuse_sizes, "lanes": _lanes}
    scope |= {f"{kind}_dtypes": dtypes for kind, dtypes in _KINDS.items()}
    known, lines, missing, device = set[str](), list[str](), list[str](), None
    for name in sorted(arguments, key=lambda name: name in last):
        text = arguments[name]
        if not text:
            continue
        if text == "positive":
            lines.append(f"if {name} < 1: raise ValueError(f'{operator}: {name} must be at least 1, got {{{name}}}')")
            continue
        refusal = f"refuse({operator!r}, {name!r}, {name}, {text!r}, locals())"
        own = _sizes(name, text, known, refusal)
        kind = _forms(text)[0][0]
        test = f"not in {kind}_dtypes" if kind in _KINDS else f"is not {kind}.dtype"
        own.append(f"if {name}.dtype {test}: {refusal}")
        if device is None:
            device = name
            own.append(f"device = {name}.get_device()")
        else:
            own.append(f"if {name}.get_device() != device: {refusal}")
        if where and name in where:
            told = f"refuse_sizes({operator!r}, {name!r}, {name}, {text!r}, {where[name]!r}, locals())"
            own.append(f"if not ({where[name]}): {told}")
        if name in written:
            own.append(f"if not {name}.is_contiguous(): {refusal}")
        lines += [f"if {name} is not None:", *(f"    {line}" for line in own)] if name in optional else own
    # A tensor that is missing is found out by what it lacks, so that looking for it costs nothing.
    for name in arguments:
        if _forms(arguments[name]) and name not in optional:
            missing.append(f"if {name} is None: refuse({operator!r}, {name!r}, None, {arguments[name]!r}, locals())")
    body, found = "\n        ".join(lines), "\n        ".join([*missing, "raise"])
    exec(
        f"def check({', '.join(arguments)}):\n    try:\n        {body}\n    except AttributeError:\n        {found}",
        scope,
    )
    return scope["check"]


def check_range(operator: str, name: str, index: Tensor, low: int, high: int) -> None:
    """Raises IndexError unless all entries of a CPU tensor are in [low, high).

    Elsewhere asking would wait, and kernels look themselves; but nothing is in an empty range, wherever it is.
    """
    if not index.numel():
        return
    if high <= low:
        raise IndexError(f"{operator}: {name} must be empty where there is nothing to choose from, got {len(index)}")
    if not index.is_cpu:
        return
    least, largest = (int(bound) for bound in index.aminmax())
    if least < low or largest >= high:
        raise IndexError(f"{operator}: {name} must be in [{low}, {high}), got values from {least} to {largest}")


def _forms(text: str) -> list[tuple[str, list[str]]]:
    """The dtype and sizes of each alternative of a description."""
    found = [_FORM.fullmatch(form) for form in text.split(" or ")]
    return [(form[1], [size.strip() for size in form[2].split(",") if size.strip()]) for form in found if form]


def _sizes(name: str, text: str, known: set[str], refusal: str) -> list[str]:
    """Lines that check a tensor's shape, and note the letters that it is the first to say."""
    forms, lines = _forms(text), []
    if len(forms) == 1 and all(set(_LETTER.findall(size)) <= known for size in forms[0][1]):
        return [f"if {name}.shape != {_tuple(forms[0][1])}: {refusal}"]
    for number, (_, sizes) in enumerate(forms):
        new = [size for size in sizes if _LETTER.fullmatch(size) and size not in known]
        known.update(new)
        places = [size if size in new else "_" for size in sizes]
        lines.append(f"{'elif' if number else 'if'} len(shape) == {len(sizes)}:")
        if new:
            lines.append(f"    {_tuple(places)} = shape")
        if len(new) < len(sizes):
            lines.append(f"    if shape != {_tuple(sizes)}: {refusal}")
        elif not sizes:
            lines.append("    pass")
    return [f"shape = {name}.shape", *lines, f"else: {refusal}"]


def _tuple(entries: list[str]) -> str:
    return f"({', '.join(entries)}{',' * (len(entries) == 1)})"


_known_lanes: dict[torch.dtype, int] = {}


def _lanes(tensor: Tensor) -> int:
    """Features that the C++ kernels hold in one vector of this dtype; 0 where there are no such kernels."""
    known = _known_lanes.get(tensor.dtype)
    if known is not None:
        return known
    library = native.library()
    if library is None:
        return 0
    return _known_lanes.setdefault(tensor.dtype, library.vector_bytes // tensor.element_size())


def _refuse(operator: str, name: str, tensor: Any, text: str, seen: dict[str, Any]) -> NoReturn:
    """Says what a tensor had to be, with the sizes and dtypes that were known by then."""
    if tensor is None:
        raise TypeError(f"{operator}: {name} must be a tensor, {text}, got None")
    wanted = []
    for kind, sizes in _forms(text):
        dtypes = _KINDS.get(kind) or (seen[kind].dtype,)
        shape = _tuple([_said(size, seen) for size in sizes])
        wanted.append(f"{' or '.join(map(_short, dtypes))} of shape {shape}")
    contiguous = "contiguous" if tensor.is_contiguous() else "not contiguous"
    raise (ValueError if tensor.dtype in dtypes else TypeError)(
        f"{operator}: {name} must be {', or '.join(wanted)}, on the device of the other tensors, and contiguous where "
        f"it is written to; got {_short(tensor.dtype)} of shape {tuple(tensor.shape)} on {tensor.device}, {contiguous}"
    )


def _refuse_sizes(operator: str, name: str, tensor: Tensor, text: str, wanted: str, seen: dict[str, Any]) -> NoReturn:
    """Says what had to hold of a tensor's sizes."""
    letters = ", ".join(f"{letter} = {seen[letter]}" for letter in sorted(set(_LETTER.findall(wanted))))
    raise ValueError(f"{operator}: {name} must have sizes {text} with {wanted}, got {tuple(tensor.shape)}, {letters}")


def _said(size: str, seen: dict[str, Any]) -> str:
    """A size as a number where it is known."""
    try:
        return str(eval(size, {"lanes": _lanes, "len": len}, seen))
    except NameError:
        return size


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

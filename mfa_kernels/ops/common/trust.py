"""Checks of the tensors that operators are given: kernels read raw memory, so each must be as described.

An operator's tensors are described once, by dtype and sizes. The function that checks them is written from that, as
`namedtuple` writes its methods: it runs at every call, and a loop over descriptions would cost more than a token does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp

_KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "any": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "real": (torch.float32, torch.float64),
    "double": (torch.float64,),
    "float32": (torch.float32,),
    "half": (torch.float16,),
    "int8": (torch.int8,),
    "int32": (torch.int32,),
    "int64": (torch.int64,),
    "bool": (torch.bool,),
}
_LETTER = re.compile(r"[A-Z]")
_FORM = re.compile(r"(\w+)\((.*)\)")


# What several operators take: a mixture's parameters, and the terms that are computed from them beforehand.
PARAMETERS = {"means": "real(K, D)", "loadings": "means(K, D, R)", "noise_variance": "means(D) or means(K, D)"}
WOODBURY = {
    "rows": "means(K, R + noise_variance_dims, D)"
    " or means(K, -(-D // lanes[means_dtype]), R + noise_variance_dims, lanes[means_dtype])",
    "cholesky": "means(K, R, R)",
    "log_det": "means(K)",
    "scale": "means(D)",
    "center": "means(D)",
}


# The rows of those terms, where no noise_variance says whether it is per component.
ROWS = (
    "cholesky(K, R + 1 + per_component, D)"
    " or cholesky(K, -(-D // lanes[cholesky_dtype]), R + 1 + per_component, lanes[cholesky_dtype])"
)


def checks(
    operator: str,
    arguments: dict[str, str],
    *,
    last: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    written: tuple[str, ...] = (),
    where: dict[str, str] | None = None,
    together: dict[str, tuple[str, ...]] | None = None,
) -> str:
    """Returns Python lines that raise where an argument of an operator is not what it has to be; `compiled` takes them.

    They raise TypeError or ValueError, naming the operator and the argument, what was found and what was expected.

    Args:
        operator: its name, for messages.
        arguments: by name, in the order of the operator's. A tensor's is "dtype(sizes)", or several such of
            different numbers of dimensions with "or" between them. The dtype is `any` float, `real` (float32 or
            float64), `double`, `float32`, `half`, `int8`, `int32`, `int64` or `bool`, or the name of a tensor before
            it, whose dtype it has. A size is a number, a capital letter, which stands for the same wherever it is (the
            first tensor with it says what), or an expression of these, of earlier arguments, of their `<name>_dims`
            where they have several alternatives, and of `lanes[<name>_dtype]`, the C++ kernels' vectors. "" is an
            argument that is no tensor, "positive" a number of at least 1, and "5 gradients" a list of five entries, one
            for each gradient.
        last: tensors that are checked after the others, so that an error names them and not the others.
        optional: tensors that may be None.
        written: tensors that results are added to, which must be contiguous.
        where: by name of a tensor, what must hold of its sizes beyond their being equal; an expression of letters.
        together: optional tensors of which all are given or none, by what they are together.
    """
    known, lines, missing = set[str](), list[str](), list[str]()
    leader = {name: names[0] for names in (together or {}).values() for name in names}
    for what, names in (together or {}).items():
        refusal = f"refuse_missing({operator!r}, {what!r}, {names!r}, locals())"
        lines.append(f"if {names[0]} is None and not ({' is None and '.join(names[1:])} is None): {refusal}")
        missing.append(f"if {names[0]} is not None and ({' is None or '.join(names[1:])} is None): {refusal}")
    guard = None
    for name in sorted(arguments, key=lambda name: name in last):
        text = arguments[name]
        if not text:
            continue
        if text == "positive":
            lines.append(f"if {name} < 1: raise ValueError(f'{operator}: {name} must be at least 1, got {{{name}}}')")
            continue
        if text.endswith(" gradients"):
            count = text.split()[0]
            told = f"'{operator}: {name} must have {count} entries, one for each gradient, got ' + str(len({name}))"
            lines.append(f"if len({name}) != {count}: raise ValueError({told})")
            continue
        refusal = f"refuse({operator!r}, {name!r}, {name}, {text!r}, locals())"
        own = _sizes(name, text, known, refusal)
        kind = _forms(text)[0][0]
        several = len(_KINDS.get(kind, ())) > 1
        test = f"not in {kind}_dtypes" if several else f"is not {kind}_dtype"
        own += [f"{name}_dtype = {name}.dtype", f"if {name}_dtype {test}: {refusal}"]
        if where and name in where:
            told = f"refuse_sizes({operator!r}, {name!r}, {name}, {text!r}, {where[name]!r}, locals())"
            own.append(f"if not ({where[name]}): {told}")
        if name in written:
            own.append(f"if not {name}.is_contiguous(): {refusal}")
        # Of tensors that come together the first says whether they do, for all that follow one another.
        before, guard = guard, leader.get(name, name) if name in optional else None
        if guard and guard != before:
            lines.append(f"if {guard} is not None:")
        lines += [f"    {line}" for line in own] if guard else own
    # A tensor that is missing is found out by what it lacks, so that looking for it costs nothing.
    for name in arguments:
        if _forms(arguments[name]) and name not in optional:
            missing.append(f"if {name} is None: refuse({operator!r}, {name!r}, None, {arguments[name]!r}, locals())")
    body, found = "\n        ".join(lines), "\n        ".join([*missing, "raise"])
    return f"    try:\n        {body or 'pass'}\n    except AttributeError:\n        {found}"


def compiled(name: str, signature: str, body: str, scope: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The function of this name, these parameters and these lines, which see `scope` and what `checks` needs."""
    seen: dict[str, Any] = _SCOPE | (scope or {})
    exec(f"def {name}({signature}):\n{body}", seen)
    return seen[name]


def checker(operator: str, arguments: dict[str, str], **rules: Any) -> Callable[..., None]:
    """A function of these arguments that only checks them, as `checks` says."""
    return compiled("check", ", ".join(arguments), checks(operator, arguments, **rules))


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
    dims = "len(shape)" if len(forms) == 1 else f"{name}_dims"
    for number, (_, sizes) in enumerate(forms):
        new = [size for size in sizes if _LETTER.fullmatch(size) and size not in known]
        known.update(new)
        places = [size if size in new else f"_{place}" for place, size in enumerate(sizes)]
        wrong = " or ".join(f"{place} != {size}" for place, size in zip(places, sizes) if size not in new)
        lines.append(f"{'elif' if number else 'if'} {dims} == {len(sizes)}:")
        if new:
            lines.append(f"    {_tuple(places)} = shape")
            lines += [f"    if {wrong}: {refusal}"] * bool(wrong)
        else:
            lines.append(f"    if shape != {_tuple(sizes)}: {refusal}")
    counted = [f"{dims} = len(shape)"] * (len(forms) > 1)
    return [f"shape = {name}.shape", *counted, *lines, f"else: {refusal}"]


def _tuple(entries: list[str]) -> str:
    return f"({', '.join(entries)}{',' * (len(entries) == 1)})"


class _Lanes(dict[torch.dtype, int]):
    """Features that the C++ kernels hold in one vector, by dtype; without them, more than any tensor has."""

    def __missing__(self, dtype: torch.dtype) -> int:
        library = cpp.library()
        if library is None:
            return 1 << 62
        return self.setdefault(dtype, library.vector_bytes // dtype.itemsize)


_lanes = _Lanes()


def _refuse(operator: str, name: str, tensor: Any, text: str, seen: dict[str, Any]) -> NoReturn:
    """Says what a tensor had to be, with the sizes and dtypes that were known by then."""
    if tensor is None:
        raise TypeError(f"{operator}: {name} must be a tensor, {text}, got None")
    wanted: list[str] = []
    for kind, sizes in _forms(text):
        dtypes = _KINDS.get(kind) or (seen[kind].dtype,)
        if wanted and cpp.library() is None and any("lanes" in size for size in sizes):
            continue  # the layout of kernels that are not here
        shape = _tuple([_said(size, seen) for size in sizes])
        wanted.append(f"{' or '.join(map(_short, dtypes))} of shape {shape}")
    contiguous = "contiguous" if tensor.is_contiguous() else "not contiguous"
    raise (ValueError if tensor.dtype in dtypes else TypeError)(
        f"{operator}: {name} must be {', or '.join(wanted)}, and contiguous where it is written to; got "
        f"{_short(tensor.dtype)} of shape {tuple(tensor.shape)}, {contiguous}"
    )


def _refuse_sizes(operator: str, name: str, tensor: Tensor, text: str, wanted: str, seen: dict[str, Any]) -> NoReturn:
    """Says what had to hold of a tensor's sizes."""
    letters = ", ".join(f"{letter} = {seen[letter]}" for letter in sorted(set(_LETTER.findall(wanted))))
    raise ValueError(f"{operator}: {name} must have sizes {text} with {wanted}, got {tuple(tensor.shape)}, {letters}")


def _refuse_missing(operator: str, what: str, names: tuple[str, ...], seen: dict[str, Any]) -> NoReturn:
    """Says which of some tensors that belong together are missing."""
    missing = [name for name in names if seen[name] is None]
    raise ValueError(f"{operator}: {', '.join(missing)} must be given with the rest of the {what}, got None")


def _said(size: str, seen: dict[str, Any]) -> str:
    """A size as a number where it is known."""
    try:
        return str(eval(size, {"lanes": _lanes, "len": len}, seen))
    except NameError:
        return size


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_SCOPE: dict[str, Any] = {
    "refuse": _refuse, "refuse_sizes": _refuse_sizes, "refuse_missing": _refuse_missing,
    "lanes": _lanes, **{f"{kind}_dtypes": dtypes for kind, dtypes in _KINDS.items()},
    **{f"{kind}_dtype": dtypes[0] for kind, dtypes in _KINDS.items() if len(dtypes) == 1},
}  # fmt: skip

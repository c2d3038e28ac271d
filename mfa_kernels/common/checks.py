"""Argument checks whose messages name the argument, what was found and what was expected."""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from mfa_kernels.common.arrays import as_tensor, is_several

MOST_COMPONENTS = (1 << 31) - 1  # and features, because kernels number them in int32
_LARGEST = (1 << 63) - 1


def check_tensor(value: Any, name: str) -> Tensor:
    """Returns `value`, a tensor or an argument of `arrays.as_tensor`, as a dense tensor; raises otherwise."""
    value = as_tensor(value, name)
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {value.layout}")
    return value


def check_floats(value: Any, name: str) -> Tensor:
    """Returns `value` as a dense tensor of a floating-point dtype; raises otherwise. A list may hold integers too."""
    tensor = check_tensor(value, name)
    if tensor.dtype == torch.int64 and isinstance(value, list | tuple):
        tensor = tensor.to(torch.get_default_dtype())
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    return tensor


def check_integers(value: Any, name: str) -> Tensor:
    """Returns `value` as a dense tensor of an integer dtype (not bool); raises otherwise."""
    tensor = check_tensor(value, name)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")
    return tensor


def check_finite(value: Tensor, name: str) -> Tensor:
    """Returns `value` if every entry is finite; raises otherwise."""
    if value.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~value.isfinite()).sum())} entries that are not")
    return value


def check_activations(x: Any, features: int, device: torch.device, name: str = "x") -> Tensor:
    """Returns `x` as a float tensor of shape (..., D) on the device of the parameters; raises otherwise.

    A tensor has to be on that device; other array-likes are moved.
    """
    tensor = check_floats(x, name)
    if tensor.dim() == 0 or tensor.shape[-1] != features:
        raise ValueError(f"{name} must have shape (..., {features}), got {tuple(tensor.shape)}")
    if not isinstance(x, Tensor):
        return tensor.to(device)
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but the mixture is on {device}: move one of them")
    return tensor


def check_parameters(
    means: Any, loadings: Any, noise_variance: Any, log_weights: Any, weights: str = "log_weights"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the four parameters of a mixture as tensors that fit together; raises otherwise.

    `weights` is the name of the last one, for messages.
    """
    given = {"means": means, "loadings": loadings, "noise_variance": noise_variance, weights: log_weights}
    named = {name: check_floats(value, name) for name, value in given.items()}
    means, loadings, noise_variance, log_weights = named.values()
    for name, tensor in named.items():
        if tensor.device != means.device:
            raise ValueError(f"{name} is on {tensor.device}, but means is on {means.device}")
        if tensor.dtype != means.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, but means is {means.dtype}")
    if means.dim() != 2 or 0 in means.shape:
        raise ValueError(f"means must have shape (K, D) with K, D >= 1, got {tuple(means.shape)}")
    components, features = means.shape
    if loadings.dim() == 3 and components != features and loadings.shape[:2] == (features, components):
        raise ValueError(
            f"means (K, D) and loadings (K, D, R) do not fit: one of them is transposed, got {tuple(means.shape)} and "
            f"{tuple(loadings.shape)}"
        )
    if loadings.dim() != 3 or loadings.shape[:2] != (components, features):
        raise ValueError(
            f"loadings must have shape (K, D, R) = ({components}, {features}, R), got {tuple(loadings.shape)}"
        )
    if loadings.shape[2] > features:
        raise ValueError(f"loadings have rank {loadings.shape[2]}, more than the {features} features")
    if noise_variance.shape not in ((features,), (components, features)):
        raise ValueError(
            f"noise_variance must have shape (D,) = ({features},) or (K, D) = ({components}, {features}), "
            f"got {tuple(noise_variance.shape)}"
        )
    if log_weights.shape != (components,):
        raise ValueError(f"{weights} must have shape (K,) = ({components},), got {tuple(log_weights.shape)}")
    return means, loadings, noise_variance, log_weights


def check_mixture(value: Any, name: str = "mfa") -> Any:
    """Returns `value` if it is an `MFA` or a mixture that is spread over processes; raises otherwise."""
    missing = [part for part in ("n_components", "n_features", "rank", "log_prob") if not hasattr(value, part)]
    if missing:
        lacks = f"{type(value).__name__}, which has no {', '.join(missing)}"
        raise TypeError(f"{name} must be a mixture (mfa_kernels.MFA), got {lacks}")
    return value


def check_integer(value: Any, name: str, least: int = 0, most: int = _LARGEST) -> int:
    """Returns `value` as an int in [least, most]; all of Python's indices are allowed, but for True and False."""
    try:
        number = None if is_truth(value) else operator.index(value)
    except Exception:  # any kind: tensors on the meta device raise one of their own
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer, got {shown(value)}{_whole(value)}")
    if not least <= number <= most:
        raise ValueError(f"{name} must be an integer {f'>= {least}' if number < least else f'<= {most}'}, got {number}")
    return number


def _whole(value: Any) -> str:
    """Returns a hint for a float that is a whole number, which may be the result of a division."""
    if is_truth(value) or isinstance(value, str | bytes) or getattr(value, "ndim", None):
        return ""
    try:
        return f": give {int(value)}" if int(value) == value else ""
    except Exception:  # any kind: it is no number
        return ""


def check_number(value: Any, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """Returns `value`, a number for `float`, as a finite float in [least, most]; raises otherwise."""
    try:
        number = None if isinstance(value, str | bytes) or is_truth(value) else float(value)
    except OverflowError:
        number = math.inf
    except Exception:  # any kind, as in `check_integer`
        number = None
    if number is None:
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    if not least <= number <= most:
        raise ValueError(f"{name} must be {f'>= {least:g}' if number < least else f'<= {most:g}'}, got {value!r}")
    return number


def check_positive(value: Any, name: str) -> float:
    """Returns `value` as a finite float above 0; raises otherwise."""
    number = check_number(value, name)
    if not number > 0:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return number


def check_flag(value: Any, name: str) -> bool:
    """Returns `value` as a bool if it is True or False, Python's or NumPy's; raises otherwise."""
    if not is_flag(value):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def is_truth(value: Any) -> bool:
    """True for True and False of any library; some libraries take them for 1 and 0."""
    return is_flag(value) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def is_flag(value: Any) -> bool:
    """True for Python's True and False, and for NumPy's (whose `bool_` is no bool)."""
    return isinstance(value, bool | numpy.bool_)


def check_component(component: Any, components: int, name: str = "component") -> int:
    """Returns `component` as an int in [0, K); raises otherwise."""
    number = check_integer(component, name, -_LARGEST)
    if not 0 <= number < components:
        raise IndexError(f"{name} must be in [0, {components}), got {number}")
    return number


def check_components(value: Any, components: int, name: str = "components") -> list[int]:
    """Returns the components of a list, a range, a tensor or an array as ints in [0, K); raises otherwise."""
    is_one = isinstance(value, str | bytes) or getattr(value, "shape", None) == ()
    if not is_several(value) and isinstance(value, Iterable) and not is_one:
        value = list(value)
    numbers = check_tensor(value, name)
    if numbers.dim() != 1:
        raise ValueError(f"{name} must be of shape (n,), got {tuple(numbers.shape)}")
    if numbers.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    if not len(numbers):  # an empty list has no dtype
        return []
    return [check_component(number, components, name) for number in check_integers(numbers, name).tolist()]


def check_choice(value: Any, choices: tuple[str, ...], name: str) -> str:
    """Returns `value` if it is one of `choices`; raises otherwise."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
    return value


def check_text(value: Any, name: str) -> str:
    """Returns `value` if it is a string; raises otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    return value


def check_iterable(value: Any, name: str, of: str) -> Any:
    """Returns `value` if it is an iterable of the kind that is meant, not a string or a mapping; raises otherwise."""
    accident = isinstance(value, str | bytes | dict) or getattr(value, "shape", None) == ()
    if accident or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be {of}, got {shown(value)}")
    return value


def check_callable(value: Any, name: str) -> Any:
    """Returns `value` if it can be called; raises otherwise."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {shown(value)}")
    return value


def check_callables(value: Any, name: str) -> tuple[Any, ...]:
    """Returns the callables of an iterable (not a string) as a tuple; raises otherwise."""
    found = tuple(check_iterable(value, name, "a sequence of callables"))
    for i, one in enumerate(found):
        check_callable(one, f"{name}[{i}]")
    return found


def check_generator(value: Any, name: str = "generator") -> torch.Generator | None:
    """Returns `value` if it is a generator of random numbers, or None; raises otherwise."""
    if value is not None and not isinstance(value, torch.Generator):
        hint = f": torch.Generator().manual_seed({value}) makes one" if isinstance(value, int) else ""
        raise TypeError(f"{name} must be a torch.Generator or None, got {shown(value)}{hint}")
    return value


def check_model(value: Any, name: str = "model") -> torch.nn.Module:
    """Returns `value` if it is a module; raises otherwise."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
    return value


def check_centroids(value: Any, name: str = "centroids") -> Tensor:
    """Returns centroids, or those of a result of `kmeans`, as a tensor (K, D) of floats; raises otherwise."""
    centroids = getattr(value, "centroids", value)
    if not is_several(centroids):
        raise TypeError(f"{name} must be a KMeansResult or a tensor (K, D), got {type(value).__name__}")
    centroids = check_floats(centroids, name)
    if centroids.dim() != 2 or 0 in centroids.shape:
        raise ValueError(f"{name} must have shape (K, D) with K, D >= 1, got {tuple(centroids.shape)}")
    return centroids


def check_path(value: Any, name: str) -> Path:
    """Returns `value` as a path; raises otherwise."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str) or "\0" in text or not text:
        raise TypeError(f"{name} must be a path, a string or a pathlib.Path, got {shown(value)}")
    return Path(text)


def check_device(value: Any, name: str = "device") -> torch.device:
    """Returns `value` as a device that tensors can be on here; raises otherwise."""
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except Exception as error:  # any kind: each backend that is not there raises its own
        raise ValueError(f"{name} must be a device that is here, got {shown(value)}: {error}") from None
    return device


def check_dtype(value: Any, name: str = "dtype") -> torch.dtype:
    """Returns `value` if it is a real floating-point dtype; raises otherwise."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TypeError(f"{name} must be a floating-point torch.dtype, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Returns words for a value in an error: short, on one line, and no contents of tensors."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    try:
        return " ".join(reprlib.repr(value).split())
    except Exception:  # any kind: a __repr__ may raise anything
        return f"a {type(value).__name__}"

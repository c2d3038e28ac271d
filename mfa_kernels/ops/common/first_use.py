"""The first use of a GPU kernel on a machine: its own results are compared with plain PyTorch before it is trusted.

Nobody has tried every chip, driver and compiler. So the first call of a kernel with new machine code (a family, what it
was specialised for, the chip, the versions, the sources) is checked on a few of the caller's own rows, and what comes
of it is kept in a file: later calls of any process pay a look into a dictionary. A kernel that does not compile or
launch, or is wrong, gives way to one with a careful configuration, then to plain PyTorch, after one warning.

A kernel that takes the process with it (an illegal access leaves no GPU to go on with) is found by its file, which is
written before it runs: the next process takes plain PyTorch.

``MFA_KERNELS_TRUST``: "check" (the default), "always" (every call, for debugging) or "off".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mfa_kernels.common.files import atomic_write_json
from mfa_kernels.ops.common import backends, configs, cpp, cuda

MODES = ("check", "always", "off")
DEFAULT, CAREFUL, PLAIN = "default", "careful", "plain"
"""The configurations of a kernel that are tried, one after the other; the last is plain PyTorch."""

Result = TypeVar("Result")

# What a process cannot go on after: its memory on the GPU is lost.
_FATAL = re.compile(r"(?i)illegal memory access|misaligned address|unspecified launch failure|device-side assert|ECC")
_TRYING = "trying"

_PATIENCE = 8  # calls with nothing to check, after which a process asks no more

_settled: dict[tuple[Any, ...], str] = {}  # by key, for this process
_unchecked: dict[tuple[Any, ...], int] = {}


class Trial(NamedTuple):
    """How a kernel is run and checked.

    Attributes:
        kernel: runs it.
        plain: what serves instead.
        error: of its result, and of what `written` was before, the largest error over what is allowed: more than 1, or
            NaN, is wrong; None where there was nothing to check (no rows, none that are finite).
        written: tensors that it changes in place.
        careful: whether a configuration that asks less of a chip changes anything (`configs.CAREFUL`).
    """

    kernel: Callable[[], Any]
    plain: Callable[[], Any]
    error: Callable[[Any, Sequence[Tensor]], float | None]
    written: Sequence[Tensor] = ()
    careful: bool = False


def served(family: str, like: Tensor, shape: tuple[Any, ...], trial: Trial) -> Any:
    """Returns what a kernel computes, or plain PyTorch in its stead.

    Args:
        family: of kernels, as a table and a warning name it.
        like: a tensor on the device.
        shape: what else its machine code depends on: rank, dtypes, the bucket of tokens.
        trial: how it is run and checked.

    Raises:
        RuntimeError: where MFA_KERNELS_BACKEND asks for the kernel and it fails, and after an error that the GPU does
            not survive; with MFA_KERNELS_TRUST=always, for every call with a wrong result.
    """
    how = mode()
    if how == "off" or not _watches(like):
        return trial.kernel()
    key = family, like.device.index, shape
    rung = _settled.get(key)
    if rung is None:
        if _captures(like):  # to check would wait for the device
            return trial.kernel()
        rung = _known(key, like)
    if rung is None:
        return _first(key, like, trial)
    if rung == PLAIN:
        return trial.plain()
    with _configured(rung):
        result = trial.kernel()
    if how == "always" and not trial.written and not _captures(like):
        found = trial.error(result, ())
        if found is not None and not found <= 1:
            raise RuntimeError(f"{family}: the result is off by {found:.3g} times what is allowed ({_facts(like)})")
    return result


def mode() -> str:
    """What MFA_KERNELS_TRUST says.

    Raises:
        ValueError: it says something else.
    """
    found = os.environ.get("MFA_KERNELS_TRUST", "check")
    if found not in MODES:
        raise ValueError(f"MFA_KERNELS_TRUST must be one of {', '.join(MODES)}, got {found!r}")
    return found


def _watches(like: Tensor) -> bool:
    """On a GPU; in the interpreter, where it is asked for."""
    return like.device.type == "cuda" or (like.device.type == "cpu" and "MFA_KERNELS_TRUST" in os.environ)


def _captures(like: Tensor) -> bool:
    return like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _insists() -> bool:
    """True where plain PyTorch is not wanted."""
    return backends.asked_for() == "triton"


def _first(key: tuple[Any, ...], like: Tensor, trial: Trial) -> Any:
    """Runs the kernel for the first time, and settles what serves from now on."""
    before = [tensor.clone() for tensor in trial.written]
    reasons = []
    for rung in (DEFAULT, CAREFUL) if trial.careful else (DEFAULT,):
        _write(key, like, _TRYING, rung)
        try:
            with _configured(rung):
                result = trial.kernel()
            found = trial.error(result, before)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            _forget(key, like)  # no word on the kernel
            raise
        except Exception as error:
            if _FATAL.search(str(error)):
                raise RuntimeError(
                    f"{key[0]}: the GPU does not go on after this error of a kernel's first use ({_facts(like)}); the "
                    f"next process takes plain PyTorch for it: {_line(error)}"
                ) from error
            reasons.append(f"{rung}: {_line(error)}")
        else:
            if found is None:  # the next call is the first again, so many times
                _forget(key, like)
                _unchecked[key] = _unchecked.get(key, 0) + 1
                if _unchecked[key] >= _PATIENCE:
                    _settled[key] = rung  # for this process
                return result
            if found <= 1:
                _settle(key, like, rung, reasons)
                return result
            reasons.append(f"{rung}: off by {found:.3g} times what is allowed")
        for tensor, kept in zip(trial.written, before):
            tensor.copy_(kept)
    if _insists():
        _forget(key, like)
        raise RuntimeError(f"MFA_KERNELS_BACKEND=triton, but {key[0]} failed ({_facts(like)}): {'; '.join(reasons)}")
    _settle(key, like, PLAIN, reasons)
    return trial.plain()


@contextlib.contextmanager
def _configured(rung: str) -> Iterator[None]:
    if rung != CAREFUL:
        yield
    else:
        with configs.override(*configs.CAREFUL), cuda.hidden():
            yield


def _settle(key: tuple[Any, ...], like: Tensor, rung: str, reasons: Sequence[str]) -> None:
    _settled[key] = rung
    _write(key, like, rung, "; ".join(reasons))
    if rung != DEFAULT:
        _say(key, rung, "; ".join(reasons), like)


def _known(key: tuple[Any, ...], like: Tensor) -> str | None:
    """The configuration that an earlier process settled on; None where nothing is known."""
    try:
        found = json.loads(_path(key, like).read_text())
        state, note = found["state"], str(found["note"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if state == _TRYING:
        if _lives(found):
            return None
        note, state = "a process came to its end while it ran for the first time", PLAIN
    if state not in (DEFAULT, CAREFUL, PLAIN):
        return None
    _settled[key] = state
    if state != DEFAULT:
        _say(key, state, note, like)
    return state


def _lives(found: dict[str, Any]) -> bool:
    """True where the process that tries is there, or may be: one on another machine, for an hour."""
    if found.get("pid") == os.getpid() and found.get("host") == socket.gethostname():
        return True
    if found.get("host") != socket.gethostname():
        return time.time() - float(found.get("time", 0)) < 3600
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return True


def folder() -> Path:
    """Where the files are."""
    return cpp.cache_folder() / "trust"


def entries() -> list[dict[str, Any]]:
    """What the files say, for a table; those that cannot be read are left out."""
    found = []
    for path in sorted(folder().glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(path.read_text()))
    return found


def forget() -> int:
    """Removes all files, so that every kernel is checked anew; returns how many there were."""
    _settled.clear()
    paths = list(folder().glob("*.json"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def _path(key: tuple[Any, ...], like: Tensor) -> Path:
    code = repr((key[0], key[2], _facts(like), _sources()))
    return folder() / f"{hashlib.sha256(code.encode()).hexdigest()[:24]}.json"


def _write(key: tuple[Any, ...], like: Tensor, state: str, note: str) -> None:
    content = {
        "family": key[0], "shape": [str(part) for part in key[2]], "machine": _facts(like), "state": state,
        "note": note, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time(),
    }  # fmt: skip
    with contextlib.suppress(OSError):  # a cache that cannot be written to: every process checks
        atomic_write_json(_path(key, like), content)


def _forget(key: tuple[Any, ...], like: Tensor) -> None:
    with contextlib.suppress(OSError):
        _path(key, like).unlink(missing_ok=True)


def _facts(like: Tensor) -> str:
    return _facts_of(like.device)


@functools.cache
def _facts_of(device: torch.device) -> str:
    """The machine, as far as machine code depends on it."""
    try:
        import triton

        compiler = f"triton {triton.__version__}"
    except ImportError:
        compiler = "no triton"
    if device.type != "cuda":
        return f"{platform.machine()}, torch {torch.__version__}, {compiler}"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", int)()
    return f"{name} ({capability[0]}.{capability[1]}), driver {driver}, torch {torch.__version__}, {compiler}"


@functools.cache
def _sources() -> str:
    """A fingerprint of the kernels' sources."""
    digest = hashlib.sha256()
    folders = (Path(__file__).parents[1], ("*.py",)), (cpp.source_folder("cuda"), ("*.cu", "*.cuh", "*.cpp", "*.h"))
    for path in sorted(path for place, names in folders for name in names for path in place.rglob(name)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _say(key: tuple[Any, ...], rung: str, why: str, like: Tensor) -> None:
    serves = "a careful configuration serves it" if rung == CAREFUL else "plain PyTorch serves it"
    warnings.warn(
        f"mfa_kernels: {key[0]} did not pass its first use on {_facts(like)} ({why}); {serves}: slower, the same "
        "results. `mfa-kernels doctor --check` tries again.",
        RuntimeWarning,
        stacklevel=5,
    )


def worst(found: Tensor, expected: Tensor, allowed: Tensor) -> float:
    """The largest |found - expected| / allowed; infinite where one is NaN and the other is not, 0 of nothing."""
    if not found.numel():
        return 0.0  # callers have looked whether there is something
    found, expected = found.double(), expected.double()
    gap = (found - expected).abs() / allowed.double()
    gap = torch.where(found == expected, 0.0, gap)
    gap = torch.where(found.isnan() & expected.isnan(), 0.0, gap)
    return float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max())


def spread(count: int, device: torch.device, most: int = 8) -> Tensor:
    """At most so many of `count` numbers, evenly spread, the first and the last among them."""
    return torch.linspace(0, max(0, count - 1), min(count, most), device=device).round().long()

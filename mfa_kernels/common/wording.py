"""Errors and warnings of the library in the words of the command line's options, on one line."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_OPTIONS = {
    "n_components": ("components",),
    "n_clusters": ("components",),
    "name": ("model",),
    "new_tokens": ("max_new_tokens",),
    "folder_or_hub_id": ("mfa", "input"),
    "folder": ("out", "output"),
    "path": ("out", "output"),
    "texts": ("text",),
    "text": ("text",),
    "prompts": ("prompt",),
    "threshold": ("gate",),
}
"""Options of the command line by the arguments of functions that they set, where the names differ."""

_LEADING = re.compile(r"^((?:[\w.-]+: )?)([a-z_]+)(\[\d+\])?(?=:| must | needs | = )")
_SETTING = re.compile(r"((?:: here |; ))([a-z_]+)(?= = )")
_FLAG = re.compile(r"\b(overwrite|resume) ?= ?True\b")
_PHRASES = {
    " (a text itself is given in a list)": "",
    " (group=False fits alone)": "",
    "MFA.from_reference_checkpoint reads": "`mfa-kernels convert` reads",
}
"""Phrases for callers from Python, and those of the command line in their place."""


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Returns a message with options of a command in place of arguments of functions.

    Args:
        message: a message whose first word names an argument, as in `mfa_kernels.common.checks`; lines become one.
        options: the options of the command, by the attribute of its parsed arguments; other words stay as they are.
    """

    def option(name: str) -> str:
        return next((options[own] for own in _OPTIONS.get(name, (name,)) if own in options), name)

    message = " ".join(line.strip() for line in message.splitlines() if line.strip())
    for phrase, instead in _PHRASES.items():
        message = message.replace(phrase, instead)
    message = _FLAG.sub(lambda found: option(found[1]), message)
    message = _LEADING.sub(lambda found: found[1] + option(found[2]), message)
    return _SETTING.sub(lambda found: found[1] + option(found[2]), message)


def of_error(error: Exception, options: Mapping[str, str]) -> str:
    """Returns the words of an error, as `in_options`; for errors of the system, without their number."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror.lower()}"
    return in_options(message or type(error).__name__, options)


@contextmanager
def told_warnings(command: str, options: Mapping[str, str]) -> Iterator[None]:
    """Writes warnings of this package as one line each on standard error, for a `with` block; others as before."""
    with warnings.catch_warnings():
        before = warnings.showwarning
        # The command says so itself at its end, and what was saved.
        warnings.filterwarnings("ignore", "fit: interrupted")

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            if file is not None or not _is_ours():
                before(message, category, filename, lineno, file, line)
                return
            text = str(message).removeprefix("mfa_kernels: ").removeprefix(f"{command}: ")
            print(f"mfa-kernels {command}: {in_options(text, options)}", file=sys.stderr)

        warnings.showwarning = show
        yield


def _is_ours() -> bool:
    """True where this package calls `warn`; the line that the warning names may be in other code."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "mfa_kernels"

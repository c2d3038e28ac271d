"""What the command line says of what comes from below: errors and warnings in the words of its options, on one line."""

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
"""Arguments of functions, and what holds them on a command line, where that has another name."""

_LEADING = re.compile(r"^((?:[\w.-]+: )?)([a-z_]+)(\[\d+\])?(?=:| must | needs | = )")
_SETTING = re.compile(r"((?:: here |; ))([a-z_]+)(?= = )")
_FLAG = re.compile(r"\b(overwrite|resume) ?= ?True\b")
_PHRASES = {
    " (a text itself is given in a list)": "",
    " (group=False fits alone)": "",
    "MFA.from_reference_checkpoint reads": "`mfa-kernels convert` reads",
}
"""What a caller from Python is told, and who types a command is not."""


def in_options(message: str, options: Mapping[str, str]) -> str:
    """A message with the options of a command in the place of the arguments that hold them.

    Args:
        message: whose first word names an argument, as those of `mfa_kernels.common.checks` do; lines become one.
        options: of the command, by the attribute of its parsed arguments; others stay as they are.
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
    """What an error says, as `in_options`; of the system's, what is wrong with which file, without a number."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror.lower()}"
    return in_options(message or type(error).__name__, options)


@contextmanager
def told_warnings(command: str, options: Mapping[str, str]) -> Iterator[None]:
    """Warnings that this package gives are a line each on standard error; those of others are as they were."""
    with warnings.catch_warnings():
        before = warnings.showwarning
        # The command says it itself, at its end and with what was saved.
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
    """Whether it is this package that warns: by who calls `warn`, as the line that it names may be anybody's."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in ("warnings", "_py_warnings"):
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "mfa_kernels"

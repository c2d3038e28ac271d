"""Names of models and tokenizers in whatever may be passed on: a mixture, its card, a store, a page.

The rule, for the whole package: what is written says where a model came from by

- the id of a Hugging Face hub repository, where it came from one, be it through the folders of the hub's cache;
- "tiny_lm", for the model that ships with the package;
- "local:" and the last name of its folder, for any other, as in "local:secret-project".

No other part of a path of this machine is written. Which model a local name is of, `models.fingerprint` can tell; to
load one, its folder has to be named again. What a user gives as `extra` is the user's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

BUNDLED = "tiny_lm"  # the name of the small model that ships with the package, never looked up on the hub
LOCAL = "local:"  # before the name of a model that is in a folder of somebody's; no hub id has a colon

_CACHED = re.compile(r"models--(?P<id>[^/\\]+)")  # a folder of the hub's cache


def shareable(said: str) -> str:
    """The name by which a model or tokenizer may be told of, given its hub id or its path; its own where it is one.

    A string that can be both is a path where there is such a folder, as it is for transformers. Paths of other
    systems, "~" and "file:" are understood.
    """
    path = unquote(said[len("file:") :]) if said.lower().startswith("file:") else said
    parts = [part for part in re.split(r"[/\\]+", path.removeprefix(LOCAL)) if part not in ("", ".", "..")]
    if said == BUNDLED or parts[-3:] == ["mfa_kernels", "data", BUNDLED]:  # of any installation
        return BUNDLED
    for folder, inside in pairwise(parts):
        if (cached := _CACHED.fullmatch(folder)) and inside == "snapshots":
            return cached["id"].replace("--", "/")
    if _is_hub_id(said) and not os.path.isdir(said):
        return said
    return LOCAL + (parts[-1] if parts else "model")


def local_name(said: Any) -> str | None:
    """Of a model in a folder of somebody's that `shareable` has named, the name; None for others."""
    return said[len(LOCAL) :] if isinstance(said, str) and said.startswith(LOCAL) else None


def local_paths(content: Any, where: str) -> Iterator[tuple[str, str]]:
    """Absolute paths of what is on this machine, in a value of JSON: (place, path)."""
    if isinstance(content, str):
        if _is_here(content):
            yield where, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from local_paths(key, where)
            yield from local_paths(value, f"{where}[{key!r}]")
    elif isinstance(content, list | tuple):
        for i, value in enumerate(content):
            yield from local_paths(value, f"{where}[{i}]")


def _is_hub_id(said: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(said)
    except HFValidationError:
        return False
    return True


def _is_here(text: str) -> bool:
    text = unquote(text[len("file:") :]) if text.lower().startswith("file:") else text
    try:
        path = Path(re.sub("^//+", "/", text)).expanduser()
        return path.is_absolute() and path.parent != path and path.exists()
    except (OSError, ValueError, RuntimeError):  # too long for a name, NUL, the home of nobody
        return False

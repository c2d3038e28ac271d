"""Launch configurations of the GPU kernels: frozen values, by shape bucket and architecture.

Nothing is tuned while it runs. `default` is analysis (registers, shared memory, bytes per flop; ops/*/README.md);
`mfa-kernels tune` measures alternatives on one GPU and writes JSON, which `configured` prefers where it exists.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from mfa_kernels.common.reading import FLAG, check_fields, integer, read_json, shown

FOLDER = Path(__file__).parents[1] / "tuned"
"""Measured configurations that ship with the package, one JSON per GPU: none yet."""


@dataclass(frozen=True)
class Scan:
    """Tokens x components: a program owns `tokens` x 64 logits, and multiplies `width` rows of loadings at a time."""

    tokens: int
    width: int  # 1, 2 or 4
    features: int  # inner step of the products
    warps: int
    stages: int
    swizzle: int = 8  # token tiles that share a band of components in the second-level cache
    descriptors: bool = True  # tensor descriptors (TMA) where the chip has them


@dataclass(frozen=True)
class Pairs:
    """Pairs sorted by component: a program owns up to `pairs` pairs of one component."""

    pairs: int
    features: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Gradient(Pairs):
    """Backward on sorted pairs: a program owns one component and `features` features, and loops over its pairs."""


@dataclass(frozen=True)
class AllLogits:
    """Every logit of some tokens, from differences: a program owns `tokens` tokens and `components` components."""

    tokens: int
    components: int
    features: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Statistics(Pairs):
    """EM's sums over sorted pairs: a program owns `features` features of one component, and loops over its pairs."""


@dataclass(frozen=True)
class Nearest:
    """K-means: a program owns `tokens` rows and a band of the centroids, `centroids` of them at a time."""

    tokens: int
    centroids: int
    features: int  # inner step of the products
    warps: int
    stages: int
    swizzle: int = 16  # tiles of rows that share the bands in the second-level cache
    descriptors: bool = True  # tensor descriptors (TMA) where the chip has them


KINDS: dict[str, type[Any]] = {
    "scan": Scan,
    "pairs": Pairs,
    "gradient": Gradient,
    "dense": AllLogits,
    "statistics": Statistics,
    "nearest": Nearest,
}
"""Every kind by its name in tuned files and for `mfa-kernels tune`."""

_KEY = re.compile(r"[a-z]+/\d+/\d+")
_LARGEST = 1 << 16  # of any number in a configuration

Config = TypeVar("Config")

_ANALYSED: dict[tuple[type, int], Any] = {
    (Scan, 80): Scan(tokens=128, width=2, features=64, warps=8, stages=3, descriptors=False),
    (Scan, 90): Scan(tokens=128, width=4, features=64, warps=8, stages=4),
    (Scan, 100): Scan(tokens=128, width=4, features=64, warps=8, stages=3),
    (Scan, 120): Scan(tokens=64, width=2, features=64, warps=4, stages=3),  # 99 KB of shared memory
    (Pairs, 80): Pairs(pairs=4, features=128, warps=4, stages=3),
    (Gradient, 80): Gradient(pairs=4, features=256, warps=4, stages=1),
    (AllLogits, 80): AllLogits(tokens=8, components=8, features=128, warps=4, stages=1),
    (Statistics, 80): Statistics(pairs=4, features=256, warps=4, stages=1),
    (Nearest, 80): Nearest(tokens=128, centroids=128, features=64, warps=8, stages=3, descriptors=False),
    (Nearest, 90): Nearest(tokens=256, centroids=128, features=64, warps=8, stages=4),
    (Nearest, 100): Nearest(tokens=256, centroids=128, features=64, warps=8, stages=4),
    (Nearest, 120): Nearest(tokens=128, centroids=64, features=64, warps=8, stages=3),  # 99 KB of shared memory
}

_overrides: dict[type, Any] = {}


def architecture(device: torch.device, interpreted: int = 80) -> int:
    """90 for a GPU of compute capability 9.0, and so on; for a CPU, `interpreted`."""
    if device.type != "cuda":
        return interpreted
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def bucket(size: int) -> int:
    """The power of two at or above a size: shapes in one bucket share a configuration."""
    return 1 << max(0, size - 1).bit_length()


def default(kind: type[Config], architecture: int, tokens: int, components: int) -> Config:
    """The configuration for an architecture (80, 90, 100, ...) and a bucket of tokens and components.

    A chip that is not listed takes the entry of the nearest older one.
    """
    listed = max((a for k, a in _ANALYSED if k is kind and a <= max(architecture, 80)), default=80)
    chosen = _ANALYSED[kind, listed]
    if kind is Scan:  # few tokens: a tile no larger than they are
        smaller = min(chosen.tokens, max(16, bucket(tokens)))
        if smaller < chosen.tokens:
            many = smaller > 64 or (listed, smaller) == (100, 64)  # where 4 warps would spill (`python -m bench.aot`)
            chosen = replace(chosen, tokens=smaller, warps=chosen.warps if many else 4)
    return chosen


def configured(kind: type[Config], like: torch.Tensor, tokens: int, components: int) -> Config:
    """The configuration to launch with on the device of `like`: overridden, tuned, or the default."""
    if kind in _overrides:
        return _overrides[kind]
    tuned = None
    if like.device.type == "cuda":
        tuned = tuned_entries(torch.cuda.get_device_name(like.device)).get(key(kind, tokens, components))
    return kind(**tuned) if tuned else default(kind, architecture(like.device), tokens, components)


@contextlib.contextmanager
def override(*configs: Any) -> Iterator[None]:
    """Launches with these configurations, one per kind: for tuning and for tests."""
    before = dict(_overrides)
    _overrides.update({type(config): config for config in configs})
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


CAREFUL = (
    Scan(tokens=64, width=2, features=64, warps=4, stages=2, descriptors=False),
    Nearest(tokens=64, centroids=64, features=64, warps=4, stages=2, descriptors=False),
)
"""What asks least of a chip: where a kernel does not pass its first use with another (first_use.py)."""


def file_name(device_name: str) -> str:
    """The JSON file of a GPU, from the name that its driver gives it."""
    return "".join(c if c.isalnum() else "_" for c in device_name) + ".json"


def tuned_folder() -> Path:
    """The folder that `mfa-kernels tune` writes to: $MFA_KERNELS_CONFIGS, or the user's configuration folder."""
    chosen = os.environ.get("MFA_KERNELS_CONFIGS")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "mfa_kernels"


def name_of(kind: type) -> str:
    """The name of a kind in `KINDS`."""
    return next(name for name, named in KINDS.items() if named is kind)


def key(kind: type, tokens: int, components: int) -> str:
    """The name in tuned files of a kind for a bucket of tokens and components."""
    return f"{name_of(kind)}/{bucket(tokens)}/{bucket(components)}"


@functools.cache
def tuned_entries(device_name: str) -> dict[str, dict[str, Any]]:
    """The entries of a GPU's tuned files by `key`, read once per process."""
    entries: dict[str, dict[str, Any]] = {}
    for folder in (FOLDER, tuned_folder()):  # the user's own measurements come last, and win
        path = folder / file_name(device_name)
        if path.is_file():
            entries.update(read(path))
    return entries


def read(path: Path) -> dict[str, Any]:
    """The configurations in a file, by kernel and shape.

    Raises:
        FileNotFoundError, ValueError: naming the file, and the entry that is not the configuration of a kernel.
    """
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold an object of configurations, got {shown(entries)}")
    for key, values in entries.items():
        kind = KINDS.get(key.split("/")[0])
        if kind is None or not _KEY.fullmatch(key):
            raise ValueError(f"{path}: {shown(key)}: expected kind/tokens/components, of the kinds {', '.join(KINDS)}")
        kinds = {field.name: FLAG if field.type in (bool, "bool") else integer(1, _LARGEST) for field in fields(kind)}
        check_fields(values, kinds, f"{path}: {key}")
        if unknown := values.keys() - kinds.keys():
            raise ValueError(f"{path}: {key}: must have exactly {', '.join(kinds)}, got {shown(sorted(unknown))}")
    return entries

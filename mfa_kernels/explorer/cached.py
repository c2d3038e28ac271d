"""Assignments and layouts kept beside a store, so that a second look at a mixture begins at once.

`STORE.explored/` has a file for each mixture and kind of result; its name holds a checksum of the mixture's parameters
and of the store's manifest, so that a result of others is never taken. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mfa_kernels.common import checksum
from mfa_kernels.common.files import atomic_save_safetensors
from mfa_kernels.common.reading import read_safetensors
from mfa_kernels.data.store import MANIFEST
from mfa_kernels.interpret.contexts import Assignments, assignments

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore
    from mfa_kernels.mixture.mfa import MFA

_VERSION = "1"
_MOST_LATENTS = 1 << 28  # numbers, 1 GiB: of more, latents are computed for the region that is looked at


class Cache:
    """A folder of tensors that can be computed again.

    Args:
        mfa, store: what they are computed from.
    """

    def __init__(self, mfa: MFA, store: ActivationStore) -> None:
        parameters = {
            name: tensor.detach().cpu() for name, tensor in mfa.state_dict().items() if torch.is_tensor(tensor)
        }
        facts = [_VERSION, mfa.precision, checksum.of_tensors(parameters), checksum.of_file(store.folder / MANIFEST)]
        self.key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        self.folder = Path(f"{store.folder}.explored")

    def get(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns what `compute` returned before, or does now."""
        found = self.read(name)
        if found is None:
            found = compute()
            self.write(name, found)
        return found

    def read(self, name: str) -> dict[str, Tensor] | None:
        """Returns what was written; None where there is nothing that can be read."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            return read_safetensors(path)[0]
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is made again: {error}", stacklevel=2)
            return None

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors; where the folder cannot be written, they are computed again the next time."""
        try:
            self.folder.mkdir(exist_ok=True)
            atomic_save_safetensors(tensors, self._path(name))
        except OSError as error:
            warnings.warn(f"{self.folder} cannot be written, nothing is kept there: {error}", stacklevel=2)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{self.key}.safetensors"


def cached_assignments(cache: Cache, mfa: MFA, store: ActivationStore, progress: bool = True) -> Assignments:
    """Returns `assignments` of a mixture and a store, with latents where they are few enough to be kept."""
    latents = 0 < len(store) * mfa.rank <= _MOST_LATENTS

    def compute() -> dict[str, Tensor]:
        made = assignments(mfa, store, latents=latents, progress=progress)
        tensors = {
            "components": made.components,
            "responsibilities": made.responsibilities,
            "distances": made.distances,
        }
        return tensors if made.latents is None else {**tensors, "latents": made.latents}

    found = cache.get("assignments", compute)
    rows = {name: (len(store),) for name in ("components", "responsibilities", "distances")}
    expected: dict[str, tuple[int, ...]] = {**rows, **({"latents": (len(store), mfa.rank)} if latents else {})}
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != expected:  # not by us
        cache.write("assignments", found := compute())
    parts = (found["components"], found["responsibilities"], found["distances"], found.get("latents"))
    return Assignments(*parts, mfa.n_components)

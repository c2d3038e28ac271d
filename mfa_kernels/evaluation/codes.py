"""The codes of many activations in one file, written without holding them in memory.

A file in the safetensors format, of N tokens and P active pairs of a token and a component:

    offsets           (N + 1,) int64; the pairs of token n are [offsets[n], offsets[n + 1])
    components        (P,) int32, the most responsible of a token first
    responsibilities  (P,)
    latents           (P, R), E[z | x, k]
    dropped           (N,); the pairs that a token was left without add up to no more

A token without a density under the mixture has no pairs, and NaN as `dropped`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mfa_kernels.common.arrays import is_array
from mfa_kernels.common.checks import check_flag, check_integer, check_path
from mfa_kernels.common.files import StrPath, atomic_save_safetensors, check_writable, temporary_folder
from mfa_kernels.common.modes import door, read
from mfa_kernels.common.places import CODES, check_place
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.data.source import as_rows, as_source
from mfa_kernels.mixture.decomposition import Decomposition, check_decomposition
from mfa_kernels.mixture.functional import compute_dtype

_BATCH = 8192

LAYOUT = (
    "the active pairs of token n are rows offsets[n] to offsets[n + 1] of components (P,), responsibilities (P,) and "
    "latents (P, R), the most responsible component first; dropped (N,) bounds the responsibility that is left out"
)
"""The description of the file, as "layout" in its metadata."""


class Written(NamedTuple):
    """Counts of tokens, of their active pairs, and of tokens without pairs because they have no density."""

    tokens: int
    pairs: int
    without: int


@door
@torch.no_grad()
def write_codes(
    mfa: Decomposition, activations: Any, path: StrPath, top_k: int | None = 8, *, progress: bool = True
) -> Written:
    """Encodes activations, batch by batch, and writes what is active.

    Meanwhile the parts are in files next to `path`, which take as much room again.

    Args:
        mfa: the mixture, or another decomposition.
        activations: anything `fit` takes, (N, D), such as a store. An iterable of batches is read once, and none of
            them is held. All are moved to the mixture's device.
        path: of the file; one of codes that is there is replaced.
        top_k: most components per token; None keeps every active one.
        progress: show a bar when it takes more than two seconds.

    Returns:
        What was written, in numbers.

    Raises:
        TypeError, ValueError: naming the batch that does not fit.
        OSError: naming the file that cannot be written; FileExistsError where something else than codes is there, or
            the folder is a store.
    """
    like = check_decomposition(mfa).directions(0)
    top_k, progress = None if top_k is None else check_integer(top_k, "top_k", 1), check_flag(progress, "progress")
    path = check_path(path, "path")
    check_place(path, CODES, "path")
    check_writable(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = compute_dtype(like)[0].dtype
    kinds = {"components": torch.int32, "responsibilities": dtype, "latents": dtype, "dropped": dtype}
    counts = [torch.zeros(1, dtype=torch.int64)]
    batches, total = _batches(activations)
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder(path))
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in kinds}
        bar = stack.enter_context(
            progress_bar(total=total, desc="encode", unit="batch", delay=2, progress=progress)
        )  # fmt: skip
        for i, batch in enumerate(batches):
            rows = as_rows(batch, f"activations: batch {i}")
            if rows.shape[1] != mfa.n_features:
                raise ValueError(
                    f"activations: batch {i} has {rows.shape[1]} features, but the mixture has {mfa.n_features}"
                )
            code = mfa.code(rows.to(like.device), top_k)
            held = code.components >= 0
            counts.append(held.sum(1).cpu())
            for name in ("components", "responsibilities", "latents"):
                _append(files[name], getattr(code, name)[held], kinds[name])
            _append(files["dropped"], code.dropped, kinds["dropped"])
            bar.update()
        tensors = {"offsets": torch.cat(counts).cumsum(0)}
        for name, file in files.items():
            file.flush()
            tensors[name] = _mapped(folder / name, kinds[name])
        tensors["latents"] = tensors["latents"].view(-1, len(like)) if len(like) else torch.empty(
            len(tensors["components"]), 0, dtype=dtype
        )  # fmt: skip
        atomic_save_safetensors(tensors, path, {"layout": LAYOUT})
        without = int((tensors["offsets"].diff() == 0).sum())
        done = Written(len(tensors["dropped"]), len(tensors["components"]), without)
        tensors.clear()  # the tensors are views of files that are deleted now
    return done


def _batches(activations: Any) -> tuple[Iterator[Any], int | None]:
    """Batches of anything `fit` takes, and how many if that is known; those of an iterable as it makes them."""
    whole = is_array(activations) or (hasattr(activations, "rows") and hasattr(activations, "n_features"))
    if not whole and isinstance(activations, Iterable) and not isinstance(activations, str | bytes | dict):
        return read(activations), len(activations) if isinstance(activations, Sized) else None
    source = as_source(activations)
    starts = range(0, len(source), _BATCH)
    return (source.chunk(start, min(start + _BATCH, len(source))) for start in starts), len(starts)


def _append(file: IO[bytes], values: Tensor, dtype: torch.dtype) -> None:
    values.to("cpu", dtype).contiguous().numpy().tofile(file)


def _mapped(path: Path, dtype: torch.dtype) -> Tensor:
    """Returns the values in a file, (n,), mapped, so that they are read when they are used."""
    empty = torch.empty(0, dtype=dtype)
    if not path.stat().st_size:
        return empty
    return torch.from_numpy(np.memmap(path, empty.numpy().dtype, "r+"))

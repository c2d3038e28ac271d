"""Regions as the latents of delphi (package eai-delphi), which explains and scores them with language models.

A cache of delphi is a folder for each hooked module: tokens in windows of equal length, and for each latent where it is
active and how much. Here a latent is a region, active on the tokens that it owns.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_choice, check_flag, check_integer, check_path, shown
from mfa_kernels.common.files import StrPath, atomic_save_safetensors, atomic_write_json
from mfa_kernels.common.sharing import shareable
from mfa_kernels.interpret.contexts import Assignments, ensure_assignments
from mfa_kernels.mixture.decomposition import Decomposition

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore


def write_delphi_cache(
    folder: StrPath,
    mfa: Decomposition,
    store: ActivationStore,
    *,
    context: int = 32,
    strength: str = "closeness",
    splits: int = 5,
    overwrite: bool = False,
    assigned: Assignments | None = None,
    progress: bool = True,
) -> Path:
    """Writes what delphi's `LatentDataset(raw_dir=folder, ...)` reads; returns the folder of the module.

    Documents are cut into windows; the last of each is filled up with its last token, on which nothing is active. A
    token whose activation was not kept has no region.

    Args:
        folder: for caches; a module's folder in it is named by the store's layer.
        mfa: the mixture, or another decomposition.
        store: activations with their tokens.
        context: tokens of a window; a multiple of delphi's `example_ctx_len`, which is 32 unless told otherwise.
        strength: of an activation, "responsibility", which is nearly always near 1, or "closeness", the same over
            1 + distance / sqrt(D), so that delphi's samples by quantiles reach from the center of a region outwards.
        splits: files, each with a part of the regions.
        overwrite: replace a cache of this module that is there.
        assigned: what `assignments` returned; computed here when None.
        progress: show a progress bar.

    Raises:
        FileExistsError: naming the cache that is there.
        TypeError, ValueError: naming the argument that does not fit.
    """
    overwrite = check_flag(overwrite, "overwrite")
    folder = check_path(folder, "folder")
    context, splits = check_integer(context, "context", 1), check_integer(splits, "splits", 1)
    check_choice(strength, ("closeness", "responsibility"), "strength")
    assigned = ensure_assignments(mfa, store, assigned, progress)
    tokens, window, column = _windows(store, context)
    finite = assigned.components >= 0
    activations = assigned.responsibilities[finite]
    if strength == "closeness":
        activations = activations / (1 + assigned.distances[finite] / mfa.n_features**0.5)
    component = assigned.components[finite].long()
    locations = torch.stack([window[finite], column[finite], component], 1)
    meta: dict[str, Any] = getattr(store, "meta", {})
    layer = str(meta.get("layer", "layer"))
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", layer):
        raise ValueError(f"store: its layer must be the path of a module, got {shown(layer)}")
    place = Path(folder) / layer
    if (place / "config.json").exists() and not overwrite:
        raise FileExistsError(f"folder: {place} holds a cache already: name another, or give overwrite=True")
    place.mkdir(parents=True, exist_ok=True)
    bounds = torch.linspace(0, mfa.n_components, min(splits, mfa.n_components) + 1).long().tolist()
    for start, stop in pairwise(bounds):
        here = (component >= start) & (component < stop)
        part = locations[here] - torch.tensor([0, 0, start])
        tensors = {
            "locations": part.to(torch.int32),
            "activations": activations[here].half(),
            "tokens": tokens,
        }
        atomic_save_safetensors(tensors, place / f"{start}_{stop - 1}.safetensors")
    config = {
        "model_name": shareable(str(meta.get("tokenizer", meta.get("model", "")))), "ctx_len": context,
        "cache_ctx_len": context, "n_tokens": tokens.numel(), "n_splits": len(bounds) - 1, "batch_size": 1,
        "dataset_repo": "", "dataset_split": "", "dataset_name": "", "dataset_column": "text",
        "width": mfa.n_components,
    }  # fmt: skip
    atomic_write_json(place / "config.json", config)
    return place


def _windows(store: ActivationStore, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens in windows (W, context) int64, and the window and column of every row, (N,) int64 each."""
    parts = []
    for document in range(store.n_documents):
        ids = store.document_tokens(document).long()
        parts.append(torch.cat([ids, ids[-1:].expand(-len(ids) % context)]).view(-1, context))
    first = torch.tensor([0, *map(len, parts)]).cumsum(0)
    documents, positions = store.places
    window = first[documents] + positions // context
    return torch.cat(parts), window, positions % context

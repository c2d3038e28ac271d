"""Loading one of the mixtures in a folder or a hub repository: saved by this library, or by the paper's own code.

`mfa_kernels.MFA.from_pretrained` is `load`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from mfa_kernels.common.checks import check_choice, check_integer, check_path, check_text, shown
from mfa_kernels.common.files import StrPath
from mfa_kernels.common.modes import door
from mfa_kernels.common.progress import of_the_hub
from mfa_kernels.mixture import paper_format, saving
from mfa_kernels.mixture.functional import PRECISIONS
from mfa_kernels.mixture.saving import CONFIG, WEIGHTS, M

_PAPER = (".pt", ".pth", ".ckpt")  # endings of files of the paper's code


@door
def load(
    cls: type[M],
    folder_or_hub_id: StrPath,
    *,
    layer: int | str | None = None,
    filename: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    eps_floor: float | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: StrPath | None = None,
    local_files_only: bool = False,
) -> M:
    """Loads a mixture that `save_pretrained`, `push_to_hub` or the paper's own code wrote; no code in it is run.

        MFA.from_pretrained("mixtures/layer8")                              # a folder
        MFA.from_pretrained("ordavids1/MFA-8k-gemma-2-2b", layer=12)        # one of the paper's, from the hub

    Args:
        cls: `MFA`, or a subclass with its constructor.
        folder_or_hub_id: an existing folder; or else the name of a Hugging Face hub repository, of which what is needed
            is downloaded once and cached. A `pathlib.Path` is always a folder.
        layer: where there are several mixtures: that of the layer with this number, by the names of files and folders,
            such as "mfa_l22_8k.ckpt" or "layer-22/".
        filename: where there are several: this one, a file of the paper's code (.pt, .pth, .ckpt) or a config.json of
            ours, by its path in the folder or repository or by its last part.
        device: where to put it; default: torch's default device.
        dtype: default: as saved.
        precision: default: as saved, and "exact" for files of the paper's code.
        eps_floor: of a file of the paper's code that does not say it (`MFA.from_reference_checkpoint`).
        subfolder: of the folder or of the repository.
        revision, token, cache_dir, local_files_only: as in `huggingface_hub.hf_hub_download`.

    Returns:
        The mixture. Of one of ours, its attribute `extra` is the dict it was saved with, and `fit_report` the report of
        the fit that it came from, None where it was saved without one.

    Raises:
        FileNotFoundError: there is no such folder, repository or file.
        ValueError: there are several mixtures, which are listed; or a file is none, is incomplete or corrupt, is of a
            newer format, or its shapes do not agree: it is named.
    """
    if precision is not None:
        check_choice(precision, PRECISIONS, "precision")
    device, dtype = saving.checked_place(device, dtype)
    for name, value in (("subfolder", subfolder), ("filename", filename)):
        if value is not None:
            check_text(value, name)
    wanted = None if layer is None else _layer_number(layer)
    hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub["local_files_only"] = local_files_only
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    missing: FileNotFoundError | None = None
    if layer is None and filename is None:
        try:
            options = {**place, "precision": precision, "subfolder": subfolder}
            return saving.load_pretrained(cls, folder_or_hub_id, **options, **hub)
        except FileNotFoundError as error:
            missing = error
    try:
        found = _mixtures(folder_or_hub_id, subfolder, hub)
    except FileNotFoundError as error:
        raise missing or error from error
    if not found and missing is not None:
        raise missing
    chosen = _choose(found, folder_or_hub_id, wanted, filename)
    if PurePosixPath(chosen).name == CONFIG:
        options = {**place, "precision": precision, "subfolder": str(PurePosixPath(chosen).parent)}
        return saving.load_pretrained(cls, folder_or_hub_id, **options, **hub)
    path = _local(folder_or_hub_id, chosen, hub)
    mfa = paper_format.load_reference(cls, path, eps_floor=eps_floor, **place)
    mfa.precision = precision or mfa.precision
    return mfa


def _layer_number(layer: Any) -> int:
    """The number of a layer: of 12, "12" and "model.layers.12"."""
    if isinstance(layer, str):
        if (number := re.search(r"(?:^|[^\d-])(\d{1,6})$", layer)) is None:
            raise ValueError(f"layer must be a number, or end in one as a module path does, got {shown(layer)}")
        return int(number[1])
    return check_integer(layer, "layer")


def _mixtures(source: StrPath, subfolder: str | None, hub: dict[str, Any]) -> list[str]:
    """Returns the paths, in a folder or repository, of config.json of mixtures of ours, and of the paper's files."""
    path = check_path(source, "folder_or_hub_id")
    inside = PurePosixPath(subfolder or ".")
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
    elif isinstance(source, os.PathLike):
        raise FileNotFoundError(f"there is no folder {path}")
    else:
        names = _listed(source, hub)
    names = [name for name in names if inside == PurePosixPath(".") or inside in PurePosixPath(name).parents]
    ours = [n for n in names if PurePosixPath(n).name == CONFIG and str(PurePosixPath(n).with_name(WEIGHTS)) in names]
    return ours + [name for name in names if PurePosixPath(name).suffix in _PAPER]


def _listed(repository: str, hub: dict[str, Any]) -> list[str]:
    """Returns the names of all files of a hub repository; without a network, of what the cache has of it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if hub["local_files_only"]:
        return _cached(repository, hub)
    try:
        with of_the_hub():
            return sorted(HfApi(token=hub["token"]).list_repo_files(repository, revision=hub["revision"]))
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{repository!r} is no folder here, nor a repository on the Hugging Face hub that can be read: {error}"
        ) from error
    except Exception as error:  # whatever the library in use raises where there is no network, or none is wanted
        if found := _cached(repository, hub):
            return found
        raise FileNotFoundError(
            f"{repository!r} is no folder here, and the Hugging Face hub cannot be asked for it: {error}"
        ) from error


def _cached(repository: str, hub: dict[str, Any]) -> list[str]:
    """Returns the names of the files of a repository that were downloaded before."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, **{**hub, "local_files_only": True}))
    except (OSError, ValueError):  # nothing of it is there
        return []
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _choose(found: Sequence[str], source: StrPath, layer: int | None, filename: str | None) -> str:
    """Returns the one mixture that is meant; raises, listing all, where it is none or not one."""
    left = [name for name in found if filename is None or filename in (name, PurePosixPath(name).name)]
    if layer is not None:
        of_layer = re.compile(rf"(?<![a-z])(l|layers?|blocks?|h)[._-]?0*{layer}(?!\d)", re.IGNORECASE)
        left = [name for name in left if of_layer.search(name)]
    if len(left) == 1:
        return left[0]
    asked = [f"{name}={value!r}" for name, value in (("layer", layer), ("filename", filename)) if value is not None]
    listed = ", ".join(left or found) or "none"
    if not left:
        raise FileNotFoundError(f"{' and '.join(asked)}: {source} has no such mixture; it has {listed}")
    raise ValueError(f"folder_or_hub_id: {source} has several mixtures, name one by layer or filename: {listed}")


def _local(source: StrPath, name: str, hub: dict[str, Any]) -> Path:
    """Returns the path on this machine of a file in a folder or repository."""
    if Path(source).is_dir():
        return Path(source) / name
    from huggingface_hub import hf_hub_download

    with of_the_hub():
        return Path(hf_hub_download(str(source), name, subfolder=None, **hub))

"""Mixtures on disk: our folder (config.json + model.safetensors), and the Hugging Face hub.

A folder is saved by renaming two files, and a reader, or a crash, may come between. So the header of the weights has a
copy of the config, and config.json counts only beside the weights that it was saved with: the one rename of the weights
is the save. It also has a checksum of the weights and of the copy, which is compared when they are read; weights of
earlier versions and of other programs have none, and are read as they are.

What a mixture knows of its fit (`mfa.fit_report`) is under the key "fit" of the config: written, sealed and copied with
the rest, it cannot be that of another save. It says no path of this machine (`mfa_kernels.common.sharing`).

No loader here runs code from a file. `mfa_kernels.MFA` has these functions as methods.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mfa_kernels.common import checksum
from mfa_kernels.common.checks import check_choice, check_device, check_dtype, check_path, check_text
from mfa_kernels.common.files import StrPath, atomic_path, atomic_save_safetensors, atomic_write_json, atomic_write_text
from mfa_kernels.common.modes import door, of_the_caller
from mfa_kernels.common.places import MIXTURE, check_replaced
from mfa_kernels.common.progress import of_the_hub
from mfa_kernels.common.reading import (
    COUNT,
    OBJECT,
    SHARE,
    TEXT,
    check_fields,
    check_file,
    choice,
    naming,
    optional,
    parse_json,
    read_json,
    read_safetensors,
    shown,
)
from mfa_kernels.common.sharing import local_paths
from mfa_kernels.common.version import __version__
from mfa_kernels.mixture.base import Mixture, check_whole
from mfa_kernels.mixture.card import model_card
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.functional import PRECISIONS

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

M = TypeVar("M", bound=Mixture)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "mfa_kernels"
FORMAT_VERSION = 1

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_KINDS = {
    "n_components": COUNT,
    "n_features": COUNT,
    "rank": COUNT,
    "noise": TEXT,
    "precision": TEXT,
    "noise_floor": SHARE,
    "dtype": choice(*_DTYPES),
}


# Our folder


@door
def save_pretrained(mfa: Mixture, folder: StrPath, *, extra: Mapping[str, Any] | None = None) -> None:
    """Writes config.json and model.safetensors; a reload is bitwise equal.

    Whenever it is read, or if the save is cut off, the folder holds the old mixture or the new one, whole: both files
    are complete on disk before either gets its name. A `fit_report` is written along, and comes back equal; of a curve
    of more than a thousand records, so many (`FitReport.as_dict`).

    Args:
        mfa: the mixture, on any device.
        folder: made if it is missing; a mixture that is there is replaced.
        extra: what JSON can hold, kept under a key of its own in config.json (the language model, the layer, the data
            ...) and given back as `mfa.extra`. None keeps the `extra` the mixture was loaded with. It is the user's
            own and written as it is: a path in it can be read by all who get the files.

    Raises:
        FileExistsError: the folder has a config.json of something else, such as a language model.
    """
    check_whole(mfa)
    folder, config = check_path(folder, "folder"), sealed(config_of(mfa, extra, mfa.fit_report))
    if mfa.means.is_meta:
        raise ValueError("the mixture must hold values to be saved, its parameters are on the meta device")
    if folder.is_file():
        raise NotADirectoryError(f"folder must be a folder, {folder} is a file")
    check_replaced(folder / CONFIG, MIXTURE, "folder")
    with atomic_path(folder / CONFIG) as config_file, atomic_path(folder / WEIGHTS) as weights_file:
        atomic_write_json(config_file, config)
        tensors = {name: tensor.detach().cpu() for name, tensor in mfa.tensors().items()}
        metadata = header_metadata(config)
        metadata[checksum.KEY] = checksum.of_tensors(tensors, metadata)
        atomic_save_safetensors(tensors, weights_file, metadata)


def checked_extra(mfa: Mixture, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    extra = getattr(mfa, "extra", {}) if extra is None else extra
    if not isinstance(extra, Mapping):
        raise TypeError(f"extra must be a dict, got {type(extra).__name__}")
    try:
        json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"extra must hold only what JSON can: {error}") from error
    return dict(extra)


def _fit_report(report: Any) -> dict[str, Any]:
    """The part of a config that says how the mixture was fitted; empty where that is not known."""
    if report is None:
        return {}
    if not isinstance(report, FitReport):
        raise TypeError(f"fit_report must be a FitReport or None, got {shown(report)}")
    return {"fit": report.as_dict()}


def fit_report_of(config: Mapping[str, Any], path: Path) -> FitReport | None:
    """Returns the fit report of a config that was read from `path`; None where it has none, as of earlier versions."""
    fit = config.get("fit")
    return None if fit is None else FitReport.from_dict(fit, f"{path}: fit")


def config_of(mfa: Mixture, extra: Mapping[str, Any] | None, report: Any) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "mfa_kernels_version": __version__,
        **{name: getattr(mfa, name) for name in _KINDS if name != "dtype"},
        "dtype": str(mfa.means.dtype).removeprefix("torch."),
        "extra": checked_extra(mfa, extra),
        **_fit_report(report),
    }


def sealed(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with a key that tells two saves apart, and stays when the file is edited by hand."""
    text = json.dumps(config, sort_keys=True)
    return {**config, "saved_as": hashlib.sha256(text.encode()).hexdigest()[:16]}


def header_metadata(config: dict[str, Any]) -> dict[str, str]:
    """Returns the metadata in the header of the weights, without their checksum."""
    return {"format": "pt", "config": json.dumps(config)}


@door
def load_pretrained(
    cls: type[M],
    folder_or_hub_id: StrPath,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: StrPath | None = None,
    local_files_only: bool = False,
) -> M:
    """Loads a mixture that `save_pretrained` or `push_to_hub` wrote.

    Args:
        cls: `MFA`, or a subclass with its constructor.
        folder_or_hub_id: an existing folder; or else the name of a Hugging Face hub repository, of which the two files
            are downloaded once and cached. A `pathlib.Path` is always a folder.
        device: where to put it; default: torch's default device.
        dtype: default: as saved.
        precision: default: as saved.
        subfolder: of the folder or of the repository.
        revision, token, cache_dir, local_files_only: as in `huggingface_hub.hf_hub_download`.

    Returns:
        The mixture; its attribute `extra` is the dict it was saved with, and `fit_report` the report of the fit that it
        came from, None where it was saved without one.

    Raises:
        FileNotFoundError: there is no such folder, repository or file.
        ValueError: a file is not ours, is incomplete or corrupt, is of a newer format, or their shapes do not agree; it
            is named.
    """
    if precision is not None:
        check_choice(precision, PRECISIONS, "precision")
    device, dtype = checked_place(device, dtype)
    if subfolder is not None:
        check_text(subfolder, "subfolder")
    config_path, weights_path = find_files(
        folder_or_hub_id,
        subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config = read_config(config_path)
    saved, metadata = read_safetensors(weights_path)
    if checksum.KEY in metadata:
        checksum.compare(checksum.of_tensors(saved, metadata), metadata[checksum.KEY], weights_path, "its header")
    config = config_beside(config, metadata, weights_path)
    # On the meta device nothing is allocated before the shapes are known to fit, and no random numbers are drawn.
    mfa = blank_mixture(cls, config, config["n_components"], precision, config_path)
    expected = mfa.tensors()
    if set(saved) != set(expected):
        raise ValueError(f"{weights_path} holds the tensors {sorted(saved)}, expected {sorted(expected)}")
    for name, tensor in saved.items():
        found, wanted = (tuple(tensor.shape), tensor.dtype), (tuple(expected[name].shape), expected[name].dtype)
        if found != wanted:
            raise ValueError(
                f"{weights_path}: {name} is {found[1]} of shape {found[0]}, expected {wanted[1]} of shape {wanted[0]} "
                f"by {CONFIG}"
            )
    mfa = allocated(mfa, device, dtype)
    mfa.load_state_dict(saved)
    mfa.extra, mfa.fit_report = config.get("extra", {}), fit_report_of(config, config_path)
    return mfa


def checked_place(device: Any, dtype: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """Returns the device and dtype for a mixture, None where not given; raises where it cannot be put there."""
    return None if device is None else check_device(device), None if dtype is None else check_dtype(dtype)


def blank_mixture(cls: type[M], config: Mapping[str, Any], components: int, precision: str | None, path: Path) -> M:
    """Returns a mixture of so many components on the meta device; where the config makes none, an error names it."""
    with naming(path, "the config of a mixture"):
        return cls(
            components,
            config["n_features"],
            config["rank"],
            config["noise"],
            precision=precision or config["precision"],
            noise_floor=config["noise_floor"],
            device="meta",
            dtype=_DTYPES[config["dtype"]],
        )


def allocated(mfa: M, device: torch.device | str | None, dtype: torch.dtype | None) -> M:
    """Returns a mixture on the meta device with memory of its own; the values are yet to be written."""
    if device is None:
        with of_the_caller():
            device = torch.get_default_device()
    return mfa.to(dtype=dtype or mfa.means.dtype).to_empty(device=device)


def find_files(source: StrPath, subfolder: str | None, **hub: Any) -> tuple[Path, Path]:
    """Returns the local paths of config.json and model.safetensors."""
    path = check_path(source, "folder_or_hub_id")
    if path.is_dir():
        path = path / (subfolder or "")
        for name in (CONFIG, WEIGHTS):
            check_file(path / name, f"{path} has no {name}; a saved mixture is {CONFIG} and {WEIGHTS}")
        return path / CONFIG, path / WEIGHTS
    if path.is_file():
        raise NotADirectoryError(
            f"folder_or_hub_id must be a folder or the name of a hub repository, got the file {path} "
            "(MFA.from_reference_checkpoint reads the paper's .pt files)"
        )
    if isinstance(source, os.PathLike):
        raise FileNotFoundError(f"there is no folder {path}")

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    options = {"subfolder": subfolder, "library_name": MODEL_TYPE, "library_version": __version__, **hub}
    try:
        with of_the_hub():
            config, weights = (Path(hf_hub_download(source, name, **options)) for name in (CONFIG, WEIGHTS))
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{source!r} is no folder here, nor a mixture on the Hugging Face hub that can be read: {error}"
        ) from error
    return config, weights


def read_config(path: Path) -> dict[str, Any]:
    return _checked(read_json(path), path)


def config_beside(config: dict[str, Any], metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """Returns `config`, read from config.json, if it was saved with these weights; else the copy in their header."""
    if "config" not in metadata:  # saved without one, perhaps with the floor, or by another program
        with naming(path, "a file of weights with a noise floor"):
            config = {**config, "noise_floor": float(metadata.get("noise_floor", config["noise_floor"]))}
        return _checked(config, path)
    own = _checked(parse_json(metadata["config"], path, ": its copy of the config is not JSON"), path)
    return config if config.get("saved_as") == own.get("saved_as") else own


def _checked(config: Any, path: Path) -> dict[str, Any]:
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != MODEL_TYPE:
        raise ValueError(f"{path} does not describe a mixture: model_type is {shown(kind)}, expected {MODEL_TYPE!r}")
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{path}: format_version must be a positive integer, got {shown(version)}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {shown(version)}, written by mfa_kernels "
            f"{config.get('mfa_kernels_version')!s:.20}; mfa_kernels {__version__} reads up to {FORMAT_VERSION}: "
            "update mfa_kernels"
        )
    check_fields(config, _KINDS, str(path))
    check_fields(config, {"extra": OBJECT, "fit": optional(OBJECT)}, str(path), needed=False)
    fit_report_of(config, path)  # raises where it is none
    return config


def push_to_hub(
    mfa: Mixture,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    extra: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> CommitInfo:
    """Uploads what `save_pretrained` writes to a Hugging Face hub repository, made if it is missing.

    A short model card comes along where the repository has no README.md yet: what the mixture is, `extra`, how it was
    fitted, where its `fit_report` says so, and how to use it.

    What is uploaded is there for others at once, and stays in the history of the repository. So an `extra` that holds
    the path of something on this machine is refused, not warned of; nothing is written then.

    Args:
        mfa: the mixture.
        repo_id: "name", of the account of the token, or "owner/name".
        private: visibility of a new repository; default: that of the account.
        revision: branch to commit to, made if it is missing; default: main.
        extra: see `save_pretrained`; without paths of this machine.
        license: of the mixture, for the card, such as "mit" or "apache-2.0".
        token, commit_message: as in `huggingface_hub.HfApi.upload_folder`.

    Returns:
        The commit.

    Raises:
        ValueError: `extra` holds a path of this machine; it is named.
    """
    from huggingface_hub import HfApi

    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", check_text(license, "license")):
        raise ValueError(f"license must be the name of one on the hub, such as 'mit', got {shown(license)}")
    where, path = next(local_paths(checked_extra(mfa, extra), "extra"), (None, None))
    if where is not None:
        raise ValueError(f"{where} is the path {path!r} of this machine, which is not uploaded: give another extra")
    api = HfApi(token=token, library_name=MODEL_TYPE, library_version=__version__)
    with tempfile.TemporaryDirectory() as folder, of_the_hub():
        save_pretrained(mfa, folder, extra=extra)  # first, since it may refuse extra
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(repo_id, "README.md", revision=revision):
            atomic_write_text(Path(folder) / "README.md", model_card(mfa, repo_id, checked_extra(mfa, extra), license))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload a mixture of factor analyzers",
            revision=revision,
        )

"""The paper's own .pt files, read without running code from them, and written.

`mfa_kernels.MFA` has these functions as methods, `from_reference_checkpoint` and `to_reference_checkpoint`.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_flag, check_integer, check_number, check_path
from mfa_kernels.common.files import StrPath, atomic_path, check_writable
from mfa_kernels.common.modes import door
from mfa_kernels.common.places import PAPER, check_place
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.common.reading import SHARE, check_file, naming, optional, shown
from mfa_kernels.mixture.base import Mixture, check_whole
from mfa_kernels.mixture.saving import M, allocated, checked_extra, checked_place

_REFERENCE_TENSORS = ("mu", "dir_raw", "scale_rho", "psi_rho", "pi_logits")
_BARE_EPS_FLOOR = 1e-8  # of the paper's loader, for a file that does not say
_TRAINING_EPS_FLOOR = 1e-5  # of the paper's trainer
_META = ("K", "D", "q", "rank", "cls", "version", "eps_floor", "rotation_on")
_RECORD_BYTES = 1 << 20  # read at once to compare their checksum
_CHUNK_ELEMENTS = 1 << 23  # 64 MiB of float64
_OBLIQUE = 1e-2  # a rotation this far from orthogonal is no rounding of bfloat16


@door
@torch.no_grad()
def load_reference(
    cls: type[M],
    path: StrPath,
    *,
    eps_floor: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> M:
    """Loads a mixture from a .pt or .ckpt file of the paper's own code, without running code from it.

    Both of its containers are read, {"state_dict", "meta"} with the rank under "q" or "rank", and the bare state dict;
    names may begin with "module." or "_orig_mod."; tensors and meta keys of other names are ignored.

        means = mu                     loadings = dir_raw / max(|dir_raw|, eps_floor) * softplus(scale_rho)
        weight_logits = pi_logits      noise_variance = softplus(psi_rho) + eps_floor

    with norms over the features, computed in float64; `center` is the average of mu. Where the file has its rotation
    switched on, the loadings are rotated by `_rot_inv_Tt`: latents then mean what they mean in the paper's code. The
    paper evaluates the density without the rotation, and an orthogonal one does not change it. An oblique one would:
    it is left out, with a warning.

    Args:
        cls: `MFA`, or a subclass with its constructor.
        path: the file.
        eps_floor: what the paper's class calls eps_floor; default: as the file says, and where it says, another one is
            refused. A file that does not say is read with 1e-8, as by the paper's loader, with a warning: such a model
            was usually trained with 1e-5.
        device: default: torch's default device.
        dtype: default: that of the tensors in the file.
        progress: show a bar when it takes more than two seconds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming the file; it is incomplete or corrupt, holds more than tensors and plain values, or its
            tensors do not fit. (Files of torch before 1.6, and those written without checksums, have nothing to tell
            a flipped bit by.)
    """
    path = check_path(path, "path")
    eps_floor = None if eps_floor is None else check_number(eps_floor, "eps_floor", 0)
    device, dtype = checked_place(device, dtype)
    check_flag(progress, "progress")
    with naming(Path(path), "a checkpoint of the paper's code"):
        state, meta = _read_reference(Path(path))
        components, features, rank = state["dir_raw"].shape
        eps_floor = _choose_eps_floor(path, meta, eps_floor)
        rotation = _read_rotation(path, state, meta)

        file_dtype = state["mu"].dtype
        for tensor in state.values():
            file_dtype = torch.promote_types(file_dtype, tensor.dtype)
        noise = "per_component" if state["psi_rho"].dim() == 2 else "shared"
        mfa = cls(components, features, rank, noise, noise_floor=eps_floor, device="meta", dtype=file_dtype)
    mfa = allocated(mfa, device, dtype)

    mfa.means.copy_(state["mu"])
    mfa.center.copy_(state["mu"].mean(0, dtype=torch.float64))
    mfa.weight_logits.copy_(state["pi_logits"])
    if noise == "shared":
        mfa.log_noise.copy_(_log_softplus(state["psi_rho"].double()))
    for part in _parts(mfa, "loading", progress):
        if noise == "per_component":
            mfa.log_noise[part] = _log_softplus(state["psi_rho"][part].double()).to(mfa.log_noise)
        directions = state["dir_raw"][part].double()
        norms = directions.norm(dim=1, keepdim=True).clamp_min(max(eps_floor, torch.finfo(torch.float64).tiny))
        loadings = directions / norms * _softplus(state["scale_rho"][part].double()).unsqueeze(1)
        if rotation is not None:
            loadings = loadings @ rotation[part]
        mfa.loadings[part] = loadings.to(mfa.loadings)
    if isinstance(meta.get("extra"), dict):
        mfa.extra = meta["extra"]
    return mfa


def _is_archive(path: Path) -> bool:
    """True where a file is of torch's own format since 1.6, a zip archive; raises where that is damaged.

    Its readers, unlike `zipfile`, do not compare the checksums in it.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    with zipfile.ZipFile(path) as archive:
        size = path.stat().st_size
        for entry in archive.infolist():
            # torch compresses nothing: an entry that claims to be larger than the file would be made in memory.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                raise zipfile.BadZipFile(f"{shown(entry.filename)} claims {entry.file_size} bytes")
            if entry.CRC:  # torch.serialization.set_crc32_options can leave it out, which writes 0
                with archive.open(entry) as record:
                    while record.read(_RECORD_BYTES):
                        pass
    return True


def _read_reference(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, of shapes that fit together, and the meta dict (empty for a bare state dict)."""
    check_file(path)
    try:
        # A mapped tensor can be no larger than the file.
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=_is_archive(path))
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} is refused: "
            + (f"it asks for {asked[1]}, " if asked else "it is no torch checkpoint, ")
            + "and only tensors and plain values are read"
        ) from error
    except Exception as error:  # a damaged file can fail in any of the unpickler's ways
        reason = str(error) or ("it is empty" if not path.stat().st_size else type(error).__name__)
        raise ValueError(f"{path} is not a complete torch checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict")
    contained = isinstance(content.get("state_dict"), dict)
    tensors: dict[str, Any] = content["state_dict"] if contained else content
    meta = (content.get("meta") or {}) if contained else {}
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: meta is a {type(meta).__name__}, expected a dict")
    for key in _META:
        if not isinstance(meta.get(key), str | int | float | None):
            raise ValueError(f"{path}: meta: {key} is a {type(meta[key]).__name__}, expected a plain value")
    if meta.get("cls", "MFA") != "MFA":
        raise ValueError(f"{path} holds a {shown(meta['cls'])}, expected 'MFA'")
    if meta.get("version", 1) != 1:
        raise ValueError(f"{path} is of version {shown(meta['version'])} of the paper's format, expected 1")
    if not optional(SHARE).holds(meta.get("eps_floor")):
        # A mixture calls it the noise floor.
        raise ValueError(f"{path}: meta: noise_floor must be >= 0, got eps_floor {shown(meta['eps_floor'])}")

    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in tensors.items()}
    state = {name: tensors[name] for name in (*_REFERENCE_TENSORS, "_rot_inv_Tt") if name in tensors}
    missing = [name for name in _REFERENCE_TENSORS if name not in state]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(list(tensors)[:20]) or 'nothing'}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: {name} must be a floating-point tensor, got {found}")

    if state["mu"].dim() != 2 or state["dir_raw"].dim() != 3:
        raise ValueError(
            f"{path}: mu must have shape (K, D) and dir_raw (K, D, R), got {tuple(state['mu'].shape)} and "
            f"{tuple(state['dir_raw'].shape)}"
        )
    (components, features), rank = state["mu"].shape, state["dir_raw"].shape[-1]
    expected = {
        "dir_raw": (components, features, rank),
        "scale_rho": (components, rank),
        "psi_rho": (components, features) if state["psi_rho"].dim() == 2 else (features,),
        "pi_logits": (components,),
        "_rot_inv_Tt": (components, rank, rank),
    }
    for name, shape in expected.items():
        if name in state and tuple(state[name].shape) != shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, expected {shape}: mu has K, D = {components}, "
                f"{features} and dir_raw has rank {rank}"
            )
    size = sum(state[name].numel() * state[name].element_size() for name in _REFERENCE_TENSORS)
    if size > path.stat().st_size or rank > features:  # views that repeat few numbers, and rotations as large
        raise ValueError(
            f"{path}: its tensors claim {size} bytes and rank {rank}, more than the file has and {features}"
        )
    for name, tensor in state.items():
        if not (tensor < torch.inf).all():  # a weight or a noise of 0 is -inf here
            raise ValueError(f"{path}: {name} has NaN or infinite values")
    for key, size in (("K", components), ("D", features), ("q", rank), ("rank", rank)):
        if meta.get(key, size) != size:
            raise ValueError(f"{path}: meta says {key} = {shown(meta[key])}, but its tensors have {size}")
    return state, meta


def _choose_eps_floor(path: StrPath, meta: Mapping[str, Any], eps_floor: float | None) -> float:
    said = meta.get("eps_floor")
    if said is not None and eps_floor is not None and float(said) != float(eps_floor):
        raise ValueError(f"eps_floor must be that of {path}, {float(said):g}, or left out, got {eps_floor:g}")
    found = said if eps_floor is None else eps_floor
    if found is not None:
        return float(found)
    warnings.warn(
        f"{path} does not say its eps_floor: {_BARE_EPS_FLOOR} is taken, as by the paper's loader. The paper's trainer "
        f"uses {_TRAINING_EPS_FLOOR}: pass eps_floor={_TRAINING_EPS_FLOOR} for the noise the model was trained with.",
        stacklevel=6,  # the caller of MFA.from_reference_checkpoint
    )
    return _BARE_EPS_FLOOR


def _read_rotation(path: StrPath, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Tensor | None:
    """The orthogonal matrices (K, R, R) nearest to those of the file, float64, where they are to be applied."""
    if not meta.get("rotation_on") or "_rot_inv_Tt" not in state:
        return None
    matrices = state["_rot_inv_Tt"].double()
    u, _, vh = torch.linalg.svd(matrices)
    rotation = u @ vh
    deviation = (rotation - matrices).abs().amax().item() if matrices.numel() else 0.0
    if deviation > _OBLIQUE:
        warnings.warn(
            f"{path} has an oblique rotation ({meta.get('rotation_kind')!r}, {deviation:.1e} from orthogonal). The "
            "loadings are kept un-rotated: the density is the file's, the latents are not in its rotated coordinates.",
            stacklevel=6,
        )
        return None
    return rotation


def _parts(mfa: Mixture, description: str, progress: bool) -> Iterator[slice]:
    """Slices of components whose loadings take 64 MiB in float64."""
    step = max(1, _CHUNK_ELEMENTS // (mfa.n_features * max(mfa.rank, 1)))
    with progress_bar(total=mfa.n_components, desc=description, unit="component", delay=2, progress=progress) as bar:
        for start in range(0, mfa.n_components, step):
            yield slice(start, start + step)
            bar.update(min(step, mfa.n_components - start))


def _softplus(rho: Tensor) -> Tensor:
    """log(1 + exp(rho)). torch's own softplus becomes linear at 20, which is visible in float64."""
    return torch.logaddexp(rho, torch.zeros_like(rho))


def _log_softplus(rho: Tensor) -> Tensor:
    """log(softplus(rho)) of float64, without the underflow of softplus."""
    return torch.where(rho < -37, rho, _softplus(rho).log())


def _inverse_softplus(value: Tensor) -> Tensor:
    """The rho of softplus(rho) = value > 0; log(exp(value) - 1) overflows at 709."""
    return value + (-torch.expm1(-value)).log()


@door
@torch.no_grad()
def save_reference(mfa: Mixture, path: StrPath, *, format: int = 1, progress: bool = True) -> None:
    """Writes a .pt file that the paper's own code loads, to a temporary name and then renamed.

    The file is float64 for a float64 mixture, else float32. `center` has no place in it (`load_reference` takes the
    average of the means). A column of zeros is written as a direction with the smallest scale there is.

    Args:
        mfa: the mixture, on any device.
        path: the file; a torch checkpoint that is there is replaced, and nothing else is.
        format: 1 (`modeling/mfa.py`; keeps `mfa.extra`) or 2 (`modeling/model_checkpointing.py`).
        progress: show a bar when it takes more than two seconds.
    """
    check_whole(mfa)
    path, format = check_path(path, "path"), check_integer(format, "format")
    if format not in (1, 2):
        raise ValueError(f"format must be 1 or 2, got {format!r}")
    check_place(path, PAPER, "path")
    check_writable(path, "path")
    check_flag(progress, "progress")
    dtype = torch.float64 if mfa.means.dtype == torch.float64 else torch.float32
    tiny = torch.finfo(dtype).tiny
    components, features, rank = mfa.loadings.shape

    excess = mfa.log_noise.cpu().double().exp()
    eps_floor = mfa.noise_floor
    # The paper's class expects one above 0, and takes it for the least norm of a direction as well.
    if not 0 < eps_floor < 0.5:
        eps_floor = min(_TRAINING_EPS_FLOOR, (excess.min().item() + mfa.noise_floor) / 2)
        excess = excess + (mfa.noise_floor - eps_floor)

    directions = torch.empty(components, features, rank, dtype=dtype)
    scales = torch.empty(components, rank, dtype=torch.float64)
    for part in _parts(mfa, "saving", progress):
        loadings = mfa.loadings[part].cpu().double()
        scales[part] = norms = loadings.norm(dim=1)
        directions[part] = (loadings / norms.unsqueeze(1)).to(dtype)
    # A column of zeros has no direction: the first axis, as good as any.
    directions.mT[scales == 0] = torch.eye(1, features, dtype=dtype)

    identity = torch.eye(rank, dtype=dtype).repeat(components, 1, 1)
    state = {
        "mu": mfa.means.cpu().to(dtype, copy=True),
        "dir_raw": directions,
        "scale_rho": _inverse_softplus(scales.clamp_min(tiny)).to(dtype),
        "psi_rho": _inverse_softplus(excess.clamp_min(tiny)).to(dtype),
        "pi_logits": mfa.weight_logits.cpu().to(dtype, copy=True),
        "_rot_T": identity,
        "_rot_inv_Tt": identity.clone(),
    }
    shared = {"K": components, "D": features, "psi_per_component": mfa.noise == "per_component"}
    meta: dict[str, Any] = {**shared, "eps_floor": eps_floor, "version": 1}
    if format == 1:
        meta |= {"q": rank, "dtype": str(dtype), "rotation_on": False, "rotation_kind": None, "rotation_params": {}}
        if extra := checked_extra(mfa, None):
            meta["extra"] = extra
    else:
        meta |= {"cls": "MFA", "rank": rank}
    # By its name torch would refuse a file without an extension.
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save({"state_dict": state, "meta": meta}, file)

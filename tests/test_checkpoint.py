"""Saving and loading: our folder, the hub (a stand-in, no network), and the paper's .pt files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mfa_kernels import MFA, __version__, checkpoint
from tests.mixtures import mixture


def _mixture(components=5, features=12, rank=3, noise="shared", dtype=torch.float32, **kwargs: Any) -> MFA:
    m = mixture(components, features, rank, per_component=noise == "per_component", dtype=dtype)
    mfa = MFA(components, features, rank, noise, dtype=dtype, **kwargs)
    with torch.no_grad():
        mfa.means.copy_(m.means)
        mfa.loadings.copy_(m.loadings)
        mfa.log_noise.copy_(m.noise_variance.log())
        mfa.weight_logits.copy_(m.log_weights)
        mfa.center.copy_(m.means.mean(0))
    return mfa


# Our format


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("noise", "rank"), [("shared", 3), ("per_component", 1), ("shared", 0)])
def test_roundtrip_is_bitwise(tmp_path, dtype, noise, rank):
    mfa = _mixture(rank=rank, noise=noise, dtype=dtype, noise_floor=1e-5, precision="reference")
    with torch.no_grad():
        mfa.weight_logits[0] = -torch.inf
    mfa.save_pretrained(tmp_path / "deep" / "folder")
    loaded = MFA.from_pretrained(tmp_path / "deep" / "folder")
    for name, tensor in mfa.state_dict().items():
        assert loaded.state_dict()[name].dtype == dtype
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.noise, loaded.precision, loaded.noise_floor) == (noise, "reference", 1e-5)
    assert loaded.extra == {}
    assert [(n, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.requires_grad) for n, p in mfa.named_parameters()
    ]
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == ["config.json", "model.safetensors"]


def test_loaded_mixture_trains_and_is_independent_of_the_file(tmp_path):
    mfa = _mixture()
    mfa.save_pretrained(tmp_path)
    loaded = MFA.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.log_prob(x), mfa.log_prob(x))
    loaded(x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters())


def test_load_draws_no_global_random_numbers(tmp_path):
    _mixture().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    MFA.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_load_overrides(tmp_path):
    mfa = _mixture()
    mfa.save_pretrained(tmp_path / "inner")
    loaded = MFA.from_pretrained(tmp_path, subfolder="inner", dtype=torch.float64, precision="reference", device="cpu")
    assert loaded.precision == "reference"
    assert loaded.means.dtype == loaded.center.dtype == torch.float64
    assert torch.equal(loaded.loadings, mfa.loadings.double())

    class Derived(MFA):
        pass

    assert type(Derived.from_pretrained(tmp_path / "inner")) is Derived


def test_extra_travels(tmp_path):
    extra = {"model": "a/model", "layer": 8, "nested": {"tokens": [1, 2]}}
    mfa = _mixture()
    mfa.save_pretrained(tmp_path / "first", extra=extra)
    loaded = MFA.from_pretrained(tmp_path / "first")
    assert loaded.extra == extra
    loaded.save_pretrained(tmp_path / "second")
    assert MFA.from_pretrained(tmp_path / "second").extra == extra
    loaded.save_pretrained(tmp_path / "third", extra={})
    assert MFA.from_pretrained(tmp_path / "third").extra == {}
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["extra"] == extra
    assert (config["format_version"], config["mfa_kernels_version"]) == (1, __version__)
    assert (config["n_components"], config["n_features"], config["rank"], config["dtype"]) == (5, 12, 3, "float32")


@pytest.mark.parametrize("extra", [{"layer": torch.tensor(8)}, {"loss": math.nan}, ["layer", 8]])
def test_extra_that_is_not_json_writes_nothing(tmp_path, extra):
    with pytest.raises(TypeError, match="extra must"):
        _mixture().save_pretrained(tmp_path / "folder", extra=extra)
    assert not (tmp_path / "folder").exists()


def test_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    mfa = _mixture()
    mfa.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        mfa.means.add_(1)

    def fail(tensors: Any, path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half of the ten")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "atomic_save_safetensors", fail)
    with pytest.raises(OSError, match="no space left"):
        mfa.save_pretrained(tmp_path, extra={"layer": 1})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_both_files_are_complete_before_either_is_named(tmp_path, monkeypatch):
    seen = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        if Path(target).name in ("config.json", "model.safetensors"):
            pending = [p for p in tmp_path.iterdir() if p.name not in ("config.json", "model.safetensors")]
            seen.append(sorted(p.stat().st_size > 100 for p in pending))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    _mixture().save_pretrained(tmp_path)
    assert seen == [[True, True], [True]]


def _facts(mfa: MFA) -> tuple[Any, ...]:
    """All that a folder keeps of a mixture."""
    tensors = {name: tensor.tolist() for name, tensor in mfa.state_dict().items()}
    return mfa.noise, mfa.precision, mfa.noise_floor, mfa.means.dtype, mfa.extra, tensors


def _saved(folder: Path, **options: Any) -> tuple[Any, ...]:
    mfa = _mixture(**options)
    mfa.save_pretrained(folder, extra=options)
    return _facts(MFA.from_pretrained(folder))


OLD = {"components": 5, "noise_floor": 0.25, "precision": "reference"}
LIKE_OLD = {**OLD, "noise_floor": 0.5, "precision": "exact"}  # of the same shapes
NEW = {"components": 6, "rank": 2, "noise": "per_component", "noise_floor": 0.5}


@pytest.mark.parametrize("changed", [LIKE_OLD, NEW])
@pytest.mark.parametrize("steps", range(5))
def test_a_folder_holds_the_old_mixture_or_the_new_one(tmp_path, monkeypatch, changed, steps):
    """Whoever reads while a save goes on, or after it was cut off."""
    old, new = _saved(tmp_path / "folder", **OLD), _saved(tmp_path / "new", **changed)
    replace, seen = os.replace, []

    def watched(source: Path, target: Path) -> None:
        if len(seen) == steps:
            raise KeyboardInterrupt
        seen.append(_facts(MFA.from_pretrained(tmp_path / "folder")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with contextlib.suppress(KeyboardInterrupt):
        _mixture(**changed).save_pretrained(tmp_path / "folder", extra=changed)
    seen.append(_facts(MFA.from_pretrained(tmp_path / "folder")))
    # Each file is written to a temporary name twice over: four renames, the third one being that of the weights.
    assert seen == [old, old, old, new, new][: steps + 1]


@pytest.mark.parametrize("changed", [LIKE_OLD, NEW])
def test_a_config_of_another_save_does_not_count(tmp_path, changed):
    """Whichever of the two files was lost, as a power cut may lose the earlier rename: the weights decide."""
    old, new = _saved(tmp_path / "old", **OLD), _saved(tmp_path / "new", **changed)
    for weights, expected in (("old", old), ("new", new)):
        mixed = tmp_path / f"{weights} weights"
        shutil.copytree(tmp_path / weights, mixed)
        shutil.copy(tmp_path / {"old": "new", "new": "old"}[weights] / "config.json", mixed)
        assert _facts(MFA.from_pretrained(mixed)) == expected


def test_a_config_edited_by_hand_counts(tmp_path):
    _mixture().save_pretrained(tmp_path, extra={"layer": 8})
    _edit(tmp_path, precision="reference", noise_floor=0.5, extra={"layer": 9})
    loaded = MFA.from_pretrained(tmp_path)
    assert (loaded.precision, loaded.noise_floor, loaded.extra) == ("reference", 0.5, {"layer": 9})


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "noise_floor": "0.5"}])
def test_folders_without_a_copy_of_the_config_load(tmp_path, metadata):
    facts = _saved(tmp_path, **LIKE_OLD)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path), path, metadata)
    _edit(tmp_path, saved_as=...)
    assert _facts(MFA.from_pretrained(tmp_path)) == facts
    if metadata and "noise_floor" in metadata:  # the floor that the weights were saved with
        _edit(tmp_path, noise_floor=0.25)
        assert MFA.from_pretrained(tmp_path).noise_floor == 0.5


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "does not describe a mixture: model_type is 'llama'"),
        ({"model_type": ...}, "does not describe a mixture: model_type is None"),
        ({"format_version": 2, "mfa_kernels_version": "9.1"}, "format_version 2, written by mfa_kernels 9.1.*update"),
        ({"format_version": "1"}, "format_version must be a positive integer, got '1'"),
        ({"rank": ..., "noise": ...}, "lacks rank, noise"),
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
        ({"dtype": "float64"}, r"float32 of shape .*, expected torch.float64"),
        ({"n_components": 6}, r": \w+ is torch.float32 of shape \(5,.*expected torch.float32 of shape \(6,"),
        ({"noise": "per_component"}, r"log_noise is torch.float32 of shape \(12,\), expected .* \(5, 12\)"),
        ({"noise": "blue"}, "noise must be one of"),
    ],
)
def test_bad_config(tmp_path, changes, message):
    _mixture().save_pretrained(tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        MFA.from_pretrained(tmp_path)


def test_unknown_config_keys_are_ignored(tmp_path):
    _mixture().save_pretrained(tmp_path)
    _edit(tmp_path, colour="red")
    MFA.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "7", "\x00"])
def test_config_is_not_ours(tmp_path, text):
    _mixture().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json (is not JSON|does not describe a mixture)"):
        MFA.from_pretrained(tmp_path)


def test_bad_tensors(tmp_path):
    mfa = _mixture()
    mfa.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file"):
            MFA.from_pretrained(tmp_path)
    path.write_bytes(b"PK" + whole)
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        MFA.from_pretrained(tmp_path)
    save_file({**tensors, "means": tensors["means"][:, :-1].clone()}, path)
    with pytest.raises(ValueError, match=r"means is torch.float32 of shape \(5, 11\), expected .* \(5, 12\)"):
        MFA.from_pretrained(tmp_path)
    save_file({name: t for name, t in tensors.items() if name != "center"}, path)
    with pytest.raises(ValueError, match=r"holds the tensors .*expected \['center'"):
        MFA.from_pretrained(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        MFA.from_pretrained(tmp_path)
    _mixture().save_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        MFA.from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match="from_reference_checkpoint"):
        MFA.from_pretrained(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        MFA.from_pretrained(tmp_path / "nowhere")
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):  # no names of hub repositories
        with pytest.raises(FileNotFoundError, match="is no folder here, nor"):
            MFA.from_pretrained(name)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: repositories are folders, and calls are recorded."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    root, calls = tmp_path / "hub", []

    class Api:
        def __init__(self, **kwargs: Any) -> None:
            calls.append(("api", kwargs))

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
            assert exist_ok
            calls.append(("create_repo", {"private": private}))
            repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
            assert exist_ok
            calls.append(("create_branch", {"branch": branch}))

        def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
            return (root / repo_id / name).exists()

        def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
            calls.append(("upload_folder", kwargs))
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"commit to {repo_id}"

    def download(repo_id: str, name: str, *, subfolder: str | None, **kwargs: Any) -> str:
        calls.append(("download", {"name": name, **kwargs}))
        path = root / repo_id / (subfolder or "") / name
        if not path.exists():
            raise EntryNotFoundError(f"404: {name}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(root=root, calls=calls)


def test_push_and_pull(hub):
    mfa = _mixture()
    commit = mfa.push_to_hub("regions", private=True, token="secret", extra={"layer": 8, "model": "a/model"})
    assert commit == "commit to me/regions"
    assert sorted(os.listdir(hub.root / "me" / "regions")) == ["README.md", "config.json", "model.safetensors"]
    card = (hub.root / "me" / "regions" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mfa_kernels\n")
    assert 'MFA.from_pretrained("me/regions")' in card
    assert "5 regions of 12-dimensional" in card
    assert "- layer: 8\n" in card
    called = dict(hub.calls)
    assert called["api"]["token"] == "secret"
    assert called["create_repo"] == {"private": True}
    assert called["upload_folder"]["revision"] is None
    assert "create_branch" not in called

    hub.calls.clear()
    loaded = MFA.from_pretrained(
        "me/regions", revision="v1", token="secret", cache_dir="somewhere", local_files_only=True
    )
    assert torch.equal(loaded.loadings, mfa.loadings)
    assert loaded.extra == {"layer": 8, "model": "a/model"}
    assert [kwargs["name"] for _, kwargs in hub.calls] == ["config.json", "model.safetensors"]
    for _, kwargs in hub.calls:
        assert (kwargs["revision"], kwargs["token"], kwargs["cache_dir"]) == ("v1", "secret", "somewhere")
        assert kwargs["local_files_only"] is True


def test_push_to_a_branch_keeps_a_model_card(hub):
    mfa = _mixture()
    mfa.push_to_hub("me/regions")
    (hub.root / "me" / "regions" / "README.md").write_text("written by a person")
    mfa.push_to_hub("me/regions", revision="next", commit_message="Better")
    assert (hub.root / "me" / "regions" / "README.md").read_text() == "written by a person"
    called = dict(hub.calls)
    assert called["create_branch"] == {"branch": "next"}
    assert called["upload_folder"] == {"commit_message": "Better", "revision": "next"}


def test_push_of_bad_extra_makes_no_repository(hub):
    with pytest.raises(TypeError, match="extra must hold only what JSON can"):
        _mixture().push_to_hub("me/regions", extra={"data": {1, 2}})
    assert "create_repo" not in dict(hub.calls)


def test_repository_without_a_mixture(hub):
    with pytest.raises(FileNotFoundError, match=r"'me/other' is no folder here, nor.*404: config.json"):
        MFA.from_pretrained("me/other")


# The paper's formats


def _official(
    components=4, features=10, rank=3, *, per_component=False, rotation=None, dtype=torch.float64
) -> dict[str, Tensor]:
    """A state dict as the paper's class writes it."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    identity = torch.eye(rank, dtype=dtype).repeat(components, 1, 1)
    return {
        "mu": 2 * normal(components, features),
        "dir_raw": normal(components, features, rank) / features**0.5,
        "scale_rho": 1 + normal(components, rank),
        "psi_rho": normal(components, features) if per_component else normal(features),
        "pi_logits": normal(components),
        "_rot_T": identity if rotation is None else rotation.to(dtype),
        "_rot_inv_Tt": identity if rotation is None else torch.linalg.inv(rotation.double()).mT.to(dtype),
    }


def _meta(state: dict[str, Tensor], format: int = 1, **changes: Any) -> dict[str, Any]:
    components, features, rank = state["dir_raw"].shape
    meta = {"K": components, "D": features, "psi_per_component": state["psi_rho"].dim() == 2, "version": 1}
    meta["eps_floor"] = 1e-5
    if format == 1:
        meta |= {"q": rank, "dtype": str(state["mu"].dtype)}
        meta |= {"rotation_on": False, "rotation_kind": None, "rotation_params": {}}
    else:
        meta |= {"cls": "MFA", "rank": rank}
    return meta | changes


def _official_loadings(state: dict[str, Tensor], eps: float) -> Tensor:
    direction = state["dir_raw"].double()
    norm = direction.square().sum(1, keepdim=True).sqrt().clamp_min(eps)
    return direction / norm * torch.log1p(state["scale_rho"].double().exp()).unsqueeze(1)


def _official_density(x: Tensor, state: dict[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """log p(x) and responsibilities as the paper's class defines them, float64, from the full covariances."""
    state = {name: tensor.double() for name, tensor in state.items()}
    loadings = _official_loadings(state, eps)
    noise = (torch.log1p(state["psi_rho"].exp()) + eps).expand_as(state["mu"])
    covariance = loadings @ loadings.mT + torch.diag_embed(noise)
    normal = torch.distributions.MultivariateNormal(state["mu"], covariance)
    joint = normal.log_prob(x.double().unsqueeze(1)) + state["pi_logits"].log_softmax(0)
    return joint.logsumexp(1), joint.softmax(1)


def _x(features: int = 10, count: int = 50) -> Tensor:
    return 2 * torch.randn(count, features, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _assert_same_density(mfa: MFA, state: dict[str, Tensor], eps: float) -> None:
    log_prob, responsibilities = _official_density(_x(), state, eps)
    with torch.no_grad():
        torch.testing.assert_close(mfa.log_prob(_x()), log_prob, rtol=0, atol=1e-10)
        torch.testing.assert_close(mfa.responsibilities(_x()), responsibilities, rtol=0, atol=1e-10)


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("per_component", [False, True])
def test_official_density(tmp_path, monkeypatch, format, per_component):
    monkeypatch.setattr(checkpoint, "_CHUNK_ELEMENTS", 3 * 10 * 3)  # three components, then one
    state = _official(per_component=per_component)
    torch.save({"state_dict": state, "meta": _meta(state, format, eps_floor=1e-2)}, tmp_path / "mfa.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    _assert_same_density(mfa, state, 1e-2)
    assert mfa.means.dtype == torch.float64
    assert mfa.noise_floor == 1e-2
    assert mfa.noise == ("per_component" if per_component else "shared")
    torch.testing.assert_close(mfa.center, state["mu"].mean(0))
    assert all(p.requires_grad for p in mfa.parameters())


def test_official_float32_file(tmp_path):
    state = _official(dtype=torch.float32)
    torch.save({"state_dict": state, "meta": _meta(state)}, tmp_path / "mfa.pt")
    assert MFA.from_reference_checkpoint(tmp_path / "mfa.pt").means.dtype == torch.float32
    wide = MFA.from_reference_checkpoint(tmp_path / "mfa.pt", dtype=torch.float64)  # no digit is lost on the way
    _assert_same_density(wide, state, 1e-5)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_and_unknown_keys(tmp_path, prefix):
    state = _official()
    stored: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items() if not name.startswith("_rot")}
    stored |= {"steps": torch.tensor(3), "note": "hello"}
    torch.save({"state_dict": stored, "meta": _meta(state, colour="red"), "epoch": 3}, tmp_path / "mfa.pt")
    _assert_same_density(MFA.from_reference_checkpoint(tmp_path / "mfa.pt"), state, 1e-5)


def test_bare_state_dict_warns_once(tmp_path):
    state = _official()
    state["psi_rho"][0] = -6.0  # a variance that the floor matters to
    state["dir_raw"][0, :, 0] *= 1e-6  # a norm between the two floors
    torch.save(state, tmp_path / "mfa.pt")
    with pytest.warns(UserWarning, match=r"1e-08 is taken.*pass eps_floor=1e-05") as record:
        mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    assert len(record) == 1
    assert record[0].filename == __file__
    _assert_same_density(mfa, state, 1e-8)
    assert not torch.allclose(mfa.log_prob(_x()), _official_density(_x(), state, 1e-5)[0], rtol=0, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt", eps_floor=1e-5)
    _assert_same_density(mfa, state, 1e-5)


def test_meta_without_eps_floor_warns(tmp_path):
    state = _official()
    meta = _meta(state)
    del meta["eps_floor"]
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "mfa.pt")
    with pytest.warns(UserWarning, match="does not say its eps_floor"):
        assert MFA.from_reference_checkpoint(tmp_path / "mfa.pt").noise_floor == 1e-8


def test_rotation(tmp_path):
    normal = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rotation = torch.linalg.qr(normal)[0]
    state = _official(rotation=rotation.float())  # orthogonal to the rounding of float32
    torch.save({"state_dict": state, "meta": _meta(state)}, tmp_path / "off.pt")
    torch.save({"state_dict": state, "meta": _meta(state, rotation_on=True)}, tmp_path / "on.pt")
    off, on = (MFA.from_reference_checkpoint(tmp_path / name) for name in ("off.pt", "on.pt"))
    plain = _official_loadings(state, 1e-5)
    torch.testing.assert_close(off.loadings.detach(), plain)
    torch.testing.assert_close(on.loadings.detach(), plain @ state["_rot_inv_Tt"], rtol=0, atol=1e-6)
    assert not torch.allclose(on.loadings, off.loadings, atol=0.1)
    _assert_same_density(on, state, 1e-5)
    _assert_same_density(off, state, 1e-5)


def test_oblique_rotation_is_left_out(tmp_path):
    state = _official(rotation=torch.eye(3).repeat(4, 1, 1) + 0.3 * torch.ones(3, 3).triu(1))
    meta = _meta(state, rotation_on=True, rotation_kind="oblimin")
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "mfa.pt")
    with pytest.warns(UserWarning, match=r"oblique rotation \('oblimin'"):
        mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    _assert_same_density(mfa, state, 1e-5)


def test_extreme_parameters(tmp_path):
    state = _official()
    state["psi_rho"][:5] = torch.tensor([1e4, 21.0, 800.0, -30.0, -1e4])
    state["scale_rho"][0] = 1e3
    state["dir_raw"][1, :, 0] = 0
    torch.save({"state_dict": state, "meta": _meta(state)}, tmp_path / "mfa.pt")
    mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    expected = torch.tensor([1e4, 21 + math.log1p(math.exp(-21)), 800, math.exp(-30), 0], dtype=torch.float64) + 1e-5
    torch.testing.assert_close(mfa.noise_variance[:5].detach(), expected, rtol=1e-12, atol=0)
    assert mfa.log_noise.isfinite().all()
    torch.testing.assert_close(mfa.loadings[0].norm(dim=0).detach(), torch.full((3,), 1e3).double())
    assert (mfa.loadings[1, :, 0] == 0).all()
    assert mfa.log_prob(_x()).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pi_logits": torch.zeros(5)}, r"pi_logits has shape \(5,\), expected \(4,\): mu has K, D = 4, 10"),
        ({"dir_raw": torch.zeros(5, 10, 3)}, r"dir_raw has shape \(5, 10, 3\), expected \(4, 10, 3\)"),
        ({"scale_rho": torch.zeros(4, 2)}, r"scale_rho has shape \(4, 2\), expected \(4, 3\)"),
        ({"psi_rho": torch.zeros(5, 10)}, r"psi_rho has shape \(5, 10\), expected \(4, 10\)"),
        ({"psi_rho": torch.zeros(4, 1)}, r"psi_rho has shape \(4, 1\), expected \(4, 10\)"),
        ({"psi_rho": torch.zeros(1)}, r"psi_rho has shape \(1,\), expected \(10,\)"),
        ({"_rot_inv_Tt": torch.zeros(4, 2, 2)}, r"_rot_inv_Tt has shape \(4, 2, 2\), expected \(4, 3, 3\)"),
        ({"mu": torch.zeros(4)}, r"mu must have shape \(K, D\).*got \(4,\)"),
        ({"mu": None}, r"lacks mu; it holds dir_raw"),
        ({"mu": [1.0]}, "mu must be a floating-point tensor, got list"),
        ({"mu": torch.zeros(4, 10, dtype=torch.int64)}, r"mu must be a floating-point tensor, got torch.int64"),
        ({"mu": torch.full((4, 10), math.nan)}, "mu has NaN or infinite values"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    state = {name: tensor for name, tensor in {**_official(), **change}.items() if tensor is not None}
    torch.save({"state_dict": state, "meta": {"eps_floor": 1e-5}}, tmp_path / "mfa.pt")
    with pytest.raises(ValueError, match=message):
        MFA.from_reference_checkpoint(tmp_path / "mfa.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": 5}, "meta says K = 5, but its tensors have 4"),
        ({"q": 2}, "meta says q = 2, but its tensors have 3"),
        ({"rank": 4}, "meta says rank = 4, but its tensors have 3"),
        ({"version": 2}, "version 2 of the paper's format, expected 1"),
        ({"cls": "SNMF"}, "holds a 'SNMF', expected 'MFA'"),
        ({"eps_floor": -1.0}, "noise_floor must be >= 0"),
    ],
)
def test_meta_that_does_not_fit(tmp_path, change, message):
    state = _official()
    torch.save({"state_dict": state, "meta": _meta(state) | change}, tmp_path / "mfa.pt")
    with pytest.raises(ValueError, match=message):
        MFA.from_reference_checkpoint(tmp_path / "mfa.pt")


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_file_does_not_run(tmp_path, legacy):
    marker, path = tmp_path / "marker", tmp_path / "mfa.pt"
    content = {"state_dict": _official(), "meta": {"extra": _Malicious(marker)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ValueError, match=r"is refused: it asks for \w+\.system.*only tensors and plain values are read"
    ):
        MFA.from_reference_checkpoint(path)
    path.write_bytes(pickle.dumps(_Malicious(marker), protocol=2))
    with pytest.raises(ValueError, match="is refused"):
        MFA.from_reference_checkpoint(path)
    assert not marker.exists()
    os.system(f"touch {marker}")
    assert marker.exists()  # the command would have shown


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "mfa.pt"
    state = _official()
    torch.save({"state_dict": state, "meta": _meta(state)}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"plain text, not a checkpoint", b"\x80\x02garbage"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mfa.pt is (refused|not a complete torch checkpoint)"):
            MFA.from_reference_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list, expected a dict"):
        MFA.from_reference_checkpoint(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="lacks mu, dir_raw, scale_rho, psi_rho, pi_logits; it holds weight"):
        MFA.from_reference_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        MFA.from_reference_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("noise", ["shared", "per_component"])
@pytest.mark.parametrize("noise_floor", [0.0, 1e-4, 2.0])
def test_reference_roundtrip(tmp_path, monkeypatch, format, noise, noise_floor):
    monkeypatch.setattr(checkpoint, "_CHUNK_ELEMENTS", 3 * 10 * 3)
    mfa = _mixture(4, 10, 3, noise, torch.float64, noise_floor=noise_floor)
    mfa.to_reference_checkpoint(tmp_path / "mfa.pt", format=format)
    assert os.listdir(tmp_path) == ["mfa.pt"]
    content = torch.load(tmp_path / "mfa.pt", weights_only=True)
    state, meta = content["state_dict"], content["meta"]
    keys = {"K", "D", "psi_per_component", "eps_floor", "version"}
    keys |= {"q", "dtype", "rotation_on", "rotation_kind", "rotation_params"} if format == 1 else {"cls", "rank"}
    assert set(meta) == keys
    assert set(state) == {"mu", "dir_raw", "scale_rho", "psi_rho", "pi_logits", "_rot_T", "_rot_inv_Tt"}
    assert 0 < meta["eps_floor"] < 0.5
    assert noise_floor != 1e-4 or meta["eps_floor"] == 1e-4
    torch.testing.assert_close(state["dir_raw"].norm(dim=1), torch.ones(4, 3, dtype=torch.float64))
    _assert_same_density(mfa, state, meta["eps_floor"])  # as the paper's class sees the file

    loaded = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    for name in ("means", "loadings", "noise_variance", "log_weights", "center"):
        torch.testing.assert_close(getattr(loaded, name), getattr(mfa, name), rtol=1e-12, atol=1e-12)


def test_reference_roundtrip_of_extremes(tmp_path):
    mfa = _mixture(4, 10, 3, dtype=torch.float32)
    mfa.extra = {"layer": 8}
    with torch.no_grad():
        mfa.loadings[1, :, 2] = 0
        mfa.loadings[2] *= 1e6
        mfa.log_noise[0] = math.log(1e4)
        mfa.log_noise[1] = math.log(1e-9)
        mfa.weight_logits[3] = -torch.inf
    mfa.to_reference_checkpoint(tmp_path / "mfa.pt")
    state = torch.load(tmp_path / "mfa.pt", weights_only=True)["state_dict"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(state[name].isfinite().all() for name in ("dir_raw", "scale_rho", "psi_rho"))
    assert state["dir_raw"][1, :, 2].tolist() == [1.0] + 9 * [0.0]
    loaded = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    torch.testing.assert_close(loaded.loadings, mfa.loadings, rtol=1e-5, atol=1e-5)
    assert loaded.loadings[1, :, 2].abs().max() < 1e-37
    torch.testing.assert_close(loaded.noise_variance, mfa.noise_variance, rtol=1e-5, atol=0)
    assert loaded.log_weights[3] == -torch.inf
    assert loaded.extra == {"layer": 8}


def test_reference_of_half_precision_and_rank_0(tmp_path):
    for mfa in (_mixture(4, 10, 3, dtype=torch.bfloat16), _mixture(4, 10, 0)):
        mfa.to_reference_checkpoint(tmp_path / "mfa.pt")
        loaded = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
        assert loaded.means.dtype == torch.float32  # the paper's class has no half precision
        assert torch.equal(loaded.means, mfa.means.float())
        torch.testing.assert_close(loaded.loadings, mfa.loadings.float())
        torch.testing.assert_close(loaded.noise_variance, mfa.noise_variance.float(), rtol=1e-2, atol=0)


def test_reference_save_refuses(tmp_path):
    with pytest.raises(ValueError, match="format must be 1 or 2, got 3"):
        _mixture().to_reference_checkpoint(tmp_path / "mfa.pt", format=3)
    mfa = _mixture()
    mfa.extra = {"layer": torch.tensor(8)}
    with pytest.raises(TypeError, match="extra must hold only what JSON can"):
        mfa.to_reference_checkpoint(tmp_path / "mfa.pt")
    assert not list(tmp_path.iterdir())


def test_density_survives_every_format(tmp_path):
    """From the paper's file to our folder and back to the paper's other format."""
    state = _official(dtype=torch.float64)
    torch.save({"state_dict": state, "meta": _meta(state)}, tmp_path / "first.pt")
    mfa = MFA.from_reference_checkpoint(tmp_path / "first.pt")
    mfa.save_pretrained(tmp_path / "folder")
    mfa = MFA.from_pretrained(tmp_path / "folder")
    mfa.to_reference_checkpoint(tmp_path / "second.pt", format=2)
    mfa = MFA.from_reference_checkpoint(tmp_path / "second.pt")
    _assert_same_density(mfa, state, 1e-5)
    assert mfa.noise_floor == 1e-5

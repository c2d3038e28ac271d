"""Saving and loading: our folder, and the hub (a stand-in, no network)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mfa_kernels import MFA, __version__, fit
from mfa_kernels.mixture import saving
from tests.helpers.mixtures import random_mfa

# Our folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("noise", "rank"), [("shared", 3), ("per_component", 1), ("shared", 0)])
def test_roundtrip_is_bitwise(tmp_path, dtype, noise, rank):
    mfa = random_mfa(rank=rank, noise=noise, dtype=dtype, noise_floor=1e-5, precision="reference")
    with torch.no_grad():
        mfa.weight_logits[0] = -torch.inf
    mfa.save_pretrained(tmp_path / "deep" / "folder")
    loaded = MFA.from_pretrained(tmp_path / "deep" / "folder")
    for name, tensor in mfa.tensors().items():
        assert loaded.tensors()[name].dtype == dtype
        assert torch.equal(loaded.tensors()[name], tensor), name
    assert (loaded.noise, loaded.precision, loaded.noise_floor) == (noise, "reference", 1e-5)
    assert loaded.extra == {}
    assert [(n, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.requires_grad) for n, p in mfa.named_parameters()
    ]
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == ["config.json", "model.safetensors"]


def test_loaded_mixture_trains_and_is_independent_of_the_file(tmp_path):
    mfa = random_mfa()
    mfa.save_pretrained(tmp_path)
    loaded = MFA.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.log_prob(x), mfa.log_prob(x))
    loaded(x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters())


def test_load_draws_no_global_random_numbers(tmp_path):
    random_mfa().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    MFA.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_load_overrides(tmp_path):
    mfa = random_mfa()
    mfa.save_pretrained(tmp_path / "inner")
    loaded = MFA.from_pretrained(tmp_path, subfolder="inner", dtype=torch.float64, precision="reference", device="cpu")
    assert loaded.precision == "reference"
    assert loaded.means.dtype == loaded.center.dtype == torch.float64
    assert torch.equal(loaded.loadings, mfa.loadings.double())

    class Derived(MFA):
        pass

    assert type(Derived.from_pretrained(tmp_path / "inner")) is Derived


def test_the_report_of_the_fit_travels(tmp_path):
    mfa = fit(torch.randn(500, 6), 3, 1, epochs=2, seed=4, progress=False)
    report = mfa.fit_report
    assert len(report.history) == 3
    mfa.save_pretrained(tmp_path / "first")
    loaded = MFA.from_pretrained(tmp_path / "first")
    assert loaded.fit_report == report
    assert type(loaded.fit_report) is type(report)
    assert "seed 4" in str(loaded.fit_report)
    loaded.save_pretrained(tmp_path / "second")
    assert MFA.from_pretrained(tmp_path / "second").fit_report == report
    mfa.fit_report = "none of ours"
    with pytest.raises(TypeError, match="fit_report must be a FitReport or None, got 'none of ours'"):
        mfa.save_pretrained(tmp_path / "first")
    random_mfa().save_pretrained(tmp_path / "none")
    assert "fit" not in json.loads((tmp_path / "none" / "config.json").read_text())
    assert MFA.from_pretrained(tmp_path / "none").fit_report is None
    _edit(tmp_path / "none", fit=None)
    assert MFA.from_pretrained(tmp_path / "none").fit_report is None


def test_the_report_is_that_of_the_weights(tmp_path):
    """Though a crash came between the two files of another save."""
    for seed in (1, 2):
        fit(torch.randn(300, 6), 3, 1, epochs=1, seed=seed, progress=False).save_pretrained(tmp_path / str(seed))
    shutil.copy(tmp_path / "2" / "config.json", tmp_path / "1")
    assert MFA.from_pretrained(tmp_path / "1").fit_report.run["settings"]["seed"] == 1


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (3, "fit must be an object, or null, got 3"),
        ({"history": 3}, "fit: history must be a list of an object, got 3"),
        ({"method": {"a": 1}}, "fit: method must be a string"),
        ({"run": []}, r"fit: run must be an object, got \[\]"),
    ],
)
def test_a_report_edited_by_hand_is_refused_by_name(tmp_path, fit, message):
    random_mfa().save_pretrained(tmp_path)
    _edit(tmp_path, fit=fit)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        MFA.from_pretrained(tmp_path)


def test_extra_travels(tmp_path):
    extra = {"model": "a/model", "layer": 8, "nested": {"tokens": [1, 2]}}
    mfa = random_mfa()
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
        random_mfa().save_pretrained(tmp_path / "folder", extra=extra)
    assert not (tmp_path / "folder").exists()


def test_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    mfa = random_mfa()
    mfa.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        mfa.means.add_(1)

    def fail(tensors: Any, path: Path, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half of the ten")
        raise OSError("no space left")

    monkeypatch.setattr(saving, "atomic_save_safetensors", fail)
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
    random_mfa().save_pretrained(tmp_path)
    assert seen == [[True, True], [True]]


def _facts(mfa: MFA) -> tuple[Any, ...]:
    """All that a folder keeps of a mixture."""
    tensors = {name: tensor.tolist() for name, tensor in mfa.state_dict().items()}
    return mfa.noise, mfa.precision, mfa.noise_floor, mfa.means.dtype, mfa.extra, tensors


def _saved(folder: Path, **options: Any) -> tuple[Any, ...]:
    mfa = random_mfa(**options)
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
        random_mfa(**changed).save_pretrained(tmp_path / "folder", extra=changed)
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
    random_mfa().save_pretrained(tmp_path, extra={"layer": 8})
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
    random_mfa().save_pretrained(tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        MFA.from_pretrained(tmp_path)


def test_unknown_config_keys_are_ignored(tmp_path):
    random_mfa().save_pretrained(tmp_path)
    _edit(tmp_path, colour="red")
    MFA.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "7", "\x00"])
def test_config_is_not_ours(tmp_path, text):
    random_mfa().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json (is not JSON|does not describe a mixture)"):
        MFA.from_pretrained(tmp_path)


def test_bad_tensors(tmp_path):
    mfa = random_mfa()
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
    random_mfa().save_pretrained(tmp_path)
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


def test_push_and_pull(hub):
    mfa = random_mfa()
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


def test_the_card_says_how_it_was_fitted(hub):
    mfa = fit(torch.randn(500, 6), 3, 1, epochs=1, seed=4, progress=False)
    mfa.push_to_hub("regions")
    card = (hub.root / "me" / "regions" / "README.md").read_text()
    assert "3 regions of 6-dimensional activations, 1 local directions each" in card
    nll = mfa.fit_report.held_out_nll
    assert f"- held-out negative log-likelihood: {nll:.3f} nats per token (25 rows, held out by row)\n" in card
    assert f"- fitted: {mfa.fit_report.run['began']}, em (asked for: auto), seed 4, K 3, R 1, epochs 1\n" in card
    assert "- data: 500 rows of width 6, fingerprint " in card
    assert f"- with: mfa_kernels {__version__}, python " in card
    assert MFA.from_pretrained("me/regions").fit_report == mfa.fit_report


@pytest.mark.parametrize("form", ["{}", "file://{}", "~/{}"])
def test_no_path_of_this_machine_is_uploaded(hub, tmp_path, monkeypatch, form):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    (tmp_path / "secret").mkdir()
    path = form.format(f"{tmp_path.name}/secret" if "~" in form else tmp_path / "secret")
    for extra, where in (
        ({"model": path}, r"extra\['model'\]"),
        ({"of": [{"model": path}]}, r"extra\['of'\]\[0\]\['model'\]"),
        ({path: 1}, "extra"),
    ):
        with pytest.raises(ValueError, match=rf"^{where} is the path '{path}' of this machine"):
            random_mfa().push_to_hub("me/regions", extra=extra)
        mfa = random_mfa()
        mfa.extra = extra
        with pytest.raises(ValueError, match="of this machine, which is not uploaded"):
            mfa.push_to_hub("me/regions")
    assert not hub.calls
    random_mfa().push_to_hub("me/regions", extra={"separator": "/", "model": "/nowhere/at/all", "of": "a/model"})
    mfa.save_pretrained(tmp_path / "here")
    assert MFA.from_pretrained(tmp_path / "here").extra == extra, "the user's own"


def test_the_card_says_what_it_is_of(hub):
    mfa = random_mfa()
    mfa.push_to_hub("regions", extra={"model": "a/model", "layer": "model.layers.8"}, license="mit")
    card = (hub.root / "me" / "regions" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert head.splitlines()[:3] == ["library_name: mfa_kernels", "license: mit", "base_model: a/model"]
    assert "activations of a/model, layer model.layers.8, 3 local directions each" in body
    assert "- regions (K): 5\n- local directions each (R): 3\n- features (D): 12\n- noise: shared\n" in body
    assert "steer(model, mfa, layer='model.layers.8', component=0, alpha=0.3)" in body
    for model in ("tiny_lm", "smollm2", "local:secret", "LlamaForCausalLM"):  # no repositories of the hub
        mfa.push_to_hub(f"me/{model[:5].strip(':')}", extra={"model": model})
        assert "base_model" not in (hub.root / "me" / model[:5].strip(":") / "README.md").read_text()


@pytest.mark.parametrize("license", ["MIT\nevil: true", "", "my own"])
def test_a_license_that_is_none_of_the_hub(hub, license):
    with pytest.raises(ValueError, match="license must be the name of one on the hub"):
        random_mfa().push_to_hub("me/regions", license=license)
    assert not hub.calls


def test_push_to_a_branch_keeps_a_model_card(hub):
    mfa = random_mfa()
    mfa.push_to_hub("me/regions")
    (hub.root / "me" / "regions" / "README.md").write_text("written by a person")
    mfa.push_to_hub("me/regions", revision="next", commit_message="Better")
    assert (hub.root / "me" / "regions" / "README.md").read_text() == "written by a person"
    called = dict(hub.calls)
    assert called["create_branch"] == {"branch": "next"}
    assert called["upload_folder"] == {"commit_message": "Better", "revision": "next"}


def test_push_of_bad_extra_makes_no_repository(hub):
    with pytest.raises(TypeError, match="extra must hold only what JSON can"):
        random_mfa().push_to_hub("me/regions", extra={"data": {1, 2}})
    assert "create_repo" not in dict(hub.calls)


def test_repository_without_arandom_mfa(hub):
    with pytest.raises(FileNotFoundError, match=r"'me/other' is no folder here, nor.*404: config.json"):
        MFA.from_pretrained("me/other")

"""One of several mixtures in a folder or a hub repository, the paper's own files among them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mfa_kernels import MFA
from tests.helpers.mixtures import random_mfa

PAPERS = ("llama-3.1-8b_mfa_l8_8k.ckpt", "llama-3.1-8b_mfa_l22_8k.ckpt")


def _fill(folder: Path) -> dict[str, MFA]:
    """Files as the paper's repositories have them, beside mixtures of ours in folders of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("The paper's mixtures")
    made = {name: random_mfa() for name in (*PAPERS, "layer-3", "layer12")}
    for i, (name, mfa) in enumerate(made.items()):
        mfa.means.data += i
        if name in PAPERS:
            mfa.to_reference_checkpoint(folder / name)
        else:
            mfa.save_pretrained(folder / name)
    return made


@pytest.fixture(params=["folder", "hub"])
def several(request: pytest.FixtureRequest, hub: SimpleNamespace, tmp_path: Path) -> tuple[str | Path, dict[str, MFA]]:
    if request.param == "folder":
        return tmp_path / "several", _fill(tmp_path / "several")
    return "them/several", _fill(hub.root / "them" / "several")


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({"layer": 22}, PAPERS[1]),
        ({"layer": 8}, PAPERS[0]),
        ({"layer": "model.layers.12"}, "layer12"),
        ({"layer": 3}, "layer-3"),
        ({"filename": PAPERS[1]}, PAPERS[1]),
        ({"filename": "layer12/config.json"}, "layer12"),
        ({"subfolder": "layer12"}, "layer12"),
        ({"subfolder": "layer12", "filename": "config.json"}, "layer12"),
    ],
)
def test_the_one_that_is_meant(several: tuple[str | Path, dict[str, MFA]], chosen: dict, name: str) -> None:
    source, made = several
    loaded = MFA.from_pretrained(source, dtype=torch.float64, **chosen)
    torch.testing.assert_close(loaded.means, made[name].means.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loaded.loadings, made[name].loadings.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("chosen", "error", "says"),
    [
        ({}, ValueError, "has several mixtures, name one by layer or filename: "),
        ({"filename": "config.json"}, ValueError, "layer-3/config.json, layer12/config.json|layer12/.*, layer-3/.*"),
        ({"layer": 2}, FileNotFoundError, "layer=2: .* has no such mixture; it has .*mfa_l22_8k.ckpt"),
        ({"layer": 31}, FileNotFoundError, "layer=31"),
        ({"filename": "other.pt", "layer": 8}, FileNotFoundError, "layer=8 and filename='other.pt'"),
    ],
)
def test_all_are_listed_where_it_is_not_one(
    several: tuple[str | Path, dict[str, MFA]], chosen: dict, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as told:
        MFA.from_pretrained(several[0], **chosen)
    assert str(several[0]) in str(told.value)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".ckpt"])
def test_the_only_one_needs_no_name(hub: SimpleNamespace, ending: str) -> None:
    mfa = random_mfa()
    (hub.root / "them" / "one").mkdir(parents=True)
    mfa.to_reference_checkpoint(hub.root / "them" / "one" / f"mixture{ending}")
    loaded = MFA.from_pretrained("them/one", revision="v1", token="secret", cache_dir="somewhere", precision="fast")
    torch.testing.assert_close(loaded.means, mfa.means)
    assert loaded.precision == "fast"
    called = [kwargs for name, kwargs in hub.calls if name in ("list", "download")]
    assert all(kwargs["revision"] == "v1" for kwargs in called)
    assert called[-1]["cache_dir"] == "somewhere"


def test_one_of_ours_is_not_listed(hub: SimpleNamespace) -> None:
    random_mfa().push_to_hub("me/regions")
    hub.calls.clear()
    MFA.from_pretrained("me/regions")
    assert [name for name, _ in hub.calls] == ["download", "download"]


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "mfa_l3.pt")
    with pytest.raises(ValueError, match="is refused: it asks for"):
        MFA.from_pretrained(tmp_path, layer=3)
    assert not (tmp_path / "ran").exists()


def test_without_the_hub_the_first_error_is_told(hub: SimpleNamespace) -> None:
    (hub.root / "them" / "one").mkdir(parents=True)
    random_mfa().to_reference_checkpoint(hub.root / "them" / "one" / "mixture.pt")
    with pytest.raises(FileNotFoundError, match="nor a mixture on the Hugging Face hub"):
        MFA.from_pretrained("them/one", local_files_only=True)


@pytest.mark.parametrize("way", ["local_files_only", "offline"])
def test_without_a_network_the_cache_is_looked_at(
    hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    import huggingface_hub

    made = _fill(hub.root / "them" / "several")

    def snapshot(repository: str, *, local_files_only: bool, **options: object) -> str:
        assert local_files_only
        folder = hub.root / repository
        if not folder.is_dir():
            raise FileNotFoundError("nothing of it is there")
        return str(folder)

    def no_network(*args: object, **options: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    if way == "offline":
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", no_network)
    options = {"local_files_only": True} if way == "local_files_only" else {}
    loaded = MFA.from_pretrained("them/several", layer=22, **options)
    torch.testing.assert_close(loaded.means, made[PAPERS[1]].means)
    with pytest.raises(FileNotFoundError, match=r"them/none"):
        MFA.from_pretrained("them/none", layer=22, **options)
    with pytest.raises(FileNotFoundError, match="is no folder here, nor a mixture"):
        MFA.from_pretrained("them/none", **options)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer must be a number, or end in one"):
        MFA.from_pretrained(tmp_path, layer="last")
    with pytest.raises(ValueError, match="layer must be a number, or end in one"):
        MFA.from_pretrained(tmp_path, layer="-1")
    with pytest.raises(TypeError, match="filename must be a string"):
        MFA.from_pretrained(tmp_path, filename=3)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        MFA.from_pretrained(tmp_path / "none", layer=3)

"""The cache that delphi reads, by the rules of its loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mfa_kernels import MFA
from mfa_kernels.data import ActivationStore, ActivationStoreWriter
from mfa_kernels.interpret.contexts import assignments
from mfa_kernels.interpret.delphi import write_delphi_cache
from tests.interpret.planted import MemoryStore


@pytest.fixture
def on_disk(store: MemoryStore, tmp_path: Path) -> ActivationStore:
    """The planted rows, each document behind a token that has no row."""
    writer = ActivationStoreWriter(tmp_path / "store", store.n_features, meta={"layer": "model.layers.3", "model": "m"})
    with writer:
        start = 0
        for document in store.documents:
            rows = store.activations[start : start + len(document)].nan_to_num(0.0, 0.0, 0.0)
            writer.add_document([0, *document], range(1, 1 + len(document)), rows)
            start += len(document)
    return ActivationStore(tmp_path / "store")


@pytest.mark.parametrize("strength", ["closeness", "responsibility"])
def test_locations_are_the_tokens_that_a_region_owns(
    mfa: MFA, on_disk: ActivationStore, tmp_path: Path, strength: str
) -> None:
    place = write_delphi_cache(tmp_path / "cache", mfa, on_disk, context=8, strength=strength, splits=2)
    assert place == tmp_path / "cache" / "model.layers.3"
    assert json.loads((place / "config.json").read_text())["ctx_len"] == 8
    assert sorted(path.name for path in place.glob("*.safetensors")) == ["0_1.safetensors", "2_3.safetensors"]
    assigned = assignments(mfa, on_disk)
    seen: dict[int, tuple[list[int], list[float]]] = {}
    for path in place.glob("*.safetensors"):
        first = int(path.name.split("_")[0])  # delphi adds it to the latents of a file
        content = load_file(path)
        tokens, locations = content["tokens"], content["locations"].long()
        assert tokens.shape[1] == 8
        assert content["activations"].dtype == torch.float16
        for (window, column, latent), value in zip(locations.tolist(), content["activations"].tolist()):
            found = seen.setdefault(latent + first, ([], []))
            found[0].append(int(tokens[window, column]))
            found[1].append(value)
    for k in range(4):
        rows = assigned.rows(k)
        expected = assigned.responsibilities[rows]
        if strength == "closeness":
            expected = expected / (1 + assigned.distances[rows] / 8**0.5)
        assert seen[k][0] == on_disk.tokens[rows].tolist()
        assert seen[k][1] == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("layer", ["../../escaped", "/absolute", "a/b", "..", ""])
def test_nothing_is_written_outside_of_the_folder(mfa: MFA, store: MemoryStore, tmp_path: Path, layer: str) -> None:
    with ActivationStoreWriter(tmp_path / "store", store.n_features, meta={"layer": layer}) as writer:
        writer.add_document([0], [0], store.activations[:1])
    with pytest.raises(ValueError, match="store: its layer must be the path of a module"):
        write_delphi_cache(tmp_path / "x" / "y", mfa, ActivationStore(tmp_path / "store"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_a_cache_that_is_there_is_kept(mfa: MFA, on_disk: ActivationStore, tmp_path: Path) -> None:
    place = write_delphi_cache(tmp_path / "cache", mfa, on_disk, context=8)
    with pytest.raises(FileExistsError, match="holds a cache already"):
        write_delphi_cache(tmp_path / "cache", mfa, on_disk, context=4)
    write_delphi_cache(tmp_path / "cache", mfa, on_disk, context=4, overwrite=True)
    assert json.loads((place / "config.json").read_text())["ctx_len"] == 4


def test_wrong_arguments(mfa: MFA, on_disk: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="strength must be one of"):
        write_delphi_cache(tmp_path, mfa, on_disk, strength="loud")
    with pytest.raises(ValueError, match="context"):
        write_delphi_cache(tmp_path, mfa, on_disk, context=0)

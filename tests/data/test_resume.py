"""Harvests that were cut off are resumed to the same files, and damaged or other stores are refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mfa_kernels.common import locks
from mfa_kernels.common.files import atomic_write_json
from mfa_kernels.common.locks import LOCK
from mfa_kernels.data import language_model
from tests.data.harvesting import LONG, TEXTS, Streamed, files, numbered, quiet

pytestmark = pytest.mark.usefixtures("one_thread")  # these models are too small for more


class CutOff(Exception):
    pass


@contextmanager
def cut_off_after(writes: int) -> Iterator[None]:
    """The process 'dies' before it writes another manifest; a shard that the manifest lacks may be there."""
    left = iter(range(writes))

    def write(path: Path, value: Any) -> None:
        if next(left, None) is None:
            raise CutOff
        atomic_write_json(path, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mfa_kernels.data.store.atomic_write_json", write)
        yield


CUT = {"context": 9, "batch_size": 2, "rows_per_shard": 40}


@pytest.mark.parametrize("max_tokens", [None, 333])
def test_cut_off_anywhere_it_goes_on_to_the_same_files(llama: tuple, tmp_path: Path, max_tokens: int | None) -> None:
    model, tokenizer = llama
    options = {**CUT, "max_tokens": max_tokens}
    whole = quiet(model, tokenizer, LONG, [0, 2], tmp_path / "whole", **options)
    assert len(whole[0].shards) > 8
    assert max_tokens is None or len(whole[0]) == 333
    cuts = 0
    while True:
        with cut_off_after(3):  # two stores begin with a manifest each: one more shard in each life
            try:
                quiet(model, tokenizer, LONG, [0, 2], tmp_path / "cut", resume=True, **options)
                break
            except CutOff:
                cuts += 1
    assert cuts > 8
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert "progress" not in (tmp_path / "cut" / "model.layers.0" / "manifest.json").read_text()


def test_going_on_the_model_reads_only_what_is_missing(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    quiet(model, tokenizer, LONG, 1, tmp_path / "whole", **CUT)
    total = len(passes)
    with cut_off_after(12), pytest.raises(CutOff):
        quiet(model, tokenizer, LONG, 1, tmp_path / "cut", **CUT)
    passes.clear()
    quiet(model, tokenizer, LONG, 1, tmp_path / "cut", resume=True, **CUT)
    assert 0 < len(passes) < total * 3 // 4
    passes.clear()
    quiet(model, tokenizer, LONG, 1, tmp_path / "cut", resume=True, **CUT)
    assert not passes, "it is complete"
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_rows_that_are_not_finite_are_counted_once(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    with pytest.warns(UserWarning, match="not finite"):
        quiet(model, tokenizer, LONG, 0, tmp_path / "whole", **CUT)
    with cut_off_after(3), pytest.raises(CutOff):
        quiet(model, tokenizer, LONG, 0, tmp_path / "cut", **CUT)
    with pytest.warns(UserWarning, match="not finite"):
        quiet(model, tokenizer, LONG, 0, tmp_path / "cut", resume=True, **CUT)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.fixture
def cut(llama: tuple, tmp_path: Path) -> Path:
    """A store of four shards that is not complete."""
    with cut_off_after(5), pytest.raises(CutOff):
        quiet(*llama, LONG, 1, tmp_path, **CUT)
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "activations-00002.safetensors: this shard is in the manifest"),
        (lambda path: path.write_bytes(b"x"), ValueError, "activations-00002.safetensors: 1 bytes found"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
            ValueError,
            "activations-00002.safetensors: corrupt",
        ),
    ],
    ids=["missing", "truncated", "corrupt"],
)
def test_damaged_shards_are_reported_by_name(
    llama: tuple, cut: Path, damage: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    damage(cut / "activations-00002.safetensors")
    with pytest.raises(error, match=message):
        quiet(*llama, LONG, 1, cut, resume=True, **CUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 8}, "context = 8, there 9"),
        ({"batch_size": 4, "seed": 1}, "batch_size = 4, there 2; seed = 1, there 0"),
        ({"dtype": torch.bfloat16}, "dtype = 'torch.bfloat16', there 'torch.float32'"),
        ({"rows_per_shard": 50}, "rows_per_shard = 50, there 40"),
        ({"layer": 0}, "layer = 'model.layers.0', there 'model.layers.1'"),
        ({"texts": [*LONG[:14], "w1", *LONG[15:]]}, "windows of texts are not those of the stores"),
    ],
)
def test_what_differs_is_named(llama: tuple, cut: Path, change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"texts": LONG, "layer": 1, **CUT, **change}
    with pytest.raises(ValueError, match=message):
        quiet(*llama, options.pop("texts"), options.pop("layer"), cut, resume=True, **options)


def test_what_a_killed_process_left_is_removed(llama: tuple, cut: Path) -> None:
    names = [".activations-00009.safetensors.0af.tmp", ".manifest.json.0af.tmp", ".tmpK3eXbq"]
    for name in [*names, ".mine"]:
        (cut / name).write_text("")
    quiet(*llama, LONG, 1, cut, resume=True, **CUT)
    assert {path.name for path in cut.iterdir() if path.name.startswith(".")} == {".mine", LOCK}


def edited(folder: Path, **changes: Any) -> None:
    """The manifest of a store as earlier versions wrote it; None takes a key away."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("checksum", None)
    manifest["meta"] = {key: value for key, value in {**manifest["meta"], **changes}.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_store_of_an_earlier_version_with_paths_goes_on(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    lm = str(tmp_path / "lm")
    quiet(lm, None, LONG, 1, tmp_path / "store", **CUT)
    before = {"model": lm, "tokenizer": lm, "model_fingerprint": None, "weights_fingerprint": None}
    edited(tmp_path / "store", **before)
    assert quiet(lm, None, LONG, 1, tmp_path / "store", resume=True, **CUT).complete
    edited(tmp_path / "store", model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="other settings: here model = 'local:lm', there 'local:other'"):
        quiet(lm, None, LONG, 1, tmp_path / "store", resume=True, **CUT)


def test_resume_needs_the_same_weights(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The two models have one name and size."""
    other = copy.deepcopy(model)
    assert language_model.weights_fingerprint(other) == language_model.weights_fingerprint(model)
    with torch.no_grad():
        other.model.norm.weight[3] += 0.5
    quiet(model, tokenizer, LONG, 1, tmp_path, **CUT)
    assert quiet(model, tokenizer, LONG, 1, tmp_path, resume=True, **CUT).complete
    with pytest.raises(ValueError, match="resume: .* was written with other settings: here weights_fingerprint = "):
        quiet(other, tokenizer, LONG, 1, tmp_path, resume=True, **CUT)


def test_resume_needs_a_folder_and_spares_it(llama: tuple, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it needs out"):
        quiet(*llama, TEXTS, 1, resume=True)
    with pytest.raises(ValueError, match="it needs no overwrite"):
        quiet(*llama, TEXTS, 1, tmp_path, resume=True, overwrite=True)


def test_a_folder_that_is_written_to_is_refused_before_the_texts_are_read(
    llama: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    taken: list[str] = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            taken.append(text)
            yield text

    with locks.alone(tmp_path / "model.layers.2"):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(TimeoutError, match=r"model\.layers\.2: another process.* is writing to this folder"):
                quiet(*llama, texts(), [0, 2], tmp_path, **options)
    assert not taken
    quiet(*llama, TEXTS, [0, 2], tmp_path)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        quiet(*llama, texts(), [0, 2], tmp_path)
    assert not taken


def test_a_complete_store_is_given_back_without_a_lock(llama: tuple, tmp_path: Path) -> None:
    quiet(*llama, TEXTS, 0, tmp_path)
    (tmp_path / LOCK).unlink()  # as in a folder that may only be read
    assert quiet(*llama, TEXTS, 0, tmp_path, resume=True).complete
    assert not (tmp_path / LOCK).exists()


def test_a_stream_that_was_cut_off_goes_on_to_the_same_files(llama: tuple, tmp_path: Path) -> None:
    options = {**CUT, "max_tokens": 333, "buffer_size": 20}
    quiet(*llama, numbered([]), 1, tmp_path / "whole", **options)
    with cut_off_after(4), pytest.raises(CutOff):
        quiet(*llama, numbered([]), 1, tmp_path / "cut", **options)
    with pytest.raises(ValueError, match="buffer_size = 21, there 20"):
        quiet(*llama, numbered([]), 1, tmp_path / "cut", resume=True, **{**options, "buffer_size": 21})
    quiet(*llama, Streamed([]), 1, tmp_path / "cut", resume=True, **options)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_harvest_of_an_earlier_version_that_was_cut_off_is_begun_anew(llama: tuple, cut: Path) -> None:
    manifest = json.loads((cut / "manifest.json").read_text())
    manifest.pop("checksum", None)
    manifest["progress"]["batches"] = manifest["progress"].pop("windows")
    (cut / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"was begun by an earlier version, .* begin anew \(overwrite\)"):
        quiet(*llama, LONG, 1, cut, resume=True, **CUT)
    assert quiet(*llama, LONG, 1, cut, overwrite=True, **CUT).complete

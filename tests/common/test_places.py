"""An output replaces its own kind only, and never an input; from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mfa_kernels import MFA, fit, harvest
from mfa_kernels.common.places import (
    CHECKPOINT,
    CODES,
    CURVE,
    FIGURE,
    MIXTURE,
    PAGE,
    PAPER,
    STORE,
    check_apart,
    check_not_read,
    check_place,
)
from mfa_kernels.data import ActivationStore, ActivationStoreWriter
from mfa_kernels.evaluation.codes import write_codes
from mfa_kernels.fitting.checkpoint import clear
from mfa_kernels.interpret import region_scatter, regions_map, write_report
from tests.helpers.outputs import state

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


def write_store(folder: Path) -> None:
    with ActivationStoreWriter(folder, 6, overwrite=True) as writer:
        writer.add_document(list(range(60)), list(range(60)), X)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind: folders store, mixture, checkpoint; files curve, codes, paper, page, figure, notes."""
    folder = tmp_path_factory.mktemp("places")
    write_store(folder / "store")
    mfa = fit(X, 3, 1, epochs=1, checkpoint=folder / "checkpoint", log=folder / "curve", progress=False)
    mfa.save_pretrained(folder / "mixture")
    write_codes(mfa, [X], folder / "codes", progress=False)
    mfa.to_reference_checkpoint(folder / "paper")
    (folder / "notes").write_text("mine")
    (folder / "page").write_text("<!DOCTYPE html>\n")
    (folder / "figure").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


FILES = {"curve": CURVE, "codes": CODES, "paper": PAPER, "page": PAGE, "figure": FIGURE}
FOLDERS = {"store": STORE, "mixture": MIXTURE, "checkpoint": CHECKPOINT}


def test_of_each_kind_its_own_is_replaced_and_no_other(places: Path) -> None:
    for name, kind in FILES.items():
        for other in FILES:
            if other == name:
                check_place(other, kind, "path")
            else:
                with pytest.raises(FileExistsError, match=f"path: {other} is there already, and is not {kind.what}"):
                    check_place(other, kind, "path")
        with pytest.raises(FileExistsError, match="notes"):
            check_place("notes", kind, "path")
        check_place("new", kind, "path")
    for name, kind in FOLDERS.items():
        check_place(name, kind, "out")
        check_place("new", kind, "out")
        for other in FOLDERS.keys() - {name}:
            with pytest.raises(FileExistsError, match=f"out: {other} holds "):
                check_place(other, kind, "out")


def test_a_damaged_store_is_a_store_still(places: Path) -> None:
    manifest = places / "store" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:80])
    with pytest.raises(FileExistsError, match="store holds a store of activations"):
        check_place("store", MIXTURE, "out")


def test_a_file_of_ours_is_no_reason_where_it_is_somebody_elses(places: Path) -> None:
    (places / "site").mkdir()
    (places / "site" / "manifest.json").write_text('{"name": "a web page"}')
    check_place("site/curve.jsonl", CURVE, "log")
    check_place("site", MIXTURE, "out")
    with pytest.raises(FileExistsError, match="manifest.json is there already, and is not of a store"):
        check_place("site", STORE, "out")


def test_beside_a_mixture_there_is_room_but_for_its_own_names(places: Path) -> None:
    check_place("mixture/curve.jsonl", CURVE, "log")
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(FileExistsError, match="is in the folder of a mixture"):
            check_place(f"mixture/{name}", CURVE, "log")
    with pytest.raises(FileExistsError, match="is in the folder of the checkpoint of a fit"):
        check_place("checkpoint/state-00001.safetensors", CODES, "path")
    with pytest.raises(FileExistsError, match="is in the folder of a store of activations"):
        check_place("store/anything", CURVE, "log")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((CURVE, "a"), (MIXTURE, "a")),
        ((CURVE, "a"), (MIXTURE, "a/b")),
        ((CURVE, "a/config.json"), (MIXTURE, "a")),
        ((CURVE, "a/b/../checkpoint.json"), (CHECKPOINT, "a")),
        ((MIXTURE, "a"), (CHECKPOINT, "./a")),
        ((FIGURE, "a"), (PAGE, "a")),
    ],
)
def test_outputs_do_not_collide(places: Path, first: Any, second: Any) -> None:
    for one, two in ((first, second), (second, first)):
        with pytest.raises(ValueError, match="two and one must be different places"):
            check_apart([("one", one[1], one[0]), ("two", two[1], two[0])])


def test_outputs_that_do_not(places: Path) -> None:
    check_apart([("out", "a", MIXTURE), ("log", "a/log.jsonl", CURVE), ("checkpoint", "a/run", CHECKPOINT)])


def test_what_is_read_is_not_written_to(places: Path) -> None:
    for path in ("store", "store/inner", "store/curve"):
        with pytest.raises(ValueError, match="out must not be (what|in a folder that) is read"):
            check_not_read(path, MIXTURE, "out", ["store"], [])
    (places / "texts").mkdir()
    with pytest.raises(ValueError, match=r"out must not be among the texts that are read \(texts\)"):
        check_not_read("texts/../texts", STORE, "out", [], ["texts"])
    with pytest.raises(ValueError, match="log must not be among the texts"):
        check_not_read("texts/a/log.jsonl", CURVE, "log", [], ["texts"])
    check_not_read("texts/store", STORE, "out", [], ["texts"])  # as in the working directory, of --text .
    check_not_read("texts/page.html", PAGE, "out", [], ["texts"])


def _writers() -> dict[str, Callable[[str], object]]:
    mfa = MFA(3, 6, 1)
    store: Any = None
    return {
        "log": lambda path: fit(X, 3, 1, log=path),
        "codes": lambda path: write_codes(mfa, [X], path),
        "report": lambda path: write_report(path, mfa, store, None),
        "map": lambda path: regions_map(mfa, [], path),
        "scatter": lambda path: region_scatter(mfa, store, 0, path, tokenizer=None),
        "paper": lambda path: mfa.to_reference_checkpoint(path),
    }


@pytest.mark.parametrize("writer", ["log", "codes", "report", "map", "scatter", "paper"])
def test_whoever_writes_a_file_asks(places: Path, writer: str) -> None:
    before = state(places)
    for path in ("store/manifest.json", "store/new", "mixture/config.json", "checkpoint/checkpoint.json", "notes"):
        with pytest.raises(FileExistsError, match=path):
            _writers()[writer](path)
    assert state(places) == before


def test_whoever_writes_a_folder_asks(places: Path) -> None:
    before = state(places)
    with pytest.raises(FileExistsError, match="checkpoint: store holds a store"):
        fit(X, 3, 1, checkpoint="store")
    with pytest.raises(ValueError, match="checkpoint and log must be different places"):
        fit(X, 3, 1, checkpoint="new", log="new/checkpoint.json")
    with pytest.raises(FileExistsError, match="folder: .*mixture holds a mixture"):
        ActivationStoreWriter("mixture", 6)
    Path("llama").mkdir()
    Path("llama/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="llama/config.json is there already, and is not of a mixture"):
        MFA(3, 6, 1).save_pretrained("llama")
    Path("llama/config.json").unlink()
    assert state(places) == before


def test_a_harvest_asks_before_it_reads(places: Path) -> None:
    from mfa_kernels.data.language_model import load_language_model

    model, tokenizer = load_language_model()
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("some words")
    with pytest.raises(FileExistsError, match="out: mixture holds a mixture"):
        harvest(model, tokenizer, Path("texts"), 0, "mixture", progress=False)
    for texts in (Path("texts"), [Path("texts")]):
        with pytest.raises(ValueError, match="out must not be among the texts"):
            harvest(model, tokenizer, texts, 0, "texts", progress=False)
    with pytest.raises(ValueError, match="layer must name each layer once, got 1 twice"):
        harvest(model, tokenizer, ["some words"], [1, 0, 1])


def test_a_checkpoint_is_cleared_and_nothing_beside_it(places: Path) -> None:
    (places / "checkpoint" / "mine").write_text("mine")
    clear("checkpoint")
    assert {path.name for path in (places / "checkpoint").iterdir()} <= {"mine", ".lock"}
    clear("nothing")
    assert not Path("nothing").exists()
    assert len(ActivationStore("store")) == 60

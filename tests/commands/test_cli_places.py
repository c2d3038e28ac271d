"""Outputs of commands take no place of anything else, and wrong places are found before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mfa_kernels import MFA, fit
from mfa_kernels.commands.cli import main
from mfa_kernels.common import locks
from mfa_kernels.data import ActivationStoreWriter
from mfa_kernels.fitting import stages
from mfa_kernels.fitting.checkpoint import Checkpoints
from tests.helpers.outputs import interrupted, state, work_has_begun

X = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a mixture of its activations, and texts."""
    folder = tmp_path_factory.mktemp("places")
    with ActivationStoreWriter(folder / "store", 6) as writer:
        writer.add_document(list(range(300)), list(range(300)), X)
    fit(X, 3, 1, epochs=1, progress=False).save_pretrained(folder / "mixture")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("some words")
    (folder / "notes.txt").write_text("mine")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails where a language model is loaded, or K-means begins."""
    for work in ("data.language_model.from_pretrained", "data.tiny_lm.load", "fitting.stages.kmeans"):
        monkeypatch.setattr(f"mfa_kernels.{work}", work_has_begun)


def run(line: str) -> int:
    try:
        return main(line.split())
    except SystemExit as end:  # of argparse
        return int(end.code or 0)


FIT = "fit store -K 3 -R 1 --epochs 1 --overwrite"
HARVEST = "harvest --layer 1 --text texts"
DEMO = "demo --small --tokens 500 -K 4 -R 1"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"{FIT} --out new --log store/manifest.json", "--log must not be in a folder that is read"),
        (f"{FIT} --out new --log store/log.jsonl", "--log must not be in a folder that is read"),
        (f"{FIT} --out new --log new/config.json", "must be different places, got new"),
        (f"{FIT} --out new --log mixture/model.safetensors", "is in the folder of a mixture"),
        (f"{FIT} --out new --log notes.txt", "notes.txt is there already, and is not the curve of a fit"),
        (f"{FIT} --out new --log empty", "--log must name a file, empty is a folder"),
        (f"{FIT} --out store", "--out must not be what is read, got store"),
        ("fit store --start mixture --out mixture --overwrite", "--out must not be what is read, got mixture"),
        (f"{FIT} --out new --checkpoint store", "--checkpoint must not be what is read"),
        (f"{FIT} --out new --checkpoint mixture", "--checkpoint: mixture holds a mixture"),
        (f"{FIT} --out new --checkpoint new", "must be different places"),
        ("fit --text texts --layer 1 -K 3 --out texts", "--out must not be among the texts that are read (texts)"),
        ("fit --text texts --layer 1 -K 3 --out new --log texts/log.jsonl", "--log must not be among the texts"),
        (f"{HARVEST} --out texts", "--out must not be among the texts that are read (texts)"),
        (f"{HARVEST} --out mixture --overwrite", "--out: mixture holds a mixture"),
        (f"{DEMO} --text texts --out texts", "--out must not be among the texts"),
        ("encode mixture store --out notes.txt --overwrite", "notes.txt is there already, and is not a file of codes"),
        ("encode mixture store --out mixture/codes --overwrite", "--out must not be in a folder that is read"),
        ("convert mixture mixture/config.json --overwrite", "output must not be in a folder that is read"),
        ("convert mixture notes.txt --overwrite", "notes.txt is there already, and is not a torch checkpoint"),
    ],
)
def test_nothing_takes_the_place_of_something_else(places, no_work, capsys, line, told) -> None:
    before = state(places)
    assert run(line) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert told in said
    assert state(places) == before
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"{HARVEST} --out new --max-tokens 0", "--max-tokens: must be an integer >= 1, got 0"),
        (f"{HARVEST} --out new --device abacus", "--device abacus: "),
        (f"{HARVEST} --out store", "store/manifest.json is there already: --resume goes on with it, --overwrite"),
        (f"{HARVEST} --out new --text missing", "'missing': no such file or folder"),
        (f"{HARVEST} --out new --text empty", "empty: this folder holds no .txt"),
        (f"{HARVEST} --out store --resume --overwrite", "give one of them"),
        ("steer mixture x --layer 1 --alpha nan", "--alpha: must be finite, got nan"),
        ("steer mixture x --layer 1 -k 3", "-k/--component must be in [0, 3), got 3"),
        ("steer mixture x --layer 1 --latents 1 2", "--latents must be 1 numbers, the rank of the mixture, got 2"),
        ("steer mixture x --layer 1 --temperature -1", "--temperature: must be >= 0, got -1"),
        ("steer mixture x --layer 1 --temperature nan", "--temperature: must be finite, got nan"),
        ("steer mixture x --layer 1 --seed -1", "--seed: must be an integer >= 0, got -1"),
        (f"steer mixture x --layer 1 --seed {10**20}", "--seed: must be an integer <= "),
        ("steer mixture x --layer 1 --max-new-tokens 0", "--max-new-tokens: must be an integer >= 1, got 0"),
        (f"{DEMO} --out new --epochs -1", "--epochs: must be an integer >= 0, got -1"),
        (f"{DEMO} --out new -K 0", "-K/--components: must be an integer >= 1, got 0"),
        (
            f"{DEMO} --out new -K 476",
            "-K/--components must be at most the activations to train on, 95% of 500, got 476",
        ),
        (f"{DEMO} --out new --alpha nan", "--alpha: must be finite"),
        (f"{DEMO} --out new --tokens 0", "--tokens: must be an integer >= 1"),
        (f"{DEMO} --out new -k 4", "-k/--component must be in [0, 4), got 4"),
        (f"{DEMO} --out new --text missing", "'missing': no such file or folder"),
        ("fit --text missing --layer 1 -K 3 --out new", "'missing': no such file or folder"),
        ("fit --text texts --layer 1 1 -K 3 --out new", "--layer must name each layer once, got 1 twice"),
        ("fit store -K 4 4 --out new", "-K/--components: expected different integers, got 4 twice"),
        ("fit --text texts --layer 1 -K 4 --out new --lr 0", "--lr: must not be 0"),
        ("fit --text texts --layer 1 -K 4 --out new --held-out 1", "--held-out: must not be 1"),
        (
            "fit --text texts --layer 1 -K 4 --out new --method em",
            "--method em, truncated or sgd, and --polish, go with a store",
        ),
        ("steer mixture x --layer 1 -k 1 --gate 1", "--gate: must not be 1"),
        ("fit store -K 4 --out new --resume", "--resume needs --checkpoint"),
        ("convert mixture new.pt --eps-floor 0.1", "--eps-floor goes with a checkpoint of the paper's code"),
        ("convert notes.txt new --format 2", "--format goes with a mixture's folder, notes.txt is a file"),
    ],
)
def test_what_is_wrong_is_found_before_the_work(places, no_work, capsys, line, told) -> None:
    before = state(places)
    assert run(line) in (1, 2)
    out, error = capsys.readouterr()
    assert out == ""
    assert told in error.splitlines()[-1]
    assert state(places) == before, "so that nothing is in the way of the next try"
    assert not Path("new").exists()


def test_a_checkpoint_that_is_there(places, capsys) -> None:
    """What to do is said at once, and is right: --resume goes on with it, --overwrite begins anew."""
    command = f"{FIT.removesuffix(' --overwrite')} --out new --checkpoint run --method em"
    assert run(command) == 0
    before = state(places)
    assert run(command) == 1
    told = "run/checkpoint.json is there already: --resume goes on with it, --overwrite begins anew, or name another"
    assert told in capsys.readouterr().err
    assert run(f"{command} --seed 1 --overwrite --resume") == 1, "of other settings"
    assert "here --seed = 1, there 0" in capsys.readouterr().err
    with locks.alone("run"):
        assert run(f"{command} --seed 1 --overwrite") == 1, "somebody else's now"
    assert state(places) == before
    assert run(f"{command} --seed 1 --overwrite") == 0
    assert json.loads(Path("run/checkpoint.json").read_text())["settings"]["seed"] == 1
    assert run(f"{command} --seed 1 --overwrite --resume") == 0
    assert MFA.from_pretrained("new").n_components == 3


def test_resume_is_offered_where_there_is_something_to_go_on_with(places, capsys, monkeypatch) -> None:
    save = Checkpoints.save

    def saved(self, state) -> None:
        save(self, state)
        raise KeyboardInterrupt

    command = f"{FIT} --out new --method em --checkpoint-seconds 0 --checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(stages, "kmeans", interrupted)
        assert run(f"{command} one") == 130
    assert capsys.readouterr().err == "mfa-kernels fit: interrupted\n"
    monkeypatch.setattr(Checkpoints, "save", saved)
    run(f"{command} two")
    monkeypatch.setattr(Checkpoints, "save", save)
    capsys.readouterr()
    monkeypatch.setattr("mfa_kernels.fitting.preparation.restored_mixture", interrupted)
    assert run(f"{command} two --resume") == 130
    assert capsys.readouterr().err == "mfa-kernels fit: interrupted; --resume goes on with what was written\n"


@pytest.mark.parametrize("rows", [0, 2])
def test_resume_is_offered_of_a_store_with_rows(places, capsys, monkeypatch, rows) -> None:
    writer = ActivationStoreWriter("cut", 6, rows_per_shard=1)
    if rows:
        writer.add_document([1, 2], [0, 1], X[:2])
    writer._lock.release()
    monkeypatch.setattr("mfa_kernels.data.language_model.load_language_model", interrupted)
    assert run(f"{HARVEST} --out cut --resume") == 130
    hint = "; --resume goes on with what was written" if rows else ""
    assert capsys.readouterr().err == f"mfa-kernels harvest: interrupted{hint}\n"

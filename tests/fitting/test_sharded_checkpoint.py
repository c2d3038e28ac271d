"""A fit of spread components goes on to the same bits; that any number of ranks can, is tested in tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mfa_kernels.fitting import em, fit, fit_sharded, sharded
from mfa_kernels.fitting.checkpoint import FILE
from mfa_kernels.fitting.sharded_checkpoint import ShardedCheckpoints
from mfa_kernels.sharded import ShardedMFA
from tests.fitting.planted import draw, planted
from tests.fitting.test_checkpoint import CutOff, cut_off_after, result

ROWS = draw(planted(), 3000)
ROWS[::97, 0] = torch.nan
METHODS: dict[str, dict[str, Any]] = {
    "em": {"method": "em"},
    "em, per component, nothing held out": {"method": "em", "noise": "per_component", "held_out": 0.0},
    "online": {"method": "online", "batch_size": 300, "eval_every": 4},
    "online, rank 0": {"method": "online", "batch_size": 700, "rank": 0, "noise": "per_component"},
}


def run(x: Any = ROWS, **options: Any) -> ShardedMFA:
    chosen = {"n_components": 6, "rank": 2, "epochs": 3, "checkpoint_seconds": 0, "progress": False, **options}
    return fit_sharded(x, **chosen)


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_cut_off_at_every_checkpoint(options, monkeypatch, tmp_path):
    monkeypatch.setattr(em, "_LEAST_BATCH", 700)
    monkeypatch.setattr(em, "_BATCH_ELEMENTS", 1)
    expected = result(run(**options))
    cuts = 0
    while True:
        with monkeypatch.context() as patch:
            cut_off_after(1 if cuts else 0, patch, ShardedCheckpoints)
            try:
                mfa = run(checkpoint=tmp_path, resume=True, **options)
            except CutOff:
                cuts += 1
                continue
        break
    assert result(mfa) == expected
    assert cuts > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, f"state-{cuts - 1:05d}-0-of-1.safetensors"]


def test_a_finished_fit_returns_its_result(tmp_path, monkeypatch):
    expected = result(run(checkpoint=tmp_path))
    monkeypatch.setattr(sharded, "kmeans", None)
    monkeypatch.setattr(sharded, "_ShardedBatchEM", None)
    assert result(run(resume=tmp_path)) == expected


def test_it_is_no_checkpoint_of_a_fit_in_one_piece(tmp_path):
    options: dict[str, Any] = {"n_components": 6, "rank": 2, "method": "em", "epochs": 0, "progress": False}
    fit(ROWS, **options, checkpoint=tmp_path / "one")
    run(**options, checkpoint=tmp_path / "several")
    with pytest.raises(ValueError, match="is not the checkpoint of a fit .its format is not 'mfa_kernels.fit_sharded'"):
        run(**options, resume=tmp_path / "one")
    with pytest.raises(ValueError, match="is not the checkpoint of a fit .its format is not 'mfa_kernels.fit'"):
        fit(ROWS, **options, resume=tmp_path / "several")


def test_what_does_not_belong_together_is_named(tmp_path):
    run(checkpoint=tmp_path, epochs=0)
    with pytest.raises(ValueError, match="other settings: here seed = 1, there 0"):
        run(resume=tmp_path, epochs=0, seed=1)
    with pytest.raises(FileExistsError, match="resume=True goes on with it"):
        run(checkpoint=tmp_path, epochs=0)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (Path.unlink, FileNotFoundError, "state-00001-0-of-1.safetensors is missing"),
        (lambda path: path.write_bytes(b"abc"), ValueError, "state-00001-0-of-1.safetensors has 3 bytes, expected"),
        (lambda path: path.write_bytes(b"x" * path.stat().st_size), ValueError, "is not a safetensors file"),
    ],
    ids=["missing", "cut", "other"],
)
def test_damage_is_reported_by_name(spoil, error, message, tmp_path):
    run(checkpoint=tmp_path, epochs=0)
    spoil(tmp_path / json.loads((tmp_path / FILE).read_text())["ranks"][0]["tensors"])
    with pytest.raises(error, match=message):
        run(resume=tmp_path, epochs=0)

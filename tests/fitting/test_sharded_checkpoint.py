"""A fit of spread components goes on to the same bits; that any number of processes can, is tested in
tests/distributed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.fitting import em_base, fit, sharded_stages, stages
from mfa_kernels.fitting.checkpoint import FILE, State
from mfa_kernels.fitting.sharded_checkpoint import ShardedCheckpoints
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.sharded import ShardedMFA
from tests.fitting.planted import SIX, raising
from tests.fitting.test_checkpoint import ROWS, in_lives, result

METHODS: dict[str, dict[str, Any]] = {
    "em": {"method": "em"},
    "em, per component, nothing held out": {"method": "em", "noise": "per_component", "held_out": 0.0},
    "online": {"method": "online", "batch_size": 300, "eval_every": 4},
    "online, rank 0": {"method": "online", "batch_size": 700, "rank": 0, "noise": "per_component"},
}


def run(x: Any = ROWS, **options: Any) -> ShardedMFA:
    mfa: Any = fit(x, split="components", **{**SIX, "epochs": 3, "checkpoint_seconds": 0, **options})
    return mfa


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_cut_off_at_every_checkpoint(options, monkeypatch, tmp_path):
    monkeypatch.setattr(em_base, "_LEAST_BATCH", 700)
    monkeypatch.setattr(em_base, "_BATCH_ELEMENTS", 1)
    expected = result(run(**options))
    mfa, cuts = in_lives(lambda: run(checkpoint=tmp_path, resume=True, **options), monkeypatch, kind=ShardedCheckpoints)
    assert result(mfa) == expected
    assert cuts > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        FILE,
        f"state-{cuts - 1:05d}-0-of-1.safetensors",
    ]


class OneOfTwo(Processes):
    """As a process that reads what another number has written; what process 0 sees, it sees too."""

    def __init__(self, index: int) -> None:
        super().__init__(False)
        self.index, self.count = index, 2

    def agree(self, work: Any) -> Any:
        return work()

    def objects(self, value: Any) -> list[Any]:
        return [value] * self.count


@pytest.mark.parametrize("noise", ["shared", "per_component"])
def test_what_becomes_of_each_tensor(noise, tmp_path):
    components, features = 5, 3

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(shape, dtype=torch.float64)

    of_components = {
        "mfa.means": numbers(components, features), "best.0": numbers(components, features),
        "plain.1": numbers(components, features, 2), "best.3": numbers(components), "about": numbers(components, 3),
        "statistics.cross": numbers(components, 2, features), "counted": numbers(components),
    }  # fmt: skip
    common = {
        "covariance": numbers(features, features), "order": numbers(9), "overlap.pairs": numbers(4),
        "losses": numbers(0), "mfa.center": numbers(features), "statistics.log_likelihood": numbers(),
    }  # fmt: skip
    of_noise = {
        name: numbers(*(() if noise == "shared" else (components,)), features) for name in ("mfa.log_noise", "best.2")
    }
    (common if noise == "shared" else of_components).update(of_noise)
    squares = {"statistics.squares": numbers(*(() if noise == "shared" else (components,)), features)}
    basis = {"screening.basis": numbers(features, 2)}
    values = {"step": 3, "screening": {"cost": 0.5}}

    def checkpoints(processes: Processes) -> ShardedCheckpoints:
        return ShardedCheckpoints(tmp_path, 60, {}, components, noise, processes)

    state = State("em", {**of_components, **common, **squares, **basis}, values, FitReport())
    checkpoints(ALONE).save(state)
    assert repr(sorted(checkpoints(ALONE).load(tmp_path).tensors.items())) == repr(sorted(state.tensors.items()))
    assert checkpoints(ALONE).load(tmp_path).values == values
    halves = [checkpoints(OneOfTwo(rank)).load(tmp_path) for rank in (0, 1)]
    for half in halves:
        assert half.values == {"step": 3, "screening": None}, "of another number of processes"
        assert half.tensors.keys() == state.tensors.keys() - basis.keys()
        assert all(torch.equal(half.tensors[name], tensor) for name, tensor in common.items())
    for name, tensor in of_components.items():
        assert [len(half.tensors[name]) for half in halves] == [2, 3]
        assert torch.equal(torch.cat([half.tensors[name] for half in halves]), tensor)
    first, second = (half.tensors["statistics.squares"] for half in halves)
    if noise == "shared":
        assert torch.equal(first, squares["statistics.squares"])
        assert not second.any(), "they are counted once"
    else:
        assert torch.equal(torch.cat([first, second]), squares["statistics.squares"])


def test_a_finished_fit_returns_its_result(tmp_path, monkeypatch):
    expected = result(run(checkpoint=tmp_path))
    monkeypatch.setattr(stages, "kmeans", None)
    monkeypatch.setattr(sharded_stages, "ShardedBatchEM", None)
    assert result(run(resume=tmp_path)) == expected


def test_it_is_no_checkpoint_of_a_fit_in_one_piece(tmp_path):
    options: dict[str, Any] = {**SIX, "method": "em", "epochs": 0}
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


@pytest.mark.parametrize("method", ["em", "online"])
def test_after_ctrl_c_a_fit_goes_on(method, tmp_path):
    """What it has is given back, and is no end."""
    options = {"method": method, "eval_every": 1}
    with pytest.warns(UserWarning, match="fit: interrupted"):
        mfa = run(**options, checkpoint=tmp_path, callbacks=[raising(KeyboardInterrupt())])
    assert mfa.fit_report.interrupted
    assert json.loads((tmp_path / FILE).read_text())["stage"] == method
    assert result(run(**options, checkpoint=tmp_path, resume=True)) == result(run(**options))

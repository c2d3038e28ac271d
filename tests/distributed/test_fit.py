"""Two and four processes fit what one fits; the numbers of a resumed fit do not depend on how many wrote it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mfa_kernels.commands.cli import main
from mfa_kernels.data import ActivationStoreWriter
from mfa_kernels.fitting import em_base
from tests.distributed.worker import FITS, RESUMED, SIZES, module, outcome, run, several_batches, small, streamed
from tests.fitting.planted import draw, planted
from tests.helpers.processes import run_python

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LEAST_BATCH", "_BATCH_ELEMENTS"):  # set by the call, and set back
        monkeypatch.setattr(em_base, name, getattr(em_base, name))
    several_batches()


@pytest.fixture(scope="session")
def of_one() -> dict[str, Any]:
    return {}


def load(found: Path, size: int, rank: int) -> dict[str, Any]:
    return torch.load(found / f"{size}-{rank}.pt", weights_only=False)


def assert_same_bits(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert repr(one) == repr(other)


def assert_close(one: Any, other: Any) -> None:
    """Equal but for the order of float64 sums."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_close(a, b)
    elif isinstance(one, Tensor):
        torch.testing.assert_close(one, other, **CLOSE)
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)
    else:
        assert one == other


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_holds_the_same_bits(found, size):
    first, *others = [load(found, size, rank) for rank in range(size)]
    for other in others:
        for part in ("fits", "stream", "callback", "ddp"):
            assert_same_bits(first[part], other[part])


@pytest.mark.parametrize("name", FITS)
def test_several_processes_fit_what_one_fits(found, of_one, name):
    expected = of_one[name] = outcome(run(**FITS[name]))
    assert expected["report"]["skipped_rows"] == 16
    for size in SIZES:
        assert_close(load(found, size, 0)["fits"][name], expected)
    if name == "sgd, out of patience":
        assert expected["report"]["stopped_early"]
    if name == "em":
        assert expected["report"]["history"][-1]["step"] > 2


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_by_another_number_of_processes(found, of_one, name):
    expected = of_one.get(name) or outcome(run(**FITS[name]))
    four, two = (load(found, size, 0)["fits"] for size in (4, 2))
    one = outcome(run(**FITS[name], resume=found / f"four, {name}"))
    for resumed in (
        four[f"{name}, resumed from four"],
        two[f"{name}, resumed from four"],
        two[f"{name}, resumed from one"],
        one,
    ):
        assert_close(resumed, expected)


@pytest.mark.parametrize("name", ["sgd", "online"])
def test_resumed_by_as_many_processes_bit_for_bit(found, name):
    four = load(found, 4, 0)["fits"]
    assert_same_bits(four[f"{name}, resumed from four"], four[name])


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_brings_its_own_stream(found, size):
    expected = outcome(streamed(0, 1, False))
    assert expected["report"]["skipped_rows"] == 16
    assert expected["report"]["history"][-1]["step"] == 12  # of 100 rows, after a start of 400; the last of one row
    several = load(found, size, 0)["stream"]
    assert_same_bits(load(found, size, 0)["stream, resumed"], several)
    assert several["report"].pop("live_rows") >= expected["report"].pop(
        "live_rows"
    )  # every process looked at all it had
    assert_close(several, expected)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_done_once(found, size):
    for rank in range(size):
        mine = load(found, size, rank)
        assert mine["log"] == (rank == 0)
        assert mine["alone"]
        assert_close(mine["callback"], mine["fits"]["sgd"])  # but Adam's copies are rounded when they are read again


@pytest.mark.parametrize("size", SIZES)
def test_errors_reach_every_rank(found, size):
    for rank in range(size):
        mine = load(found, size, rank)
        assert mine["other data"].startswith("ValueError: the processes that fit together have different data")
        assert "process 1 has data = " in mine["other data"]
        assert "of a fit with other settings: here data = " in mine["other stream"]
        assert "process 1 has seed = 1, process 0 0" in mine["other settings"]
        assert ("RuntimeError: process 0 failed with ValueError: " if rank else "ValueError: ") in mine["no start"]
        assert "do not vary" in mine["no start"]


@pytest.mark.parametrize("size", SIZES)
def test_sums(found, size):
    expected = torch.cat([torch.full((rank, 2), float(rank)) for rank in range(size)])
    for rank in range(size):
        sums = load(found, size, rank)["sums"]
        assert sums["exact"]
        assert torch.equal(sums["concatenated"], expected)
        assert torch.equal(sums["gathered"], torch.full((rank, 2), float(rank)) if rank else expected)
        assert sums["totals"] == [size, size * (size - 1) / 2]
        assert math.isnan(sums["nan"][0])


@pytest.mark.parametrize("size", SIZES)
def test_distributed_data_parallel(found, size):
    m, x = small()
    mfa = module(m)
    loss = mfa(x)
    loss.backward()
    expected = {"loss": loss.detach(), **{name: p.grad for name, p in mfa.named_parameters()}}
    for rank in range(size):
        assert_close(load(found, size, rank)["ddp"], expected)


def test_command_line_under_torchrun(tmp_path):
    """Two processes of `mfa-kernels fit` write one mixture, that of one process; and stop where one would."""
    x = draw(planted(), 900)
    with ActivationStoreWriter(tmp_path / "store", x.shape[1]) as writer:
        writer.add_document(torch.arange(len(x)), torch.arange(len(x)), x, source="a")
    options = ["-K", "6", "-R", "2", "--method", "em", "--epochs", "2"]
    command = ["fit", str(tmp_path / "store"), *options, "--checkpoint", str(tmp_path / "checkpoint"), "--out"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mfa_kernels"]
    done = run_python(*launcher, *command, str(tmp_path / "two"), seconds=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    assert main([*command, str(tmp_path / "refused")]) == 1, "the checkpoint is there"
    assert main(["fit", str(tmp_path / "store"), *options, "--out", str(tmp_path / "one")]) == 0
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4)

"""Tuning: what it picks, what it leaves out, what it writes; and a rehearsal of the real kernels."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from mfa_kernels.commands import tune
from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.configs import Pairs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
START = Pairs(pairs=16, features=64, warps=4, stages=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MFA_KERNELS_CONFIGS", str(tmp_path / "tuned"))
    configs.tuned_entries.cache_clear()
    yield tmp_path / "tuned"
    configs.tuned_entries.cache_clear()


def current() -> Pairs:
    return configs.configured(Pairs, torch.empty(0), 1, 1)


def search(monkeypatch, seconds, result=lambda config: 1.0) -> tuple[Pairs, list[str]]:
    """The configuration chosen when calls take seconds(config) and compute result(config), and what was reported."""
    lines: list[str] = []
    choices = {"pairs": (16, 32), "features": (64, 128, 256), "warps": (2, 4, 8), "stages": (1, 2, 3)}
    monkeypatch.setitem(tune.CHOICES, "pairs", choices)
    monkeypatch.setattr(tune, "median_seconds", lambda workload, device: seconds(current()))
    workload = lambda: [torch.tensor([result(current())])]  # noqa: E731
    return tune.search(START, workload, torch.device("cpu"), lines.append), lines


def test_the_fastest_of_each_field_in_turn(monkeypatch):
    chosen, lines = search(monkeypatch, lambda c: 1 / c.features + abs(c.warps - 8) / 100 + c.stages / 1000)
    assert chosen == Pairs(pairs=16, features=256, warps=8, stages=1)
    assert "default" in lines[0]
    assert any("with features=256" in line for line in lines)


def test_two_percent_is_noise(monkeypatch):
    assert search(monkeypatch, lambda c: 1.0 if c == START else 0.985)[0] == START
    assert search(monkeypatch, lambda c: 1.0 if c == START else 0.975)[0] != START


def test_wrong_and_refused_candidates_are_left_out(monkeypatch):
    def result(config: Pairs) -> float:
        if config.warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return {256: 1.001, 128: float("nan")}.get(config.features, 1.0)

    chosen, lines = search(monkeypatch, lambda c: 1.0 / (c.features * c.warps), result)
    assert chosen == START
    assert sum("out of resource: shared memory" in line for line in lines) == 1
    assert sum("wrong: output 0" in line for line in lines) == 2


def test_a_default_that_does_not_run_is_an_error(monkeypatch):
    def median(workload, device):
        raise AssertionError("measured all the same")

    monkeypatch.setattr(tune, "median_seconds", median)
    runs = iter([1.0, 2.0])
    with pytest.raises(RuntimeError, match="the default configuration .* does not run: wrong"):
        tune.search(START, lambda: [torch.tensor([next(runs)])], torch.device("cpu"), print)


def test_every_choice_is_a_field_and_the_defaults_are_among_them():
    assert {configs.name_of(kind) for kind, _ in configs._ANALYSED} == set(tune.KINDS) == set(tune.CHOICES)
    for name, kind in tune.KINDS.items():
        assert {field.name for field in dataclasses.fields(kind)} == set(tune.CHOICES[name])
        for architecture in (80, 90, 100):
            default = configs.default(kind, architecture, 16384, 8192)
            for field, values in tune.CHOICES[name].items():
                assert getattr(default, field) in values, (name, architecture, field)


@pytest.fixture
def small(monkeypatch):
    """The Triton kernels on this device, and one alternative per kernel."""
    pytest.importorskip("triton")
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(tune, "CHOICES", {kind: {"stages": (1, 2)} for kind in tune.KINDS})


def test_rehearsal_with_the_real_kernels(folder, small, monkeypatch):
    """Every kind of kernel is launched with the candidate, computes the same, and what is faster is written."""
    seen: list[str] = []
    name = "cpu" if DEVICE.type == "cpu" else torch.cuda.get_device_name()
    folder.mkdir()
    (folder / configs.file_name(name)).write_text(json.dumps({"pairs/8/8": dataclasses.asdict(START)}))

    def median(workload, device) -> float:
        workload()
        kind = next(kind for kind in configs._overrides)
        seen.append(kind.__name__)
        return float(configs._overrides[kind].stages)

    monkeypatch.setattr(tune, "median_seconds", median)
    lines: list[str] = []
    path = tune.tune(shapes=[(9, 12, 70, 1)], device=DEVICE, report=lines.append)
    assert path == folder / configs.file_name(name)
    assert not any("Error" in line or "wrong" in line for line in lines), lines
    assert set(seen) == {"Scan", "Pairs", "Gradient", "AllLogits", "Statistics", "Nearest"}
    written = json.loads(path.read_text())
    assert written.pop("pairs/8/8") == dataclasses.asdict(START)
    for key, fields in written.items():
        kind = tune.KINDS[key.split("/")[0]]
        assert key == configs.key(kind, 9, 12)
        assert kind(**fields) == dataclasses.replace(configs.default(kind, 80, 9, 12), stages=1) or DEVICE.type != "cpu"
    assert written


def test_what_another_process_measures_meanwhile_is_kept(folder, monkeypatch):
    monkeypatch.setattr(tune.backends, "serving", lambda *_: "triton")
    monkeypatch.setattr(tune, "workloads", lambda *_: dict.fromkeys(tune.KINDS))
    path = folder / configs.file_name("cpu")

    def search(start, workload, device, report):
        folder.mkdir(exist_ok=True)
        entries = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**entries, f"pairs/8/{8 << len(entries)}": dataclasses.asdict(START)}))
        return dataclasses.replace(start, stages=start.stages + 1)

    monkeypatch.setattr(tune, "search", search)
    tune.tune(["scan", "dense"], [(9, 12, 70, 1)], "cpu")
    assert sorted(key.split("/")[0] for key in json.loads(path.read_text())) == ["dense", "pairs", "pairs", "scan"]


def test_a_clock_that_moves(small):
    assert tune.median_seconds(lambda: torch.zeros(10, device=DEVICE), DEVICE) > 0


def test_command_line(folder, monkeypatch, capsys):
    import argparse

    calls: list[SimpleNamespace] = []

    def told(kinds, shapes, device, report):
        calls.append(SimpleNamespace(kinds=kinds, shapes=shapes, device=device))
        report("a line")
        return folder / "x.json"

    monkeypatch.setattr(tune, "tune", told)
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    tune.main(parser.parse_args([]))
    options = ["--kinds", "scan", "--shape", *"8421", "--shape", "16", *"421", "--device", "cuda:1"]
    tune.main(parser.parse_args(options))
    assert calls[0].shapes == tune.SHAPES
    assert list(calls[0].kinds) == list(tune.KINDS)
    assert calls[1].shapes == [(8, 4, 2, 1), (16, 4, 2, 1)]
    assert (list(calls[1].kinds), calls[1].device) == (["scan"], "cuda:1")
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {folder / 'x.json'}"


def test_clear_errors(folder, monkeypatch):
    with pytest.raises(ValueError, match="kind must be one of"):
        tune.tune(["scans"], device=DEVICE)
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "portable")
    with pytest.raises(ValueError, match="do not serve"):
        tune.tune(device=DEVICE)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="no CUDA device"):
            tune.tune()

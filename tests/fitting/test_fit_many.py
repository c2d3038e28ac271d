"""Fits from one pass over a stream: each the same as alone, whatever becomes of the others; nothing is stored."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import mfa_kernels
from mfa_kernels import MFA
from mfa_kernels.fitting import fit, fit_many, preparation, stages
from mfa_kernels.fitting.checkpoint import FILE
from tests.fitting.planted import Store, draw, planted, raising
from tests.fitting.test_checkpoint import in_lives, result

LAYERS = {4: draw(planted(), 4000), "model.layers.8": draw(planted(4, 7, 3), 4000)}
LAYERS[4][::97, 0] = torch.nan
FITS: dict[str, dict[str, Any]] = {
    "early": {"layer": 4, "n_components": 6, "rank": 2},
    "same": {"layer": 4, "n_components": 6, "rank": 2},
    "late": {"layer": "model.layers.8", "n_components": 4, "rank": 3, "noise": "per_component", "seed": 5},
    "longer head": {"layer": 4, "n_components": 16, "rank": 0, "batch_size": 500},
    "impatient": {"layer": "model.layers.8", "n_components": 3, "rank": 1, "eval_every": 1, "patience": 1},
    "precise": {"layer": 4, "n_components": 2, "dtype": torch.float64, "held_out": 0.0, "clusters": torch.randn(2, 12)},
}
OPTIONS: dict[str, Any] = {"batch_size": 200, "eval_every": 4, "progress": False}


@pytest.fixture(autouse=True)
def short_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 900)
    monkeypatch.setattr(preparation, "START_ROWS_PER_COMPONENT", 100)
    monkeypatch.setattr(stages, "OTHERS", 100)  # that are looked at before they are trained on


def batches() -> Iterator[dict[Any, Tensor]]:
    for parts in zip(*(rows.split(130) for rows in LAYERS.values())):
        yield dict(zip(LAYERS, parts))


def alone(name: str, **more: Any) -> MFA:
    own = {**OPTIONS, **FITS[name], **more}
    return fit(iter(LAYERS[own.pop("layer")].split(130)), **own)


def test_each_is_the_same_as_alone():
    mixtures = fit_many(batches(), FITS, **OPTIONS)
    assert list(mixtures) == list(FITS)
    for name, mfa in mixtures.items():
        assert result(mfa) == result(alone(name)), name
        assert mfa.fit_report.stopped_early == (name == "impatient")
    assert result(mixtures["early"]) == result(mixtures["same"])
    assert mixtures["early"].fit_report.skipped_rows == 42
    assert mfa_kernels.fit_many is fit_many


def test_batches_of_one_layer():
    sizes = {name: {"n_components": k} for name, k in (("small", 3), ("large", 9))}
    mixtures = fit_many(LAYERS[4].split(130), sizes, rank=2, **OPTIONS)
    for name, own in sizes.items():
        assert result(mixtures[name]) == result(fit(iter(LAYERS[4].split(130)), **own, rank=2, **OPTIONS))


def test_no_more_is_read_than_is_needed():
    read = []
    impatient = {name: {**FITS["impatient"], "seed": seed} for name, seed in (("a", 0), ("b", 1))}
    mixtures = fit_many((read.append(1) or batch for batch in batches()), impatient, **OPTIONS)
    seen = [mfa.fit_report.history[-1]["step"] for mfa in mixtures.values()]
    assert len(read) == 8 + -(-200 * max(seen) // 130) < 31


def live_bytes() -> int:
    gc.collect()  # what other tests have left, and compiled: fake tensors hold nothing
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not isinstance(thing, FakeTensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_what_is_held_does_not_grow_with_the_stream(monkeypatch):
    head, rows, features = 6000, 250, 40
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", head)
    monkeypatch.setattr(preparation, "START_ROWS_PER_COMPONENT", head // 10)
    fits = {
        "a": {"layer": 1, "n_components": 4},
        "b": {"layer": 2, "n_components": 4},
        "c": {"layer": 1, "n_components": 11},  # which starts later
    }
    held: dict[int, list[int]] = {}

    def read(length: int) -> Iterator[dict[int, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        held[length] = []
        for i in range(length):
            if i in (length // 2, length - 1):
                held[length].append((live_bytes() - before) // (4 * features))
            yield {layer: torch.randn(rows, features, generator=generator) for layer in (1, 2)}

    before = live_bytes()
    for length in (60, 180):
        fit_many(read(length), fits, rank=0, patience=None, **{**OPTIONS, "batch_size": 1000})
    assert max(held[180]) == pytest.approx(max(held[60]), rel=0.05)
    kept = 2 * head + 3 * 6000  # a guard takes 5120 rows, and views others
    assert max(held[180]) < kept, "in rows: of the three heads, what is held out, looked at in the end, or guards"


def test_cut_off_at_any_checkpoint_all_go_on(monkeypatch, tmp_path):
    fits = {name: FITS[name] for name in ("early", "late", "longer head", "impatient")}
    mixtures, cuts = in_lives(
        lambda: fit_many(batches(), fits, checkpoint=tmp_path, checkpoint_seconds=0, resume=True, **OPTIONS),
        monkeypatch,
        saves=5,
    )
    assert cuts > 6
    assert {path.name for path in tmp_path.iterdir()} == set(fits)
    for name, mfa in mixtures.items():
        assert result(mfa) == result(alone(name)), name
        assert result(alone(name, resume=tmp_path / name)) == result(mfa), "it is the checkpoint of a fit"
    with pytest.raises(FileExistsError, match="holds the checkpoint.json of a fit"):
        fit_many(batches(), fits, checkpoint=tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match=r"early: resume: .* other settings: here seed = 7, there 0"):
        fit_many(batches(), {"early": {**FITS["early"], "seed": 7}}, checkpoint=tmp_path, resume=True, **OPTIONS)


def test_logs_and_checkpoints_bear_the_names(tmp_path):
    own = {"log": tmp_path / "mine.jsonl", "checkpoint": tmp_path / "mine"}
    fits = {"a": {"n_components": 3}, "b": {"n_components": 3, **own}}
    found = fit_many(
        LAYERS[4].split(500), fits, rank=1, log=tmp_path / "logs", checkpoint=tmp_path / "checkpoints", **OPTIONS
    )
    for path in (tmp_path / "logs" / "a.jsonl", tmp_path / "mine.jsonl"):
        assert [json.loads(line) for line in path.read_text().splitlines()] == found[
            "a" if "a" in path.name else "b"
        ].fit_report.history
    for folder in (tmp_path / "checkpoints" / "a", tmp_path / "mine"):
        assert (folder / FILE).is_file()


def test_callbacks_are_called_with_the_mixture_of_each():
    seen: list[tuple[str, int]] = []
    fits = {
        name: {**FITS[name], "callbacks": [lambda _, record, name=name: seen.append((name, record["step"]))]}
        for name in ("early", "late")
    }
    mixtures = fit_many(batches(), fits, **OPTIONS)
    for name, mfa in mixtures.items():
        assert [step for who, step in seen if who == name] == [r["step"] for r in mfa.fit_report.history]
    assert [who for who, _ in seen[:4]] == ["early", "late"] * 2, "in lock step"


def test_an_error_of_one_ends_all_and_names_it():
    reading, fail = batches(), raising(RuntimeError("no more"))
    with pytest.raises(RuntimeError, match="late: no more"):
        fit_many(reading, {"early": FITS["early"], "late": {**FITS["late"], "callbacks": [fail]}}, **OPTIONS)
    assert next(reading, None) is not None


def test_interrupted_while_reading_all_return_the_best_so_far():
    def read() -> Iterator[Any]:
        for i, batch in enumerate(batches()):
            if i == 20:
                raise KeyboardInterrupt
            yield batch

    fits = {name: FITS[name] for name in ("early", "late")}
    with pytest.warns(UserWarning, match="interrupted; the mixture is the best so far") as told:
        mixtures = fit_many(read(), fits, **OPTIONS)
    assert len(told) == 2
    assert {warning.filename for warning in told} == {__file__}
    for mfa in mixtures.values():
        assert mfa.fit_report.interrupted
        assert mfa.fit_report.history[-1]["step"] == 4
    reading = batches()
    with pytest.raises(KeyboardInterrupt):
        fit_many((batch for i, batch in enumerate(read()) if i % 4 == 0), fits, **OPTIONS)
    assert next(reading) is not None


def test_interrupted_in_one_fit_all_return():
    stop = raising(KeyboardInterrupt(), lambda record: record["step"] == 8)
    with pytest.warns(UserWarning, match="interrupted"):
        mixtures = fit_many(batches(), {"a": FITS["early"], "b": {**FITS["late"], "callbacks": [stop]}}, **OPTIONS)
    assert all(mfa.fit_report.interrupted for mfa in mixtures.values())
    assert [mfa.fit_report.history[-1]["step"] for mfa in mixtures.values()] == [8, 8]


def good() -> dict[str, Any]:
    return {"layer": 4, "n_components": 2}


@pytest.mark.parametrize(
    ("x", "fits", "options", "error", "message"),
    [
        (LAYERS[4], {"a": {}}, {}, TypeError, "batches must be an iterable of batches, got Tensor: call fit"),
        (LAYERS[4].numpy(), {"a": {}}, {}, TypeError, "got ndarray"),
        (Store(LAYERS[4]), {"a": {}}, {}, TypeError, "got Store"),
        (None, {}, {}, ValueError, "fits must name at least one fit, got none"),
        (None, {"a/b": good()}, {}, ValueError, "a name must be a string that can be the name of a folder, got 'a/b'"),
        (None, {"a": good(), "": good()}, {}, ValueError, "a name must be"),
        (None, {"..": good()}, {}, ValueError, "a name must be"),
        (None, {"a": good(), "b": {"layer": 4}}, {}, TypeError, "b: n_components must be an integer"),
        (None, {"a": {**good(), "k": 3}}, {}, TypeError, "a: .*unexpected keyword argument 'k'"),
        (None, {"a": {**good(), "rank": -1}}, {}, ValueError, "a: rank must be an integer >= 0, got -1"),
        (None, {"a": {**good(), "polish": 1}}, {}, ValueError, "a: polish must be 0 for an iterator, got 1"),
        (None, {"a": good()}, {"method": "em"}, ValueError, "a: method must be 'online' or 'auto' .*, got 'em'"),
        (None, {"a": good()}, {"resume": "folder"}, TypeError, "a: resume must be True or False"),
        (None, {"a": good()}, {"resume": True}, ValueError, "a: resume = True needs a checkpoint"),
        (None, {"a": good(), "b": good()}, {"clusters": torch.zeros(3, 12)}, ValueError, "a: clusters must"),
        (None, {"a": {**good(), "log": "x"}, "b": {**good(), "log": "x"}}, {}, ValueError, "b: .*x is written .* by a"),
        (
            None,
            {"a": {"n_components": 2}},
            {},
            ValueError,
            "a: layer must be one of 4, 'model.layers.8'.* got None",
        ),
        (
            None,
            {"a": {**good(), "layer": 8}},
            {},
            ValueError,
            "a: layer must be one of 4, 'model.layers.8'.* got 8",
        ),
        (LAYERS[4].split(130), {"a": good()}, {}, ValueError, "a: layer must be left out, .* got 4"),
        (iter([]), {"a": good()}, {}, ValueError, "a: activations is an iterable without batches"),
    ],
)
def test_bad_input_is_named(x, fits, options, error, message):
    with pytest.raises(error, match=message):
        fit_many(batches() if x is None else x, fits, **{**OPTIONS, **options})


def test_arguments_are_checked_before_anything_is_read():
    reading = batches()
    with pytest.raises(ValueError, match="b: batch_size must be"):
        fit_many(reading, {"a": good(), "b": {**good(), "batch_size": 0}}, progress=False)
    assert len(list(reading)) == 31


def test_progress_bears_the_names(capsys, monkeypatch):
    monkeypatch.setattr("mfa_kernels.common.progress.is_watched", lambda: True)
    fit_many(batches(), {name: FITS[name] for name in ("early", "late")}, batch_size=200)
    shown = capsys.readouterr().err
    assert "early, online EM" in shown
    assert "late, online EM" in shown


def test_several_processes_are_refused(tmp_path: Path):
    import torch.distributed as dist

    class Two:
        count = 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("mfa_kernels.fitting.fit_many"), "Processes", lambda group: Two())
        with pytest.raises(ValueError, match="a: group must be False"):
            fit_many(batches(), {"a": good()})
    assert not dist.is_initialized()

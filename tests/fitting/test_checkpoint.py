"""A fit that is cut off anywhere goes on to the same bits; what does not belong together is refused by name."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.common import files, locks
from mfa_kernels.fitting import adam, checkpoint, em, em_base, fit, preparation, stages
from mfa_kernels.fitting.checkpoint import FILE, Checkpoints, fingerprint
from mfa_kernels.mixture.base import Mixture
from tests.fitting.planted import SIX, CutOff, Store, draw, planted, raising
from tests.helpers.outputs import work_has_begun

ROWS = draw(planted(), 3000)
ROWS[::97, 0] = torch.nan
METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"method": "sgd", "batch_size": 300},
    "sgd, random, no held-out rows": {"method": "sgd", "batch_size": 900, "init": "random", "held_out": 0.0},
    "sgd, out of patience": {
        "method": "sgd",
        "batch_size": 900,
        "lr": 0.5,
        "eval_every": 1,
        "patience": 4,
        "epochs": 9,
    },
    "em": {"method": "em", "noise": "per_component", "n_components": 9},
    "em, settles": {"method": "em", "epochs": 9},
    "em, polish": {"method": "em", "polish": 2, "epochs": 2, "eval_every": 2},
    "truncated": {"method": "truncated", "n_components": 9, "epochs": 4},
    "truncated, many": {"method": "truncated", "n_components": 60, "epochs": 4},
    "online": {"method": "online", "batch_size": 300, "eval_every": 4},
    "online, per component": {"method": "online", "batch_size": 300, "noise": "per_component"},
    "online, rank 0": {"method": "online", "batch_size": 700, "rank": 0, "dtype": torch.float64},
}


def run(x: Any = ROWS, **options: Any) -> MFA:
    return fit(x, **{**SIX, "method": "sgd", "epochs": 3, "checkpoint_seconds": 0, **options})


def result(mfa: Mixture) -> tuple[list[bytes], dict[str, Any]]:
    """All bits of a mixture, and of its report all but the times."""
    report = asdict(mfa.fit_report)
    report["seconds"] = sorted(report["seconds"])
    del report["run"]["began"]
    for record in report["history"]:
        del record["seconds"], record["tokens_per_second"], record["memory"]
    return [t.numpy().tobytes() for t in mfa.state_dict().values()] + [repr(mfa.noise_floor).encode()], report


@pytest.fixture
def eventful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of EM in several batches, to be cut off in their middle too, that settle soon; gradients are clipped."""
    monkeypatch.setattr(adam, "_CLIP", 0.7)
    monkeypatch.setattr(em, "_TOLERANCE", 1e-3)
    monkeypatch.setattr(em_base, "_LEAST_BATCH", 700)
    monkeypatch.setattr(em_base, "_BATCH_ELEMENTS", 1)


def cut_off_after(saves: int, monkeypatch: pytest.MonkeyPatch, kind: type[Checkpoints] = Checkpoints) -> None:
    """The process 'dies' right after so many checkpoints."""
    whole, left = kind.save, [saves]

    def save(self: Checkpoints, state: Any) -> None:
        if not left[0]:
            raise CutOff
        left[0] -= 1
        whole(self, state)

    monkeypatch.setattr(kind, "save", save)


def in_lives(
    work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, kind: type[Checkpoints] = Checkpoints, saves: int = 1
) -> tuple[Any, int]:
    """What `work`, which goes on each time, comes to, and how often it 'died': at once, then after so many saves."""
    cuts = 0
    while True:
        with monkeypatch.context() as patch:
            cut_off_after(saves if cuts else 0, patch, kind)
            try:
                return work(), cuts
            except CutOff:
                cuts += 1


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("wrap", [torch.Tensor.clone, Store], ids=["tensor", "store"])
def test_cut_off_at_every_checkpoint(options, wrap, eventful, monkeypatch, tmp_path):
    expected = result(run(wrap(ROWS), **options))
    steps = expected[1]["history"][-1]["step"]
    if options == METHODS["sgd, out of patience"]:
        assert expected[1]["stopped_early"]
    if options == METHODS["em, settles"]:
        assert 2 < steps < 9
    mfa, cuts = in_lives(lambda: run(wrap(ROWS), checkpoint=tmp_path, resume=True, **options), monkeypatch)
    assert result(mfa) == expected
    # Each life came one checkpoint further; the first one, K-means included, was lost.
    assert cuts > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", FILE, f"state-{cuts - 1:05d}.safetensors"]


@pytest.mark.parametrize("method", ["sgd", "em", "online"])
def test_checkpoints_change_nothing(method, tmp_path):
    assert result(run(method=method)) == result(run(method=method, checkpoint=tmp_path))
    seldom = run(method=method, checkpoint=tmp_path / "seldom", checkpoint_seconds=1e9)
    assert result(seldom) == result(run(method=method))
    written = json.loads((tmp_path / "seldom" / FILE).read_text())["tensors"]
    assert written == "state-00001.safetensors", "the start and the end"


def test_a_finished_fit_returns_its_result(tmp_path, monkeypatch):
    expected = result(run(checkpoint=tmp_path))
    monkeypatch.setattr(stages, "kmeans", None)
    monkeypatch.setattr(stages, "Training", None)
    assert result(run(resume=tmp_path)) == expected
    assert result(run(checkpoint=tmp_path, resume=True)) == expected


def test_an_iterator_is_given_again_from_its_beginning(monkeypatch, tmp_path):
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 1000)

    def batches() -> Any:
        return iter(ROWS.split(130))

    options = {"method": "online", "batch_size": 200, "eval_every": 2}
    expected = result(run(batches(), **options))
    cut_off_after(6, monkeypatch)
    with pytest.raises(CutOff):
        run(batches(), checkpoint=tmp_path, **options)
    monkeypatch.undo()
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 1000)
    assert result(run(batches(), resume=tmp_path, **options)) == expected


def test_another_folder_to_write_to(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        cut_off_after(4, patch)
        with pytest.raises(CutOff):
            run(checkpoint=tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert result(run(resume=tmp_path / "a", checkpoint=tmp_path / "b")) == result(run())
    assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    with pytest.raises(FileExistsError, match="another fit"):
        run(resume=tmp_path / "a", checkpoint=tmp_path / "b")


def test_interrupted_by_hand_it_can_still_go_on(tmp_path):
    stop = raising(KeyboardInterrupt(), lambda record: record["epoch"] == 2)
    with pytest.warns(UserWarning, match="interrupted"):
        assert run(checkpoint=tmp_path, callbacks=[stop]).fit_report.interrupted
    assert result(run(resume=tmp_path)) == result(run())


def test_a_likelihood_that_is_no_number_comes_back(tmp_path):
    history = [{"step": 0, "held_out_nll": float("nan"), "train_nll": float("inf")}]
    state = preparation.State("sgd", {"a": torch.arange(3)}, {"x": 0.1}, preparation.FitReport(history=history))
    checkpoints = Checkpoints(tmp_path, 60, {})
    checkpoints.save(state)
    loaded = checkpoints.load(tmp_path)
    assert repr(loaded) == repr(state)
    assert not checkpoints.due()


def test_what_was_left_by_a_process_that_died_is_removed(tmp_path):
    ours = [".state-00003.safetensors.0af.tmp", f".{FILE}.0af.tmp", "state-00003.safetensors", ".tmpK3eXbq"]
    for name in [*ours, "notes.txt"]:
        (tmp_path / name).write_text("")
    run(checkpoint=tmp_path, epochs=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", FILE, "notes.txt", "state-00005.safetensors"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 4}, ["epochs = 4, there 3"]),
        ({"lr": 0.5, "seed": 1}, ["lr = 0.5, there 0.01", "seed = 1, there 0"]),
        ({"n_components": 5}, ["n_components = 5, there 6"]),
        ({"method": "em"}, ["method = 'em', there 'sgd'"]),
        ({"dtype": torch.float64}, ["dtype = 'torch.float64'"]),
        ({"clusters": ROWS[1:7]}, ["clusters ="]),
        ({"x": ROWS[:2000]}, ["rows = 2000, there 3000", "data ="]),
        ({"x": ROWS + 1}, ["data ="]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_differ_are_named(change, named, tmp_path):
    run(checkpoint=tmp_path)
    with pytest.raises(ValueError, match="resume: .* is of a fit with other settings") as caught:
        run(**{"resume": tmp_path, **change})
    text = str(caught.value)
    assert all(name in text for name in named), text
    assert text.count(", there ") == (2 if len(change) == 2 or "rows" in named[0] else 1)


def test_settings_may_be_numbers_of_numpy(tmp_path):
    options = {"n_components": np.int64(6), "held_out": np.float32(0.1), "checkpoint": tmp_path}
    expected = result(run(**options))
    same = {"n_components": 6, "held_out": float(np.float32(0.1)), "checkpoint": tmp_path}
    for again in (options, same):
        assert result(run(**again, resume=True)) == expected


def spoil(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("state-00001.safetensors", None, FileNotFoundError, "state-00001.safetensors is missing"),
        ("state-00001.safetensors", b"abc", ValueError, "state-00001.safetensors has 3 bytes, expected"),
        (FILE, None, FileNotFoundError, f"holds no {FILE}"),
        (FILE, b"{", ValueError, "is not JSON"),
        (FILE, b"[]", ValueError, "is not the checkpoint of a fit"),
        (FILE, b'{"format": "mfa_kernels.fit", "version": 99}', ValueError, "has version 99"),
    ],
)
def test_damage_is_reported_by_name(name, data, error, message, tmp_path):
    run(checkpoint=tmp_path, epochs=0)
    spoil(tmp_path / name, data)
    with pytest.raises(error, match=message):
        run(resume=tmp_path, epochs=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resume": True}, ValueError, "resume = True needs a checkpoint"),
        ({"resume": 3}, TypeError, "resume must be a folder or a bool, got int"),
        ({"checkpoint_seconds": -1}, ValueError, "checkpoint_seconds must be >= 0, got -1"),
        ({"checkpoint": __file__}, NotADirectoryError, "checkpoint must name a folder, .* is a file"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_a_checkpoint_is_not_written_over(tmp_path):
    run(checkpoint=tmp_path, epochs=0)
    with pytest.raises(FileExistsError, match="resume=True goes on with it"):
        run(checkpoint=tmp_path, epochs=0)


def test_fingerprint():
    x = torch.arange(6.0).view(2, 3)
    prints = {fingerprint(t) for t in (x, x.view(3, 2), x.double(), x.bfloat16(), x.t(), x[:0])}
    assert len(prints) == 6
    assert fingerprint(x.t()) == fingerprint(x.t().contiguous())


# Disks that are full, folders that others write to, paths that nobody can write to


@pytest.mark.parametrize(("argument", "why"), [("log", "File exists"), ("checkpoint", "Not a directory")])
def test_paths_are_tried_before_work_begins(argument, why, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "kmeans", work_has_begun)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=rf"{argument}: .*file/there.* cannot be written \(") as error:
        run(**{argument: tmp_path / "file" / "there"})
    assert why in str(error.value)


def test_a_log_that_is_there_stays_until_there_is_another(tmp_path, monkeypatch):
    before = '{"step": 0, "epoch": 0, "held_out_nll": 1.0}\n'
    (tmp_path / "log.jsonl").write_text(before)
    monkeypatch.setattr(stages, "kmeans", lambda *args, **kwargs: (_ for _ in ()).throw(CutOff()))
    with pytest.raises(CutOff):
        run(log=tmp_path / "log.jsonl")
    assert (tmp_path / "log.jsonl").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("method", ["em", "online", "sgd"])
def test_a_disk_that_is_full_for_a_while_costs_no_fit(method, tmp_path, monkeypatch):
    """Writes fail three times; the fit is the same, and its checkpoint that of its end."""
    expected = run(method=method)
    write, failed = checkpoint.atomic_save_safetensors, []

    def full(tensors, path, *rest):
        if 1 < len(failed) < 5 or not failed:
            failed.append(path)
            raise OSError(28, "No space left on device", str(path))
        failed.append("written")
        write(tensors, path, *rest)

    monkeypatch.setattr(checkpoint, "atomic_save_safetensors", full)
    with pytest.warns(
        UserWarning, match=r"a checkpoint in .* could not be written \(OSError: .*No space left on device"
    ):
        mfa = run(method=method, checkpoint=tmp_path)
    assert result(mfa) == result(expected)
    monkeypatch.setattr(checkpoint, "atomic_save_safetensors", write)
    assert result(run(method=method, checkpoint=tmp_path, resume=True)) == result(expected)


def test_a_log_that_cannot_be_written_costs_no_fit(tmp_path):
    def remove(mfa, record):
        shutil.rmtree(tmp_path / "logs", ignore_errors=True)
        (tmp_path / "logs").write_text("a file where the folder was")

    with pytest.warns(UserWarning, match=r"the log .*log.jsonl could not be written \((NotADirectory|FileExists)Error"):
        mfa = run(log=tmp_path / "logs" / "log.jsonl", callbacks=[remove])
    assert result(mfa) == result(run())


def test_a_checkpoint_of_the_end_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    save = checkpoint.Checkpoints.save

    def fail_at_the_end(self, state):
        if state.stage == checkpoint.DONE:
            raise OSError(5, "Input/output error", str(self.folder))
        save(self, state)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", fail_at_the_end)
    with pytest.warns(UserWarning, match="the checkpoint of its end could not be written .* the mixture is returned"):
        mfa = run(checkpoint=tmp_path)
    monkeypatch.undo()
    assert result(run(checkpoint=tmp_path, resume=True)) == result(mfa)


def test_a_disk_that_is_full_is_an_oserror_that_names_the_file(tmp_path):
    """safetensors has an error of its own for it."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with pytest.raises(OSError, match="big.safetensors"):
            files.atomic_save_safetensors({"x": torch.zeros(1 << 16)}, tmp_path / "big.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not any(tmp_path.iterdir())


def test_one_fit_at_a_time_writes_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.05)
    seen = []

    def another(mfa, record):
        if not seen:
            with pytest.raises(TimeoutError, match=rf"{tmp_path}: another process, or a writer in this one"):
                run(checkpoint=tmp_path, resume=True)
            seen.append(record)

    mfa = run(checkpoint=tmp_path, callbacks=[another])
    assert seen
    assert result(run(checkpoint=tmp_path, resume=True)) == result(mfa), "and is held no longer"
    with pytest.raises(CutOff):
        run(checkpoint=tmp_path / "other", callbacks=[raising(CutOff(), lambda record: True)])
    run(checkpoint=tmp_path / "other", resume=True)


def test_ctrl_c_without_held_out_rows_gives_a_state_of_a_finished_step(tmp_path):
    def interrupt(mfa, record):
        if record["step"]:
            with torch.no_grad():
                mfa.means.mul_(0)
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="fit: interrupted; the mixture is the best so far"):
        mfa = run(held_out=0.0, eval_every=3, callbacks=[interrupt])
    assert mfa.fit_report.interrupted
    assert mfa.means.abs().sum() > 0


def test_relative_paths_are_those_of_the_beginning(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    mfa = run(checkpoint="run", log="log.jsonl", callbacks=[lambda *_: os.chdir(tmp_path / "elsewhere")])
    assert not any((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "log.jsonl").is_file()
    assert result(run(checkpoint=tmp_path / "run", resume=True)) == result(mfa)


def test_a_fit_whose_folder_was_taken_leaves_it_alone(tmp_path):
    """It was removed, lock and all, and another fit made it anew."""
    folder, seen = tmp_path / "run", []

    def take(mfa, record):
        if record["step"] and not seen:
            shutil.rmtree(folder)
            seen.append(result(run(n_components=4, checkpoint=folder)))

    with pytest.warns(UserWarning, match="is of another fit now, though the folder was locked"):
        run(checkpoint=folder, callbacks=[take])
    assert result(run(n_components=4, checkpoint=folder, resume=True)) == seen[0]

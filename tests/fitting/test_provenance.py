"""What a fit was is in its report."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from mfa_kernels import MFA, __version__, fit, fit_many
from mfa_kernels.fitting import as_source, preparation
from mfa_kernels.fitting.provenance import now
from tests.fitting.planted import Store, draw, planted

ROWS = draw(planted(3, 6, 1), 900)
OPTIONS: dict[str, Any] = {"rank": 1, "epochs": 1, "progress": False}


def run_of(x: Any = ROWS, **options: Any) -> dict[str, Any]:
    return fit(x, 3, **{**OPTIONS, **options}).fit_report.run


def test_settings_as_asked_and_as_run():
    before = now()
    run = run_of(seed=np.int64(3), patience=None, noise="per_component", batch_size=100)
    assert before <= run["began"] <= now()
    written = datetime.strptime(run["began"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert abs((datetime.now(timezone.utc) - written).total_seconds()) < 100
    assert run["settings"] == {
        "method_asked": "auto", "method": "em", "spread": False, "n_components": 3, "rank": 1, "seed": 3,
        "patience": None, "noise": "per_component", "batch_size": 100, "epochs": 1, "init": "pca", "clusters": None,
        "lr": 0.01, "schedule": "cosine", "polish": 0, "held_out": 0.05, "eval_every": None, "dtype": "torch.float32",
        "precision": "exact", "start": None, "row_weights": None,
    }  # fmt: skip
    assert json.loads(json.dumps(run)) == run
    assert run_of(method="sgd", clusters=ROWS[:3])["settings"]["clusters"] is not None


def test_data():
    data = run_of()["data"]
    assert (data["rows"], data["n_features"], data["streamed"]) == (900, 6, False)
    assert re.fullmatch("[0-9a-f]{16}", data["fingerprint"])
    assert run_of(ROWS.clone())["data"] == data
    assert run_of(ROWS + 1)["data"]["fingerprint"] != data["fingerprint"]
    assert set(data) == {"rows", "n_features", "streamed", "fingerprint"}


def test_versions_and_machine():
    run = run_of()
    assert run["versions"]["mfa_kernels"] == __version__
    assert run["versions"]["torch"] == torch.__version__
    assert run["versions"]["numpy"] == np.__version__
    machine = run["machine"]
    assert (machine["device"], machine["processes"], machine["threads"]) == ("cpu", 1, torch.get_num_threads())
    assert machine["name"]


@pytest.mark.parametrize("held", [True, False])
def test_a_stream_is_counted_as_it_is_read(held, monkeypatch):
    if not held:
        monkeypatch.setattr(preparation, "LEAST_START_ROWS", 200)
    runs = [run_of(iter(ROWS.split(130)))]
    mixtures = fit_many(ROWS.split(130), {"a": {"n_components": 3}}, **OPTIONS)
    runs.append(mixtures["a"].fit_report.run)
    for run in runs:
        assert (run["data"]["rows"], run["data"]["streamed"]) == (900, not held)
        assert run["settings"]["method"] == ("em" if held else "online")


def test_what_a_store_says_of_itself_without_paths():
    store = Store(ROWS)
    store.meta = {
        "model": "/home/anna/models/secret-project/", "tokenizer": "a/tokenizer", "layer": 3, "seed": 7,
        "model_fingerprint": "0123", "notes": "/home/anna",
    }  # fmt: skip
    data = run_of(store)["data"]
    assert data["model"] == "local:secret-project"
    assert (data["tokenizer"], data["layer"], data["model_fingerprint"]) == ("a/tokenizer", 3, "0123")
    assert not {"seed", "notes"} & set(data)
    assert "anna" not in str(data)
    for meta in (None, "text", {"model": None, "layer": [1], "tokenizer": ""}):
        store.meta = meta
        assert set(run_of(store)["data"]) == {"rows", "n_features", "streamed", "fingerprint"}
        assert as_source(store).meta == (meta if isinstance(meta, dict) else {})


def test_a_fit_that_is_spread(tmp_path):
    mfa: Any = fit(ROWS, 3, split="components", **OPTIONS)
    run = mfa.fit_report.run
    assert (run["settings"]["method_asked"], run["settings"]["method"], run["settings"]["spread"]) == (
        "auto", "em", True,
    )  # fmt: skip
    assert run["data"] == run_of()["data"]
    mfa.save_pretrained(tmp_path)
    assert MFA.from_pretrained(tmp_path).fit_report == mfa.fit_report
    assert type(mfa).from_pretrained(tmp_path).fit_report == mfa.fit_report
    assert type(mfa).from_mfa(MFA.from_pretrained(tmp_path)).fit_report == mfa.fit_report


@pytest.mark.parametrize("split", ["rows", "components"])
def test_a_fit_that_is_resumed_keeps_its_record(tmp_path, split, monkeypatch):
    work = partial(fit, split=split)
    first = work(ROWS, 3, checkpoint=tmp_path, **OPTIONS).fit_report
    content = json.loads((tmp_path / "checkpoint.json").read_text())
    assert content["report"]["run"] == first.run
    monkeypatch.setattr("mfa_kernels.fitting.provenance.platform.python_version", lambda: "4.0")
    assert work(ROWS, 3, checkpoint=tmp_path, resume=True, **OPTIONS).fit_report == first
    del content["report"]["run"], content["checksum"]  # as earlier versions wrote it
    (tmp_path / "checkpoint.json").write_text(json.dumps(content))
    found = work(ROWS, 3, checkpoint=tmp_path, resume=True, **OPTIONS).fit_report
    assert found.run == {}
    assert found.history == first.history

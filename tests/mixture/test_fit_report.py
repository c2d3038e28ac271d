from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mfa_kernels import fit
from mfa_kernels.fitting import FitReport
from mfa_kernels.mixture import fit_report

RUN: dict[str, Any] = {
    "began": "2026-02-03T04:05:06Z",
    "settings": {"method_asked": "auto", "n_components": 7, "rank": 2, "epochs": 3, "seed": 5, "lr": 0.01},
    "data": {
        "rows": 1234, "n_features": 16, "fingerprint": "abc", "streamed": True, "model": "local:lm", "layer": "h.3",
    },
    "versions": {"mfa_kernels": "0.1.0", "torch": "2.9"},
    "machine": {"device": "cpu", "name": "A processor", "processes": 4, "threads": 2},
}  # fmt: skip


def some_report() -> FitReport:
    history = [{"step": step, "epoch": step, "train_nll": None if not step else 1 / 3} for step in range(4)]
    return FitReport(
        history, "em", 2, 12.5, 100, 3, 1, 7, 1200, {"kmeans": 0.1, "em": 2.5}, True, True, 3.0, 4, 5, "text", RUN
    )


def test_history_as_json_lines(tmp_path):
    report = FitReport(history=[{"step": 0, "train_nll": None}, {"step": 5, "train_nll": float("nan")}])
    report.write_history(tmp_path / "deep" / "log.jsonl")
    lines = (tmp_path / "deep" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "train_nll": None}, {"step": 5, "train_nll": None}]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["log.jsonl"]


def test_a_few_lines_for_people():
    history = [{"step": step} for step in (0, 4, 8)]
    seconds = {"kmeans": 1.25, "em": 2.5}
    report = FitReport(
        history, "em", 4, 12.3456, 100, 3, 0, 7, 1200, seconds, True, prior_strength=3.0, held_out_by="row"
    )
    assert str(report).splitlines() == [
        "em: the state of step 4 of 8, held-out 12.346 nats per token (held out by row)",
        "live: 7 regions, the most responsible for at least one of 1,200 rows",
        "seconds: 3.8 (kmeans 1.2, em 2.5)",
        "prior: each region weighed as if it had seen 3 tokens more",
        "left out: 3 rows, 0 steps that were not finite",
        "stopped for want of improvement",
    ]
    assert str(FitReport()).splitlines() == [
        "sgd: the state of step 0 of 0",
        "live: 0 regions, the most responsible for at least one of 0 rows",
        "seconds: 0.0",
    ]
    report.revived_components = 2
    assert "moved: 2 times a region that owned nothing of its own" in str(report).splitlines()


def test_the_guide_says_what_each_number_is():
    """Of every key of the log, its unit is in the table of docs/fitting.md, and no other key is."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    for method in ("em", "sgd"):
        history = fit(x, 2, 1, method=method, epochs=1, progress=False).fit_report.history
        guide = (Path(__file__).parents[2] / "docs" / "fitting.md").read_text()
        table = guide.split("| key |")[1].split("\n\n")[0]
        assert re.findall(r"^\| `(\w+)`", table, re.M) == list(history[0])
        assert history[0]["tokens_per_second"] is None  # nothing was trained on yet
        assert history[-1]["tokens_per_second"] > 0


def test_what_a_fit_went_on_from_and_whether_it_came_to_rest():
    run = {**RUN, "settings": {**RUN["settings"], "start": "0123"}}
    lines = str(FitReport([{"step": 0}, {"step": 3}], "em", 0, settled=True, run=run)).splitlines()
    assert lines[0] == "em: the state of step 0 of 3 (the start: none was better)"
    assert "settled: another pass would have changed next to nothing" in lines
    assert "from a mixture" in lines[-3]
    assert "from a mixture" not in str(some_report())


def test_the_run_in_a_few_lines():
    assert str(some_report()).splitlines()[-3:] == [
        "fitted: 2026-02-03T04:05:06Z, em (asked for: auto), seed 5, K 7, R 2, epochs 3",
        "data: 1,234 rows of width 16, read once, local:lm, h.3, fingerprint abc",
        "with: mfa_kernels 0.1.0, torch 2.9, cpu, A processor, 4 processes",
    ]
    assert some_report().held_out() == "12.500 nats per token (100 rows, held out by text)"
    assert FitReport().held_out() is None


def test_what_json_holds_of_it_gives_it_back():
    report = some_report()
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert FitReport.from_dict(content) == report
    assert FitReport.from_dict(FitReport().as_dict()) == FitReport() == FitReport.from_dict({})
    assert content.keys() == vars(report).keys()


def test_numbers_that_are_not_finite_come_back():
    report = FitReport(
        [{"step": 0, "train_nll": math.inf}, {"step": 1, "train_nll": math.nan}], held_out_nll=-math.inf,
        seconds={"em": math.inf},
    )  # fmt: skip
    found = FitReport.from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False)))
    assert math.isnan(found.history.pop()["train_nll"])
    report.history.pop()
    assert found == report


@pytest.mark.parametrize("best", [0, 777, 4999])
def test_a_long_history_is_thinned_but_for_its_ends_and_the_best(best):
    history = [{"step": step, "held_out_nll": abs(step - best)} for step in range(5000)]
    report = FitReport(history, best_step=best)
    kept = FitReport.from_dict(report.as_dict()).history
    assert fit_report.MOST_RECORDS - 1 <= len(kept) <= fit_report.MOST_RECORDS
    steps = [record["step"] for record in kept]
    assert (steps[0], steps[-1]) == (0, 4999)
    assert best in steps
    assert max(b - a for a, b in zip(steps, steps[1:])) <= 6  # noqa: RUF007
    assert report.history is history
    assert len(history) == 5000
    short = FitReport(history[: fit_report.MOST_RECORDS])
    assert FitReport.from_dict(short.as_dict()) == short


def test_what_json_cannot_hold_is_named():
    for report in (FitReport([{"step": {1, 2}}]), FitReport(run={"settings": {"a": object()}})):
        with pytest.raises(TypeError, match="^fit_report must hold only what JSON can: "):
            report.as_dict()


def test_fields_of_later_versions_are_left_out():
    content = some_report().as_dict() | {"a_new_one": 3}
    content["run"]["also"] = [{"new": 1}]
    found = FitReport.from_dict(content)
    assert not hasattr(found, "a_new_one")
    assert found.run["also"] == [{"new": 1}]
    assert found.history == some_report().history


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"^there: expected an object, got \[\]"),
        ({"method": 3}, "^there: method must be a string, got 3"),
        ({"history": [3]}, "^there: history must be a list of an object"),
        ({"history": [{"step": "three"}]}, "^there: history: step must be an integer of at least 0, got 'three'"),
        ({"seconds": {"em": "1"}}, "^there: seconds must be an object of values that are each a number"),
        ({"held_out_nll": "low"}, "^there: held_out_nll must be a number, or null, got 'low'"),
        ({"run": {"settings": 3}}, "^there: run: settings must be an object, got 3"),
        ({"run": {"began": 3}}, "^there: run: began must be a string, or null, got 3"),
    ],
)
def test_what_is_of_another_kind_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        FitReport.from_dict(content, "there")


def test_what_is_printed_is_text():
    """Whatever a file brings: no control characters for the terminal, and nothing endless."""
    bad = "\x1b[2J\n"
    run = {
        "settings": {"method_asked": bad, "seed": [bad] * 10**5, "rank": {bad: bad}}, "versions": {bad: "\ud800"},
        "data": {"rows": "many", "n_features": None, "fingerprint": 10**4000, "model": bad * 1000}, "machine": {},
    }  # fmt: skip
    report = FitReport.from_dict({"method": bad, "held_out_by": bad, "held_out_nll": 1.0, "run": run})
    told = f"{report}\n{report.held_out()}"
    assert all(line.isprintable() for line in told.splitlines())
    assert len(told) < 2000
    assert "fingerprint 1000" in told

from __future__ import annotations

import json

from mfa_kernels.fitting import FitReport


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
        "7 regions own one of 1,200 rows",
        "3.8 s: kmeans 1.2, em 2.5",
        "prior: 3 tokens a region; 0 regions moved",
        "left out: 3 rows, 0 steps that were not finite",
        "stopped for want of improvement",
    ]
    assert str(FitReport()).splitlines() == ["sgd: the state of step 0 of 0", "0 regions own one of 0 rows", "0.0 s: "]

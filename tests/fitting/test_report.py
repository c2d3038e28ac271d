from __future__ import annotations

import json

from mfa_kernels.fitting import FitReport


def test_history_as_json_lines(tmp_path):
    report = FitReport(history=[{"step": 0, "train_nll": None}, {"step": 5, "train_nll": float("nan")}])
    report.write_history(tmp_path / "deep" / "log.jsonl")
    lines = (tmp_path / "deep" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "train_nll": None}, {"step": 5, "train_nll": None}]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["log.jsonl"]

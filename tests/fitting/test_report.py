from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from mfa_kernels import fit
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

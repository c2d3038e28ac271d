"""The benchmark of fitting: a baseline in pieces is the baseline, and what is read off its curves."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from bench import curves
from bench import time_to_quality as bench
from tests.fitting.planted import draw, planted

X, TEST = draw(planted(), 700), draw(planted(), 200, seed=2)


def without_times(curve):
    return [(point["passes"], point["nll"]) for point in curve]


def test_a_baseline_in_pieces_is_the_baseline(tmp_path, monkeypatch):
    whole = bench.Baseline(X, TEST, 6, 2, None)
    assert whole.run(2, 1e9, float("inf"))
    assert [point["passes"] for point in whole.curve] == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1] + [
        1 + i / 6 for i in range(1, 7)
    ]
    state = tmp_path / "state.pt"
    assert not bench.Baseline(X, TEST, 6, 2, state).run(2, 1e9, 0.0), "no time, but for the start"
    look = bench.Baseline._look
    for stop in (3, 6, 8):  # in the middle of an epoch, and between two

        def cut(self, steps, stop=stop):
            look(self, steps)
            if len(self.curve) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(bench.Baseline, "_look", cut)
        with pytest.raises(KeyboardInterrupt):
            bench.Baseline(X, TEST, 6, 2, state).run(2, 1e9, float("inf"))
    part = bench.Baseline(X, TEST, 6, 2, state)
    assert part.run(2, 1e9, float("inf"))
    assert without_times(part.curve) == without_times(whole.curve)
    assert part.seconds == part.curve[-1]["seconds"] > part.kmeans_seconds
    with pytest.raises(ValueError, match="baseline-state: .* is of other activations, K or R"):
        bench.Baseline(X, TEST, 6, 3, state)


def runs():
    def curve(*points):
        return [dict(zip(("seconds", "passes", "nll"), point)) for point in points]

    return {
        "paper": {"curve": curve((1, 0, 90.0), (60, 1, 20.0), (120, 2, 21.0)), "final": 21.0, "flat": True},
        "online": {"curve": curve((1, 0, 30.0), (3, 1, 19.0)), "final": 19.0, "live": "6/6"},
        "em": {"curve": curve((1, 0, 30.0), (3, 1, 20.5)), "final": 20.5, "live": "6/6"},
    }


def test_marks():
    lines = bench.marks(runs()).splitlines()
    assert lines[0] == "the baseline: 60 s; 119 s, had all of it gone at its fastest pace"
    assert lines[1].startswith("online: 3.0 s of 60.0 s to 20.00 nats, 1/20.0 (1/39.7) (must 1/15, aim 1/50: must)")
    assert lines[2] == "em: never reached 20.00 nats (final 20.50)"
    early = runs()
    early["paper"]["flat"] = False
    assert "not flat yet" in bench.marks(early)
    assert "| paper | 21.00 | 20.00 | 1.00 | 60.0 | 1.00 | 120.0 |  |" in bench.table(runs())


def test_merged_reports_share_their_settings():
    settings = {name: "1" for name in ("tokens", "components", "rank", "layer", "toy", "texts")}
    one = {"settings": settings, "machine": {}, "runs": {"paper": 1}}
    other = {"settings": {**settings, "epochs": "3"}, "machine": {}, "runs": {"em": 2}}
    assert bench.merged([one, other])["runs"] == {"paper": 1, "em": 2}
    with pytest.raises(ValueError, match="merge: rank differs: 2 and 1"):
        bench.merged([one, {**other, "settings": {**settings, "rank": "2"}}])


def test_the_figure():
    lines = {name: [(p["seconds"], p["nll"]) for p in run["curve"]] for name, run in runs().items()}
    drawn = curves.svg(lines, "a & b", 20.0, above_lowest=True)
    assert drawn == curves.svg(lines, "a & b", 20.0, above_lowest=True)
    root = ET.fromstring(drawn)
    assert len(root.findall("{*}circle")) == 7
    texts = [element.text for element in root.findall("{*}text")]
    assert {"a & b", "online", "paper", "held-out nats above 19.0"} <= set(texts)
    plain = [e.text for e in ET.fromstring(curves.svg(lines, "c", across="components", up="us")).findall("{*}text")]
    assert {"components", "us"} <= set(plain)

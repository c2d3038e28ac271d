"""`python -m bench.gpu --rehearse`: every case runs, so that the first run on a GPU does not fail on a typo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import __main__ as command
from bench.gpu.cases import CASES
from bench.gpu.harness import Bench

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_every_case_runs(tmp_path):
    out = run("--rehearse", "--out", str(tmp_path))
    (path,) = tmp_path.glob("gpu-*.json")
    report = json.loads(path.read_text())
    failed = {name: found["traceback"] for name, found in report["results"].items() if "traceback" in found}
    assert not failed, "\n".join(failed.values())
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    assert list(report["results"]) == [case.name for case in CASES]
    assert report["results"]["gpu tests"]["passed"] >= 1
    assert report["results"]["scan llama K=8192"]["tflops"] > 0
    assert all(measured != "not measured" for _, _, measured in report["marks"])
    table = out.stdout.rstrip().splitlines()[-len(report["marks"]) :]
    assert all(line.startswith("| ") for line in table), "the table comes last"


def case(name: str, estimate: float, function):
    return command.CASES[0].__class__(name, estimate, function)


@pytest.fixture
def only(monkeypatch):
    """Runs these cases in this process."""

    def with_cases(tmp_path, *cases, **options) -> tuple[int, dict]:
        monkeypatch.setattr(command, "CASES", list(cases))
        minutes = str(options.get("minutes", 9))
        status = command.main(["--rehearse", "--out", str(tmp_path), "--minutes", minutes])
        return status, json.loads(next(tmp_path.glob("gpu-*.json")).read_text())["results"]

    return with_cases


def test_a_failing_case_leaves_its_traceback_and_the_run_goes_on(only, tmp_path):
    def bad(bench, results, folder):
        raise RuntimeError("CUDA error: of the worst sort")

    good = case("good", 1, lambda bench, results, folder: {"value": float("nan"), "seen": sorted(results)})
    status, results = only(tmp_path, case("bad", 1, bad), good)
    assert status == 1
    assert "of the worst sort" in results["bad"]["error"]
    assert "def bad" not in results["bad"]["traceback"]
    assert 'raise RuntimeError("CUDA error' in results["bad"]["traceback"]
    assert results["good"] == {"value": None, "seen": ["bad"]}


def test_cases_for_which_there_is_no_time_are_skipped(only, tmp_path, capsys):
    quick = case("quick", 1, lambda bench, results, folder: {"ms": 1.0})
    long = case("long", 100, lambda bench, results, folder: {"ms": 2.0})
    status, results = only(tmp_path, long, quick, minutes=0.5)
    assert status == 0
    assert results == {"long": {"skipped": "out of time"}, "quick": {"ms": 1.0}}
    assert "skipped: out of time" in capsys.readouterr().out


def test_list_and_only():
    out = run("--list", "--only", "few tokens llama")
    names = [line.split("  ")[0] for line in out.stdout.splitlines()]
    assert names == [c.name for c in CASES if c.name == "ceilings" or "few tokens llama" in c.name]
    assert len(names) == 4


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_the_median_is_a_median():
    bench, calls = Bench("cpu", 1), []
    timing = bench.median(calls.append)
    assert timing.fastest <= timing.median <= timing.slowest
    assert timing.repeats >= 5
    assert set(calls) == {0, 1, 2}, "inputs rotate"

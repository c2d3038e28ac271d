"""`python -m bench.gpu --rehearse`: every case runs, so that the first run on a GPU does not fail on a typo."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu.cases import FIRST, SECOND
from bench.gpu.harness import Bench, Case
from bench.gpu.watch import Sampler, profiled

ROOT = Path(__file__).parents[2]
CASES = [*FIRST, *SECOND]


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
    return Case(name, estimate, function)


@pytest.fixture
def only(monkeypatch):
    """Runs these cases in this process."""

    def with_cases(tmp_path, *cases, **options) -> tuple[int, dict]:
        monkeypatch.setattr(command, "STAGES", {1: list(cases), 2: list(options.get("second", ()))})
        minutes = str(options.get("minutes", 9))
        status = command.main(["--rehearse", "--out", str(tmp_path), "--minutes", minutes, *options.get("given", ())])
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


def test_something_wrong_ends_the_first_stage(only, tmp_path, capsys):
    """A refused family is something wrong; what was found is kept, and the second stage goes on with it."""
    refused = case("check", 1, lambda bench, results, folder: {"refused": 1})
    measured = case("measured", 1, lambda bench, results, folder: {"seen": sorted(results)})
    status, results = only(tmp_path, refused, second=[measured])
    assert (status, list(results)) == (1, ["check"])
    assert "--stage 2" in capsys.readouterr().out
    _, results = only(tmp_path, refused, second=[measured], given=["--anyway"])
    assert list(results) == ["check", "measured"]


def test_the_second_stage_goes_on_with_what_the_first_found(only, tmp_path):
    fine = case("check", 1, lambda bench, results, folder: {"refused": 0})
    measured = case("measured", 1, lambda bench, results, folder: {"seen": sorted(results)})
    _, results = only(tmp_path, fine, second=[measured], given=["--stage", "1"])
    assert list(results) == ["check"]
    status, results = only(tmp_path, fine, second=[measured], given=["--stage", "2"])
    assert (status, results["measured"]["seen"]) == (0, ["check"])
    _, results = only(tmp_path, fine, second=[measured])
    assert results["measured"]["seen"] == ["check"]


def test_what_the_chip_did_meanwhile():
    """Lines as nvidia-smi prints them; without the program there is nothing."""
    program = "print('1980, 2619, 650.25, 61, 0x0000000000000004', '900, 2619, [N/A], 63, 0x0', sep='\\n', flush=True)"
    began = time.monotonic()
    sampler = Sampler([sys.executable, "-c", f"{program}; import time; time.sleep(60)"])
    while len(found := sampler.since(began)) == 0 or found["samples"] < 2:
        assert time.monotonic() < began + 30
        time.sleep(0.01)
    assert found == {
        "samples": 2, "sm_mhz": 1440.0, "memory_mhz": 2619.0, "watts": 650.25, "watts_most": 650.25,
        "celsius_most": 63.0, "reasons": ["0x0", "0x0000000000000004"],
    }  # fmt: skip
    assert sampler.since(time.monotonic()) == {}
    sampler.stop()
    missing = Sampler(["/no/such/program"])
    assert missing.since(began) == {}
    missing.stop()


def test_a_profile_has_the_kernels_of_a_call():
    x = torch.ones(64, 64)
    found = profiled(Bench("cpu", 1), lambda i: (x @ x).exp())
    assert {"aten::mm", "aten::exp"} <= found["kernels_us"].keys()
    assert 0 < sum(found["kernels_us"].values()) <= found["kernels_total_us"] * 1.001
    assert found["launches"] >= 2


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
    first = run("--list", "--stage", "1").stdout
    assert [line.split("  ")[0] for line in first.splitlines()] == [case.name for case in FIRST]
    assert sum(case.estimate for case in FIRST) <= 100


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_the_median_is_a_median():
    bench, calls = Bench("cpu", 1), []
    timing = bench.median(calls.append)
    assert timing.fastest <= timing.median <= timing.slowest
    assert timing.repeats >= 5
    assert set(calls) == {0, 1, 2}, "inputs rotate"

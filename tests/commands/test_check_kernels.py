"""`mfa-kernels doctor --check`, in the interpreter."""

from __future__ import annotations

import subprocess

import pytest
import torch

pytest.importorskip("triton")

from mfa_kernels.commands import check_kernels
from mfa_kernels.commands.check_kernels import Finding
from mfa_kernels.commands.cli import main
from mfa_kernels.ops.common import first_use
from tests.ops.common.test_first_use import FAMILIES

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter")


@pytest.fixture
def interpreted(monkeypatch, tmp_path):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("MFA_KERNELS_TRUST", "check")
    monkeypatch.setenv("MFA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(first_use, "_settled", {})
    for name, size in (("_COMPONENTS", 6), ("_FEATURES", 20), ("_RANK", 2), ("_SLOTS", 4)):
        monkeypatch.setattr(check_kernels, name, size)


@pytest.mark.parametrize("family", check_kernels.exercises())
def test_every_family_runs_and_passes(interpreted, family):
    finding = check_kernels.run(family, "cpu", (1, 5))
    assert finding.passed, finding
    assert finding.family == family
    # Without the CUDA library, there are no kernels of its own.
    assert set(finding.states) == (set() if family == "factors" else {"default"})


def test_what_serves_is_what_is_checked():
    assert set(FAMILIES) - {"rows of the scan"} == set(check_kernels.exercises())  # which a scan makes


def test_a_refusal_has_its_reason(interpreted, monkeypatch):
    from mfa_kernels.ops.kmeans import triton_nearest

    def fails(*arguments):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(triton_nearest, "nearest", fails)
    monkeypatch.setattr(first_use, "_insists", lambda: False)
    finding = check_kernels.run("nearest", "cpu", (1, 5))
    assert not finding.passed
    assert set(finding.states) == {"plain"}
    assert "no kernel image is available" in finding.note


@pytest.mark.parametrize(
    ("status", "said", "note"),
    [
        (-11, "", "killed by signal 11: nothing was said"),
        (1, "Traceback\nValueError: no\n", "status 1: ValueError: no"),
    ],
)
def test_a_family_that_takes_its_process_with_it(monkeypatch, status, said, note):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, status, "", said)
    )
    finding = check_kernels.alone("scan", "cuda", 5)
    assert finding.note == note
    assert not finding.passed


def test_a_family_that_does_not_end():
    finding = check_kernels.alone("scan", "cpu", 0.05)
    assert finding.note == "not done after 0 s"


def test_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MFA_KERNELS_CACHE", str(tmp_path))
    found = [Finding("scan", {"default": 12}, 3.21, ""), Finding("factors", {}, 0.5, "")]
    monkeypatch.setattr(check_kernels, "nothing_to_check", lambda device: None)
    monkeypatch.setattr(check_kernels, "run_all", lambda device: iter(found))
    monkeypatch.setattr("mfa_kernels.commands.doctor.report", lambda: [("python", "3")])
    assert main(["doctor", "--check"]) == 0
    out = capsys.readouterr().out
    assert "scan                          12        0      0      3.2  passed" in out
    assert "no kernel ran: plain PyTorch serves it" in out
    found.append(Finding("decode", {"plain": 1, "default": 3}, 1.0, "default: off by 80 times what is allowed"))
    assert main(["doctor", "--check"]) == 1
    captured = capsys.readouterr()
    assert "off by 80 times" in captured.out
    assert "refused: decode; plain PyTorch serves them" in captured.err
    monkeypatch.undo()
    assert main(["doctor", "--check"]) == 0
    assert "no kernels to check: PyTorch sees no GPU" in capsys.readouterr().out

"""The plan of a fit's memory against the tensors that it names, and when it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfa_kernels import MFA, fit
from mfa_kernels.fitting import memory
from mfa_kernels.ops.statistics.op import SufficientStatistics

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("noise", ["shared", "per_component"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plan_counts_the_tensors(noise, dtype):
    mfa = MFA(12, 32, 3, noise, dtype=dtype)
    planned = {m: memory.plan(12, 32, 3, noise, m, dtype, 50) for m in ("sgd", "em", "online")}
    parameters = sum(p.nbytes for p in mfa.parameters())
    assert planned["sgd"]["parameters"] == planned["sgd"]["best parameters"] == parameters
    assert planned["sgd"]["Adam"] == 2 * parameters
    woodbury = mfa.woodbury()
    assert planned["sgd"]["factors"] == woodbury.rows.nbytes + woodbury.cholesky.nbytes  # 32 features: no padding
    statistics = SufficientStatistics.zeros(mfa.means, 3, noise == "per_component")
    assert planned["em"]["statistics"] == sum(t.nbytes for t in statistics.tensors()[:6])
    assert planned["online"]["statistics"] == planned["em"]["statistics"]
    assert planned["em"]["rows of the start, and held out"] == 50 * 32 * dtype.itemsize


def test_only_a_large_plan_is_told():
    small = memory.plan(12, 32, 3, "shared", "sgd", torch.float32, 50)
    assert memory.line(small, "K=12") is None
    large = memory.plan(8192, 4096, 10, "shared", "em", torch.float32, 100)
    told = memory.line(large, "K=8192 R=10 D=4096")
    assert told.startswith("fit: K=8192 R=10 D=4096 needs about 10.3 GB: parameters 1.48, factors 1.48,"), told


def test_fit_tells_it_before_it_starts(capsys, monkeypatch):
    monkeypatch.setattr(memory, "_LARGE", 1)
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    fit(x, 3, 1, epochs=1, progress=False)
    assert capsys.readouterr().err == ""
    fit(x, 3, 1, epochs=1)
    assert capsys.readouterr().err.startswith("fit: K=3 R=1 D=8 needs about")


_HELD = """
import torch
from mfa_kernels.fitting.memory import peak
before = peak(torch.device("cpu"))
held = b"\\1" * (64 << 20)
after = peak(torch.device("cpu"))
del held
print(before, after, peak(torch.device("cpu")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not applicable: asks Linux")
def test_peak_grows_by_what_is_held():
    # In a process of its own: what ran before this test may have held more.
    out = subprocess.run([sys.executable, "-c", _HELD], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    before, after, later = (int(word) for word in out.split())
    size = 64 << 20
    assert abs(after - before - size) < size / 8
    assert abs(later - after) < size / 8, "it is still the peak"

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.ops.common import backends, cpp
from mfa_kernels.ops.scan import portable

PARAMETERS = torch.zeros(3, 4)


def test_the_best_that_fits(monkeypatch):
    monkeypatch.delenv("MFA_KERNELS_BACKEND", raising=False)
    assert backends.serving(PARAMETERS, 2) == ("cpp" if cpp.library() is not None else "portable")
    monkeypatch.setattr(cpp, "library", lambda: None)
    assert backends.serving(PARAMETERS, 2) == "portable"


def test_one_is_asked_for(monkeypatch):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "portable")
    assert backends.serving(PARAMETERS, 2) == "portable"
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.serving(PARAMETERS, 2) == "triton"


@pytest.mark.parametrize(
    ("asked", "parameters", "rank", "interpret", "message"),
    [
        ("cuda", PARAMETERS, 2, "1", "must be one of cpp, triton, portable, got 'cuda'"),
        ("triton", PARAMETERS, 2, "0", "only under TRITON_INTERPRET=1"),
        ("triton", PARAMETERS.double(), 2, "1", "compute in float32, and the parameters are torch.float64"),
        ("triton", PARAMETERS, 65, "1", "ranks up to 64, and this one is 65"),
        ("triton", PARAMETERS.to("meta"), 2, "1", "these tensors are on meta"),
        ("cpp", PARAMETERS.to("meta"), 2, "1", "serve CPU tensors, and these are on meta"),
    ],
)
def test_what_cannot_be_served_is_refused(monkeypatch, asked, parameters, rank, interpret, message):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", asked)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(ValueError, match=message):
        backends.serving(parameters, rank)


class Elsewhere:
    """Parameters of which only what a decision reads is there."""

    dtype, shape = torch.float32, (3, 4)

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.mark.parametrize(
    ("device", "hip", "message"),
    [
        ("cuda:0", "6.4", "this PyTorch is for AMD's"),
        ("xpu:0", None, "these tensors are on xpu"),
        ("mps:0", None, "these tensors are on mps"),
    ],
)
def test_gpus_of_others_get_plain_pytorch_and_one_sentence(monkeypatch, device, hip, message):
    monkeypatch.delenv("MFA_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.setattr(backends, "_capability", lambda index: 9)  # an MI300 says 9.4
    backends._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=message) as caught:
        served = [backends.serving(Elsewhere(device), 2) for _ in range(2)]
    assert served == ["portable", "portable"]
    assert len(caught) == 1


def test_a_fallback_is_said_once():
    code = (
        "import warnings; warnings.simplefilter('always'); from mfa_kernels.ops.common import backends; "
        "[backends._say_once('no such kernel') for _ in range(3)]"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stderr.count("no such kernel; using plain PyTorch") == 1


def test_out_of_memory_says_what_and_what_shrinks_it(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("MFA_KERNELS_BACKEND", "portable")
    monkeypatch.setattr(portable, "scan", full)
    with pytest.raises(torch.OutOfMemoryError, match="the scan of 7 tokens need about .* GiB: pass fewer tokens x"):
        MFA(3, 4, 2).log_prob(torch.zeros(7, 4))

"""The doctor reports the choice of the kernels themselves."""

from __future__ import annotations

import pytest
import torch

from mfa_kernels.commands import doctor
from mfa_kernels.ops.common import backends, cpp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_asks_what_decides(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        backends, "decided", lambda p, rank: (seen.append((p.dtype, p.device.type)), ("portable", "so"))[1]
    )
    note = ", computing in float32" if dtype == torch.bfloat16 else ""
    assert doctor.serving("cpu", dtype) == f"plain PyTorch{note} (so)"
    assert seen == [(torch.float64 if dtype == torch.float64 else torch.float32, "cpu")]


def test_what_is_asked_for_and_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = doctor.serving("cpu", torch.float32)
    assert said.startswith("nothing: MFA_KERNELS_BACKEND=triton, but ")
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "portable")
    assert doctor.serving("cpu", torch.float32) == "plain PyTorch"


def test_why_the_kernels_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MFA_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(cpp, "library", lambda: None)
    assert doctor.serving("cpu", torch.float32).startswith("plain PyTorch (the C++ kernels could not be built")
    monkeypatch.setenv("MFA_KERNELS_NATIVE", "0")
    assert doctor.serving("cpu", torch.float32) == "plain PyTorch (MFA_KERNELS_NATIVE=0 turns the C++ kernels off)"

"""Bars are for those who watch."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from mfa_kernels import fit
from mfa_kernels.commands.cli import main
from mfa_kernels.common.progress import is_watched, progress_bar, quiet


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A function to call in a test: pytest sets standard error anew before it."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr  # type: ignore[return-value]


ROWS = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))


def test_a_terminal_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = terminal(monkeypatch)
    fit(ROWS, 3, 1, epochs=1)
    assert "k-means" in seen.getvalue()
    assert "EM" in seen.getvalue()


def test_a_log_does_not(capsys: pytest.CaptureFixture) -> None:
    fit(ROWS, 3, 1, epochs=1)
    assert capsys.readouterr().err == ""


def test_a_notebook_sees_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    assert is_watched()
    list(progress_bar(range(3), desc="three"))
    assert "three" in capsys.readouterr().err


def test_who_asks_for_quiet_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = terminal(monkeypatch)
    fit(ROWS, 3, 1, epochs=1, progress=False)
    with quiet():
        fit(ROWS, 3, 1, epochs=1)
        with quiet(False):
            assert not is_watched(), "once asked for, it stays"
    assert seen.getvalue() == ""
    assert is_watched()


def test_quiet_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch)
    seen = []
    monkeypatch.setattr("mfa_kernels.commands.doctor.report", lambda: seen.append(is_watched()) or [("what", "state")])
    assert main(["doctor", "--quiet"]) == main(["doctor"]) == 0
    assert seen == [False, True]
    assert is_watched()

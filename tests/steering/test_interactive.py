"""Commands change the steering between two tokens, whatever they say and whenever they come."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mfa_kernels import steer
from mfa_kernels.data import tiny_lm
from mfa_kernels.steering.interactive import HELP, Commands, Listener, parse
from tests.steering.tiny import LAYER, causal_lm, fitting_mixture, generate, prompts


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("region 4", {"component": 4}),
        ("region none", {"component": None}),
        ("alpha -0.5", {"alpha": -0.5}),
        ("gate 0.2", {"gate": (3, 0.2)}),
        ("gate none", {"gate": None}),
        ("latents none", {"latents": None}),
        ("positions generated", {"positions": "generated"}),
        ("norm keep", {"norm": "keep"}),
        ("norm none", {"norm": None}),
    ],
)
def test_commands(line: str, changes: dict[str, Any]) -> None:
    assert parse(line, 3) == changes


def test_latents_command() -> None:
    assert torch.equal(parse("latents 1 -2 0.5", None)["latents"], torch.tensor([1.0, -2.0, 0.5]))


@pytest.mark.parametrize("line", ["region", "region x", "alpha 1 2", "latents a", "gate", "louder", "latents"])
def test_bad_commands_are_named(line: str) -> None:
    with pytest.raises(ValueError, match=f"{line!r} is none of: region K"):
        parse(line, 3)


def test_a_gate_needs_a_region() -> None:
    with pytest.raises(ValueError, match="a gate needs a region"):
        parse("gate 0.5", None)


class Script:
    """Commands that come after given numbers of tokens."""

    def __init__(self, at: dict[int, list[str]]) -> None:
        self.at, self.calls = at, 0

    def pending(self) -> list[str]:
        self.calls += 1
        return self.at.get(self.calls, [])


def run(at: dict[int, list[str]], new: int = 6) -> tuple[Any, list[str]]:
    model, notes = causal_lm(), []
    with steer(model, fitting_mixture(), LAYER, 2, 0.6) as handle:
        listener = Listener(handle, Script(at), 2, notes.append)
        return generate(model, prompts(), new=new, stopping_criteria=[listener]), notes


def test_obeyed_from_the_next_token_on() -> None:
    plain, _ = run({})
    changed, notes = run({3: ["region 4", "alpha 0.9"]})
    assert notes == ["region 4", "alpha 0.9"]
    for step in range(6):
        assert torch.equal(plain.logits[step], changed.logits[step]) == (step < 3)
    model = causal_lm()
    with steer(model, fitting_mixture(), LAYER, 2, lambda step: 0.6 if step < 3 else 0.0):
        stopped, _ = run({3: ["alpha 0"]})
        for got, expected in zip(stopped.logits, generate(model, prompts(), new=6).logits):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_stop_stats_and_mistakes() -> None:
    out, notes = run({2: ["region 99", "hum", "gate 0.1", "region 1", "gate 0.2", "stats"], 4: ["stop"]})
    assert len(out.logits) == 4
    assert notes[0] == "component must be in [0, 6), got 99"
    assert notes[1].startswith("'hum' is none of")
    assert notes[2:5] == ["gate 0.1", "region 1", "gate 0.2"]
    assert notes[5] == "16 of 16 tokens steered"


def test_lines_arrive_through_a_pipe() -> None:
    read, write = os.pipe()
    commands = Commands(read)
    assert commands.pending() == []
    os.write(write, b"alpha 0.5\nreg")
    found = _wait(commands.pending)
    assert found == ["alpha 0.5"]
    os.write(write, b"ion 3\n\n  stop")
    assert _wait(commands.pending) == ["region 3"]
    os.close(write)
    assert _wait(commands.pending) == ["stop"]


def _wait(pending: Callable[[], list[str]]) -> list[str]:
    import time

    for _ in range(500):
        if found := pending():
            return found
        time.sleep(0.01)
    return []


def test_command_line(tmp_path: Path) -> None:
    """`mfa-kernels steer --live`: text on standard output, notes on standard error, commands from a pipe."""
    model, _ = tiny_lm.load()
    mfa = fitting_mixture(features=model.config.hidden_size)
    mfa.extra = {"model": "tiny_lm", "layer": 2}
    mfa.save_pretrained(tmp_path)
    command = [
        sys.executable,
        "-m",
        "mfa_kernels",
        "steer",
        str(tmp_path),
        "def f(self):",
        "-k",
        "1",
        "--live",
    ]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "5000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    notes = []
    for line in process.stderr:
        notes.append(line.strip())
        if notes[-1] == f"[{HELP}]":
            assert process.stdout.read(12) == "def f(self):"
            process.stdin.write("region 3\nalpha 0.8\n")
            process.stdin.flush()
        if notes[-1] == "[alpha 0.8]":
            process.stdin.write("stop\n")
            process.stdin.flush()
            break
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 0, rest
    assert notes[-2:] == ["[region 3]", "[alpha 0.8]"]


def test_without_standard_input_there_are_no_commands() -> None:
    assert Commands(None).pending() == []

"""The demonstration, where it cannot show what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mfa_kernels.commands import demo
from mfa_kernels.interpret import figures


def test_too_few_tokens_for_a_region_are_named(tmp_path: Path) -> None:
    options = demo.Options(tmp_path, tokens=60, components=16, rank=1, epochs=1, text=(demo.__file__,))
    with pytest.raises(ValueError, match="tokens: no region owns enough of 66 to be shown"):
        demo.run(options)


def test_what_is_said_has_a_name_and_a_unit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pictured: list[int] = []
    scatter = demo.region_scatter

    def noted(mfa: Any, store: Any, component: int, *given: Any, **named: Any) -> Any:
        pictured.append(component)
        return scatter(mfa, store, component, *given, **named)

    monkeypatch.setattr(demo, "region_scatter", noted)
    options = demo.Options(
        tmp_path, tokens=1500, components=4, rank=2, epochs=1, component=3, prompts=("def f",), new_tokens=2,
        text=(demo.__file__, figures.__file__),
    )  # fmt: skip
    demo.run(options)
    out = capsys.readouterr().out
    assert pictured == [3]  # the region that is steered toward
    shown = int(out.split(" regions: their share of all tokens")[0].split()[-1])
    table = out.split("region   share  tokens\n")[1].split("\nSteering")[0].strip("\n").splitlines()
    assert len(table) == 2 * shown
    assert all(line[:6].strip().isdecimal() and "%" in line[6:15] for line in table[::2])
    for said in ("prior standard deviations", "in nats", "nats per token"):
        assert said in out

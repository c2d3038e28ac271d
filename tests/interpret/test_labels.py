"""Labels of regions: files of them, questions, answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mfa_kernels.interpret.labels import (
    Label,
    label_prompt,
    label_regions,
    parse_label,
    read_answers,
    read_labels,
    write_labels,
    write_prompts,
)
from mfa_kernels.interpret.regions import region_summaries
from tests.interpret.planted import Words


def test_what_is_written_is_read(tmp_path: Path) -> None:
    labels = {3: Label("cats & dogs", "Pets.", "ann"), 0: Label("x")}
    assert read_labels(write_labels(tmp_path / "labels.json", labels), 4) == labels


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"format": "other", "version": 1, "labels": {}}, "expected 'mfa_kernels.labels'"),
        ({"format": "mfa_kernels.labels", "version": 1, "labels": {"4": {"label": "x"}}}, r"a region in \[0, 4\)"),
        ({"format": "mfa_kernels.labels", "version": 1, "labels": {"x": {"label": "x"}}}, r"a region in \[0, 4\)"),
        (
            {"format": "mfa_kernels.labels", "version": 1, "labels": {"9" * 5000: {"label": "x"}}},
            r"a region in \[0, 4\)",
        ),
        ({"format": "mfa_kernels.labels", "version": 1, "labels": {"1": "x"}}, "must be an object"),
        ({"format": "mfa_kernels.labels", "version": 1, "labels": {"1": {"explanation": "x"}}}, "label"),
        ({"format": "mfa_kernels.labels", "version": 1, "labels": {"1": {"label": 3}}}, "label"),
        ({"format": "mfa_kernels.labels", "version": 2, "labels": {}}, "version 1"),
    ],
)
def test_files_that_hold_no_labels(tmp_path: Path, content: Any, says: str) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says) as told:
        read_labels(tmp_path / "labels.json", 4)
    assert str(tmp_path) in str(told.value)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Pets\nCats and dogs\nin sentences.", Label("Pets", "Cats and dogs in sentences.", "m")),
        ("\n  **Label: Pets**  \n", Label("Pets", "", "m")),
        ("**Label:** Pets", Label("Pets", "", "m")),
        ("Label:\nPets\nThey are.", Label("Pets", "They are.", "m")),
        ("***\nPets", Label("Pets", "", "m")),
        ('Label: "Pets"\nExplanation: They are.', Label("Pets", "They are.", "m")),
        ("x" * 300, Label("x" * 200, "", "m")),
    ],
)
def test_answers(answer: str, label: Label) -> None:
    assert parse_label(answer, "m") == label


def test_an_empty_answer() -> None:
    with pytest.raises(ValueError, match="answer must hold a label"):
        parse_label(" \n ** \nLabel:\n")


def test_a_question_shows_tokens_and_contexts(mfa: Any, store: Any) -> None:
    (summary,) = region_summaries(mfa, store, Words(), [1], 4, 3)
    asked = label_prompt(summary)
    assert all(token.token in asked for token in summary.tokens)
    assert all(f"{c.before}«{c.token}»{c.after}" in asked for c in summary.contexts)


def test_a_labeller_is_asked_once_about_each_region(mfa: Any, store: Any, tmp_path: Path) -> None:
    asked: list[str] = []

    def labeller(question: str) -> str:
        if len(asked) == 2:
            raise RuntimeError("out of money")
        asked.append(question)
        return f"label {len(asked)}\nwhy"

    path = tmp_path / "labels.json"
    options: dict[str, Any] = {"by": "m", "path": path}
    with pytest.raises(RuntimeError, match="out of money"):
        label_regions(labeller, mfa, store, Words(), [2, 0, 3], **options)
    assert read_labels(path, 4) == {2: Label("label 1", "why", "m"), 0: Label("label 2", "why", "m")}
    labels = label_regions(lambda question: "late", mfa, store, Words(), [2, 0, 3, 3], **options)
    assert labels == {2: Label("label 1", "why", "m"), 0: Label("label 2", "why", "m"), 3: Label("late", "", "m")}
    assert read_labels(path, 4) == labels


def test_questions_in_files_and_answers_from_them(mfa: Any, store: Any, tmp_path: Path) -> None:
    written = write_prompts(tmp_path / "questions", mfa, store, Words())
    assert [path.name for path in written] == [f"region-{k}.txt" for k in range(4)]
    (summary,) = region_summaries(mfa, store, Words(), [2], 12, 20)
    assert written[2].read_text() == label_prompt(summary)
    (tmp_path / "questions" / "region-2.answer.txt").write_text("Pets\nCats.")
    assert read_answers(tmp_path / "questions", 4, "ann") == {2: Label("Pets", "Cats.", "ann")}
    for name, text in (("region-7", "x"), ("region-x", "x"), ("region-1", "")):
        wrong = tmp_path / name
        wrong.mkdir()
        (wrong / f"{name}.answer.txt").write_text(text)
        with pytest.raises(ValueError, match=f"{name}.answer.txt"):
            read_answers(wrong, 4)

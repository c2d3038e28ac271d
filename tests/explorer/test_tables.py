"""Tables of all regions for other programs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mfa_kernels.explorer import Explorer, region, tables


def test_json_has_every_region_with_its_contexts(explorer: Explorer, tmp_path: Path) -> None:
    tables.write_json(explorer, tmp_path / "regions.json")
    content = json.loads((tmp_path / "regions.json").read_text())
    assert (content["format"], content["version"]) == ("mfa_kernels.regions", 1)
    assert [line["component"] for line in content["regions"]] == explorer.owning
    for line in content["regions"]:
        shown = region.contexts(explorer, line["component"], "responsibility", 0, 5)["contexts"]
        assert len(line["contexts"]) == len(shown)
        for found, context in zip(line["contexts"], shown):
            text = "".join(token["text"] for token in context["tokens"])
            assert found["before"] + found["token"] + found["after"] == text
        assert sum(line["genres"].values()) == pytest.approx(1.0)


def test_csv_has_a_line_for_each_region(explorer: Explorer, tmp_path: Path) -> None:
    tables.write_csv(explorer, tmp_path / "regions.csv")
    with open(tmp_path / "regions.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["component"]) for line in lines] == list(range(8))
    assert lines[1]["label"] == "of <b>one</b>"
    for k, line in enumerate(lines):
        assert int(line["rows"]) == int(explorer.assigned.counts[k])
        assert line["genre"] in ("", *explorer.texts.genres)


def test_no_text_becomes_a_formula_of_a_spreadsheet(explorer: Explorer, tmp_path: Path) -> None:
    explorer.catalog.labels[0] = '=HYPERLINK("http://evil.example")'
    tables.write_csv(explorer, tmp_path / "regions.csv")
    with open(tmp_path / "regions.csv", newline="") as file:
        assert next(csv.DictReader(file))["label"].startswith("'=")

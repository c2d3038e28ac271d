"""Figures are written whole, are legible, and place what belongs together together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.interpret import assignments, figures, region_scatter, region_summaries, regions_map
from mfa_kernels.interpret.figures import KINDS, token_kind
from tests.interpret.planted import MemoryStore, Words, planted

pytest.importorskip("matplotlib")
WORDS = Words()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn."""
    kept: list[Any] = []
    make = figures._figure

    def remember(width: float, height: float) -> Any:
        kept.append(make(width, height)[0])
        return kept[-1], kept[-1].axes[0]

    monkeypatch.setattr(figures, "_figure", remember)
    return kept


def _is_a_picture(path: Path) -> bool:
    from matplotlib.image import imread

    picture = imread(path)
    return picture.shape[0] > 500 and picture.shape[1] > 500 and len(set(picture[..., 0].ravel().tolist())) > 10


def _labels(figure: Any) -> list[Any]:
    from matplotlib.text import Annotation

    return [text for text in figure.axes[0].texts if isinstance(text, Annotation)]


def test_a_map_of_many_regions(tmp_path: Path, drawn: list[Any]) -> None:
    mfa, store, _ = planted(1000, components=40)
    summaries = region_summaries(mfa, store, WORDS, n_contexts=0, progress=False)
    path = regions_map(mfa, summaries, tmp_path / "map.png", labelled=range(0, 40, 4), title="$a_{$")
    assert path == tmp_path / "map.png"
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]
    assert _is_a_picture(path)
    axes = drawn[0].axes[0]
    assert axes.get_title() == "$a_{$"
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    labels = _labels(drawn[0])
    assert [label.get_text().split("#")[1] for label in labels if label.get_text()] == [
        str(s.component) for s in sorted(summaries, key=lambda s: -s.rows) if s.component % 4 == 0 and s.rows
    ]
    boxes = [label.get_bbox_patch().get_window_extent() for label in labels]
    frame = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert frame.x0 - 5 < box.x0 < box.x1 < frame.x1 + 5
        assert frame.y0 - 5 < box.y0 < box.y1 < frame.y1 + 5


def test_the_inside_of_a_region(mfa: Any, store: Any, tmp_path: Path, drawn: list[Any]) -> None:
    store.documents = [[(5, 4, 6)[i % 3] for i in d] for d in store.documents]  # "$x_{$", "<script>", "_"
    path = region_scatter(mfa, store, 3, tmp_path / "in.png", tokenizer=WORDS, axes=(1, 0), progress=False)
    assert _is_a_picture(path)
    assert [p.name for p in tmp_path.iterdir()] == ["in.png"]
    axes = drawn[0].axes[0]
    assert "z[1]" in axes.get_xlabel()
    assert "z[0]" in axes.get_ylabel()
    count = len(assignments(mfa, store, progress=False).rows(3))
    assert f"{count}" in axes.get_title()
    entries = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sum(int(entry.split("  ")[1].replace(",", "")) for entry in entries) == count
    assert len(entries) == 3
    assert all("⟦" in label.get_text() for label in _labels(drawn[0]))
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == count


def test_rare_tokens_are_drawn_as_others(mfa: Any, store: Any, tmp_path: Path, drawn: list[Any]) -> None:
    vocabulary = Words([f"w{i}" for i in range(40)])
    store.documents = [[(7 * i + j) % 40 for j, i in enumerate(d)] for d in store.documents]
    region_scatter(mfa, store, 2, tmp_path / "in.png", tokenizer=vocabulary, progress=False)
    entries = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert len(entries) == 7
    assert entries[-1].startswith(" other")


def test_a_figure_replaces_the_one_before_and_leaves_no_state(mfa: Any, store: Any, tmp_path: Path) -> None:
    known = "matplotlib.pyplot" in sys.modules
    path = tmp_path / "deeper" / "in.png"
    for k in (1, 2):
        region_scatter(mfa, store, k, path, tokenizer=WORDS, progress=False)
    assert _is_a_picture(path)
    assert [p.name for p in path.parent.iterdir()] == ["in.png"]
    assert known or "matplotlib.pyplot" not in sys.modules


def test_bad_input_is_named(mfa: Any, store: Any, tmp_path: Path) -> None:
    options = {"tokenizer": WORDS, "progress": False}
    with pytest.raises(ValueError, match="two different latents"):
        region_scatter(mfa, store, 0, tmp_path / "x.png", axes=(1, 1), **options)
    with pytest.raises(IndexError, match=r"axes must be in \[0, 2\), got 2"):
        region_scatter(mfa, store, 0, tmp_path / "x.png", axes=(0, 2), **options)
    with pytest.raises(ValueError, match="at least 3 regions"):
        regions_map(mfa, region_summaries(mfa, store, WORDS, [0, 1], progress=False), tmp_path / "x.png")
    with torch.no_grad():
        mfa.means[1] = 1e4
    with pytest.raises(ValueError, match="component 1 is the most responsible for no row"):
        region_scatter(mfa, store, 1, tmp_path / "x.png", **options)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mfa, store, _ = planted()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"mfa_kernels\[report\]"):
        region_scatter(mfa, store, 0, tmp_path / "x.png", tokenizer=WORDS, progress=False)


@pytest.mark.parametrize(
    ("token", "kind"),
    [("·the", 0), ("⏎class", 0), ("ing", 1), ("don't", 1), ("·12", 2), (").", 3), ("·+=", 3), ("⏎···", 4), ("x1", 5)],
)
def test_kinds_of_tokens(token: str, kind: int) -> None:
    assert token_kind(token) == KINDS[kind]


def test_the_layout_keeps_neighbors_together() -> None:
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(8).repeat_interleave(8)
    points = 5 * torch.randn(8, 30, generator=generator)[cluster] + torch.randn(64, 30, generator=generator)
    places = figures.tsne(points.double())
    nearest = torch.cdist(places, places).fill_diagonal_(torch.inf).argmin(1)
    assert (cluster[nearest] == cluster).float().mean() > 0.95
    assert torch.equal(places, figures.tsne(points.double()))


def test_equal_centroids_are_drawn_apart() -> None:
    radii = torch.full((30,), 6.0)
    places = figures._separate(figures.tsne(torch.ones(30, 5).double()), radii)
    assert torch.cdist(places, places).fill_diagonal_(torch.inf).min() > 11


def test_labels_are_spread_out() -> None:
    points = torch.tensor([[0.0, 0.0]] * 50 + [[10.0, 0.0], [0.0, 10.0], [10.01, 0.0]])
    assert figures._spread(points, 9) == [51, 52]  # not the middle, nor the twin of another
    assert figures._spread(points, 1) == [51]
    assert figures._spread(points[:5], 9) == []


def test_one_row_is_a_region_too(tmp_path: Path) -> None:
    mfa = MFA.from_parameters(torch.tensor([[0.0, 0], [9, 9]]), torch.ones(2, 2, 2), torch.ones(2), torch.ones(2))
    store = MemoryStore(torch.tensor([[0.0, 0.1], [9.0, 9.0], [9.1, 9.0]]), [[0, 1, 2]])
    assert _is_a_picture(region_scatter(mfa, store, 0, tmp_path / "x.png", tokenizer=WORDS, progress=False))


def test_a_map_takes_summaries_and_writes_a_png(mfa: Any, store: Any, tmp_path: Path) -> None:
    for wrong, message in ((store, "summaries must be what"), ([3], r"summaries\[0\] must be a RegionSummary, got 3")):
        with pytest.raises(TypeError, match=message):
            regions_map(mfa, wrong, tmp_path / "map.png")
    for draw in (
        lambda path: regions_map(mfa, [], path),
        lambda path: region_scatter(mfa, store, 0, path, tokenizer=WORDS, progress=False),
    ):
        with pytest.raises(ValueError, match="path must end in .png"):
            draw(tmp_path / "map.xyz")
    with pytest.raises(TypeError, match="tokenizer must be one of transformers, got NoneType"):
        region_scatter(mfa, store, 0, tmp_path / "in.png", tokenizer=None, progress=False)
    assert not list(tmp_path.iterdir())

"""The report: one file, nothing loaded, nothing run, everything escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.data import tiny_lm
from mfa_kernels.data.language_model import hidden_states
from mfa_kernels.data.store import ActivationStore, ActivationStoreWriter
from mfa_kernels.interpret import assignments, logit_lens, region_summaries, write_report
from mfa_kernels.interpret import figures as figure_module
from mfa_kernels.interpret.head import Head
from mfa_kernels.interpret.neighbors import Centroids
from mfa_kernels.interpret.report import _Html, _tag
from tests.interpret.planted import MemoryStore, Words, planted

WORDS = Words()
HOSTILE = Words(
    ['<script>alert("1")</script>', "</style><img src=x onerror=alert(1)>", "\n&amp;", "' onclick='", "\ud800"]
)
TAGS = "html head meta title style body h1 h2 h3 p div table thead tbody tr th td b a code small span mark section"


class _Page(HTMLParser):
    """Elements, attributes and text of a page that is checked to be balanced."""

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def inside(self, tag: str) -> list[str]:
        return [text for name, text in self.text if name == tag]


def _report(path: Path, mfa: MFA, store: Any, tokenizer: Any = WORDS, **options: Any) -> _Page:
    assert write_report(path, mfa, store, tokenizer, **{"figures": False, "progress": False, **options}) == path
    assert list(path.parent.iterdir()) == [path]
    return _Page(path)


def test_a_page_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mfa, store, _ = planted()
    page = _report(tmp_path / "report.html", mfa, store, components=[3, 1], figures=True)
    assert len(page.all("img")) == 3
    for image in page.all("img"):
        assert (image["src"] or "").startswith("data:image/png;base64,iVBOR")
        assert image["alt"]
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert ids == {"region-3", "region-1"}
    assert {a["href"] for a in page.all("a")} <= {f"#{i}" for i in ids}
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    style = page.inside("style")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in (policy or "")


def test_everything_is_escaped(mfa: Any, store: Any, tmp_path: Path) -> None:
    store.documents = [[i % len(HOSTILE.vocabulary) for i in d] for d in store.documents]
    store.meta = {"model": "<b>model", "layer": 3}  # type: ignore[attr-defined]
    page = _report(tmp_path / "report.html", mfa, store, HOSTILE, title="<i>title</i>")
    assert {tag for tag, _ in page.tags} <= set(TAGS.split())
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert" in text
    assert "&lt;i&gt;title&lt;/i&gt;" in text
    assert "&lt;b&gt;model" in text
    assert '<script>alert("1")</script>' in page.inside("mark")  # what a reader sees


def test_a_page_tells_what_the_parts_found(mfa: Any, store: Any, tmp_path: Path) -> None:
    a = assignments(mfa, store, progress=False)
    page = _report(tmp_path / "report.html", mfa, store, components=[2, 0], assigned=a, n_contexts=4)
    cells = " ".join(page.inside("td"))
    assert "4, of which 0 own none of these tokens" in cells
    assert "400, of which 2 not finite and left out" in cells
    headings = page.inside("h2")
    for heading, s in zip(headings, region_summaries(mfa, store, WORDS, [2, 0], assigned=a, progress=False)):
        assert heading == f"Region {s.component}: {s.rows:,} tokens, {s.share:.2%} of all"
        assert {t.token for t in s.tokens} <= set(page.inside("code"))
    # per region: 4 contexts and two axes of three times three contexts; in the table, one context per region
    assert len(page.inside("mark")) == 2 * (4 + 2 * 9) + 2
    longest = mfa.loadings[2].norm(dim=0).argmax()
    assert page.inside("h3")[0].startswith(f"Latent z[{int(longest)}], from -")
    assert page.inside("h3")[0].endswith(" standard deviations")


def test_numbers_of_a_page_have_their_units(tmp_path: Path) -> None:
    """Distances of neighbours are those of their centroids, and what the lens says of a token is beside it."""
    model, tokenizer = tiny_lm.load()
    mfa = MFA(5, 256, 2)
    store = MemoryStore(mfa.sample(60, torch.Generator().manual_seed(0)), [[5, 6, 7] * 20])
    page = _report(tmp_path / "report.html", mfa, store, tokenizer, model=model, components=[2], n_axes=1)
    apart = (mfa.means - mfa.means[2]).norm(dim=1).sort().values[1:].tolist()
    small = page.inside("small")
    assert small[-4:] == [f"{distance:.3g}" for distance in apart]
    assert any("Euclidean distance between centroids" in text for text in page.inside("p"))
    lens = logit_lens(model, mfa, 2, top=8, tokenizer=tokenizer)
    said = [f"{change.change:+.1f}" for change in (*lens.top, *lens.bottom)]
    assert any(small[i : i + len(said)] == said for i in range(len(small)))
    note = page.inside("p")[0]
    assert "in nats" in note
    assert "arbitrary" in note
    assert "z_" not in note


@pytest.mark.parametrize(
    ("model", "shown"),
    [("/home/me/models/tiny", "local:tiny"), (r"C:\me\tiny", "local:tiny"), ("maker/model-2b", "maker/model-2b")],
)
def test_a_page_does_not_tell_folders(mfa: Any, store: Any, tmp_path: Path, model: str, shown: str) -> None:
    store.meta = {"model": model, "layer": 3}  # type: ignore[attr-defined]
    cells = _report(tmp_path / "report.html", mfa, store).inside("td")
    assert shown in cells
    assert model == shown or model not in cells


def test_regions_are_chosen_where_none_are_given(mfa: Any, store: Any, tmp_path: Path) -> None:
    page = _report(tmp_path / "report.html", mfa, store, n_regions=3, n_axes=0)
    assert len(page.inside("h2")) == 3
    assert page.inside("h3") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_small_mixtures_have_reports(tmp_path: Path, rank: int) -> None:
    pytest.importorskip("matplotlib")
    mfa = MFA.from_parameters(torch.zeros(1, 3), torch.ones(1, 3, rank), torch.ones(3), torch.ones(1))
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    page = _report(tmp_path / "report.html", mfa, MemoryStore(x, [list(range(12))] * 2 + [[0] * 6]), figures=True)
    assert len(page.inside("h2")) == 1
    assert len(page.inside("h3")) == rank


def test_a_region_without_rows_is_shown_as_such(mfa: Any, store: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        mfa.means[1] = 1e4
    page = _report(tmp_path / "report.html", mfa, store, components=[1])
    assert page.inside("h2") == ["Region 1: 0 tokens, 0.00% of all"]
    assert "4, of which 1 own none of these tokens" in " ".join(page.inside("td"))


def test_a_report_without_regions_says_so(tmp_path: Path) -> None:
    mfa, store, _ = planted(40)  # fewer rows than a region needs
    page = _report(tmp_path / "report.html", mfa, store)
    assert "No region owns enough tokens to be shown." in page.inside("p")


class _CountingWords(Words):
    def __init__(self) -> None:
        super().__init__()
        self.shown = 0

    def decode(self, ids: Any, **options: object) -> str:
        self.shown += 1
        return super().decode(ids, **options)


@pytest.mark.parametrize("figures", [False, True])
def test_a_page_costs_what_it_shows(figures: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve times as many regions, of as many rows each: the same rows are read, the same neighbours looked for."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figure_module, "_MAP_REGIONS", 20)
    compared: list[int] = []
    squared = Centroids.squared
    monkeypatch.setattr(Centroids, "squared", lambda self, b: compared.append(len(b)) or squared(self, b))
    work = []
    for regions in (30, 360):
        mfa, store, _ = planted(40 * regions, regions)
        a, words = assignments(mfa, store, progress=False), _CountingWords()
        shown = a.counts.argsort(descending=True)[:2].tolist()
        store.asked.clear()
        compared.clear()
        _report(tmp_path / "report.html", mfa, store, words, components=shown, assigned=a, figures=figures)
        assert sum(store.asked) == int(a.counts[shown].sum())  # their rows, once, for a picture and two axes
        assert compared == [2]
        work.append(words.shown)
    few, many = work
    assert many < 1.5 * few


def test_the_lens_of_a_page_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_lm.load()
    mfa = MFA(9, 256, 2)
    store = MemoryStore(mfa.sample(60, torch.Generator().manual_seed(0)), [[5, 6, 7] * 20])
    normed: list[int] = []
    monkeypatch.setattr(
        Head, "normed", lambda self, x, own=Head.normed: normed.append(x.numel() // 256) or own(self, x)
    )
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    _report(tmp_path / "report.html", mfa, store, tokenizer, model=model, components=range(4))
    with_rows = int((assignments(mfa, store, progress=False).counts[:4] > 0).sum())
    assert len(runs) == 1
    assert sum(normed) == 9 + 4 + with_rows * 2 * 2  # all centroids once; those shown; two ends of two axes each


def test_text_becomes_html_in_one_place_only() -> None:
    assert _tag("p", "<", _tag("b", "&"), 1, class_='"') == '<p class="&quot;">&lt;<b>&amp;</b>1</p>'
    assert isinstance(_tag("p"), _Html)


def test_an_unknown_region_is_named(mfa: Any, store: Any, tmp_path: Path) -> None:
    with pytest.raises(IndexError, match=r"components must be in \[0, 4\), got 9"):
        write_report(tmp_path / "report.html", mfa, store, WORDS, components=[9], progress=False)
    assert not list(tmp_path.iterdir())


def test_a_real_model_and_store(tmp_path: Path) -> None:
    model, tokenizer = tiny_lm.load()
    text = "def read(self, path):\n    with open(path) as file:\n        return file.read()\n\n\n" * 6
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    layers: list[torch.Tensor] = []
    handle = model.model.layers[2].register_forward_hook(lambda m, i, output: layers.append(hidden_states(output)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    x = layers[0][0, 1:]
    with ActivationStoreWriter(tmp_path / "store", x.shape[1]) as writer:
        writer.add_document(ids[0], torch.arange(1, ids.shape[1]), x)
    store = ActivationStore(tmp_path / "store")
    mfa = MFA.from_centroids(
        x[:40:4].clone(), 2, noise_variance=float(x.var(0).mean()), generator=torch.Generator().manual_seed(0)
    )
    (tmp_path / "out").mkdir()
    page = _report(tmp_path / "out" / "report.html", mfa, store, tokenizer, model=model, components=range(3))
    cells = page.inside("td")
    assert sum(cell.endswith("raised") for cell in cells) == cells.count("lowered") >= 3
    assert page.inside("mark")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", (tmp_path / "out" / "report.html").read_text())


def test_arguments_in_another_order_are_named(mfa: Any, store: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    for given, message in (
        ((mfa, path, store, WORDS), "path must be a path"),
        ((path, store, mfa, WORDS), r"mfa must be a mixture \(mfa_kernels.MFA\), got MemoryStore"),
        ((path, mfa, WORDS, store), "tokenizer must be one of transformers, got MemoryStore"),
        ((path, mfa, store, None), "tokenizer must be one of transformers, got NoneType"),
        ((path, mfa, mfa, WORDS), "store must be an ActivationStore, as `harvest` makes it, got MFA"),
    ):
        with pytest.raises(TypeError, match=message):
            write_report(*given, progress=False)  # type: ignore[arg-type]
    for option in ("model", "title", "assigned"):
        with pytest.raises(TypeError, match=f"{option} must be "):
            write_report(path, mfa, store, WORDS, progress=False, **{option: 3})
    assert not list(tmp_path.iterdir())

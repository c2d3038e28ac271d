"""A mixture on one page: a self-contained HTML file that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mfa_kernels.common import checks
from mfa_kernels.common.files import StrPath, atomic_write_text, check_writable
from mfa_kernels.common.places import PAGE, check_place
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.common.sharing import shareable
from mfa_kernels.interpret.contexts import (
    Assignments,
    Context,
    along_axis,
    check_tokenizer,
    ensure_assignments,
    region_latents,
)
from mfa_kernels.interpret.figures import draw_region, on_map, regions_map
from mfa_kernels.interpret.labels import Label, check_labels
from mfa_kernels.interpret.lens import Lens, LogitLens, TokenChange
from mfa_kernels.interpret.neighbors import neighbors
from mfa_kernels.interpret.regions import RegionSummary, interesting_regions, region_summaries

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore
    from mfa_kernels.mixture.mfa import MFA

_LENS_TOKENS = 8
_AXIS_CONTEXTS = 3
_NEIGHBORS = 6


def write_report(
    path: StrPath,
    mfa: MFA,
    store: ActivationStore,
    tokenizer: Any,
    *,
    model: nn.Module | None = None,
    components: Sequence[int] | None = None,
    n_regions: int = 12,
    n_contexts: int = 6,
    n_axes: int = 2,
    figures: bool = True,
    title: str = "Regions of a mixture of factor analyzers",
    labels: Mapping[int, Label] | None = None,
    assigned: Assignments | None = None,
    progress: bool = True,
) -> Path:
    """Writes what a mixture's regions are about, as one HTML file with its images inside.

    For each region: the tokens that set it apart, contexts, what its centroid does to the next token, the contexts at
    the extremes of its longest latent axes, and the regions nearest to it.

    Args:
        path: of the HTML file; one that is there is replaced.
        mfa: the mixture.
        store: activations with their tokens.
        tokenizer: the Hugging Face tokenizer of these tokens.
        model: the language model, for the logit lens; left out when None.
        components: the regions to show; `interesting_regions` chooses when None.
        n_regions: how many of these at most.
        n_contexts: contexts per region.
        n_axes: latent axes per region, those along which the region extends most (largest |w_j|).
        figures: with a map of the regions and a picture of the inside of each (needs matplotlib).
        title: of the page.
        labels: what regions are called, shown in their headings; see `mfa_kernels.interpret.labels`.
        assigned: what `assignments` returned; computed here when None.
        progress: show progress bars.

    Returns:
        The path.

    Raises:
        FileExistsError: something else than an HTML page is at the path, or it is in the folder of a store.
    """
    check_place(checks.check_path(path, "path"), PAGE, "path")
    check_writable(path, "path")
    checks.check_mixture(mfa)
    check_tokenizer(tokenizer)
    checks.check_text(title, "title")
    labels = {} if labels is None else check_labels(labels)
    if model is not None:
        checks.check_model(model)
    figures, progress = checks.check_flag(figures, "figures"), checks.check_flag(progress, "progress")
    n_regions = checks.check_integer(n_regions, "n_regions", 1)
    n_contexts, n_axes = checks.check_integer(n_contexts, "n_contexts"), checks.check_integer(n_axes, "n_axes")
    assigned = ensure_assignments(mfa, store, assigned, progress)
    options: dict[str, Any] = {"assigned": assigned, "progress": progress}
    if components is None:
        components = interesting_regions(mfa, store, n_regions, **options)
    shown = checks.check_components(components, mfa.n_components)
    around: dict[int, dict[int, float]] = {}  # distances by component
    if mfa.n_components > 1:
        count = min(_NEIGHBORS, mfa.n_components - 1)
        found = neighbors(mfa, count, components=shown, progress=progress)
        around = {k: dict(zip(near, far)) for k, near, far in zip(shown, *(part.tolist() for part in found))}
    # Besides the regions shown, their neighbours are named, and as many others as the map has room for.
    drawn = on_map(assigned.counts, shown) if figures else []
    named = dict.fromkeys([*drawn, *(j for nearest in around.values() for j in nearest)])
    others = {s.component: s for s in region_summaries(mfa, store, tokenizer, list(named), 1, 0, **options)}
    summaries = region_summaries(mfa, store, tokenizer, shown, 8, n_contexts, **options)
    names = {k: s.tokens[0].token if s.tokens else "" for k, s in others.items()}
    names |= {k: labels[k].label for k in others if k in labels}
    lens = None if model is None else Lens(model, mfa)

    parts = [_tag("h1", title), _facts(mfa, store, assigned), _how_to_read(model is not None)]
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        if len(drawn) >= 3:
            regions_map(mfa, [others[k] for k in drawn], image, labelled=shown)
            parts.append(_image(image, "Map of the regions: near centroids are near, labelled by their tokens"))
        parts.append(_overview(summaries) if shown else _tag("p", "No region owns enough tokens to be shown."))
        for summary in progress_bar(summaries, desc="report", unit="region", progress=progress):
            k = summary.component
            body = [_tokens(summary), _contexts(summary.contexts)]
            if lens is not None:
                read = lens.read(k, None, _LENS_TOKENS, tokenizer)
                body.append(_lens("Next token, by the centroid", read))
            axes = _longest_axes(mfa, k, n_axes) if summary.rows else []
            is_pictured = figures and mfa.rank > 1 and summary.rows > 0
            z = region_latents(mfa, store, k, assigned) if axes or is_pictured else torch.empty(0, 0)
            if is_pictured:
                first, second = _longest_axes(mfa, k, 2)
                draw_region(
                    store, tokenizer, assigned.rows(k), z[:, [first, second]], (first, second), image,
                    title=f"Inside region {k}: {summary.rows:,} tokens",
                )  # fmt: skip
                body.append(_image(image, f"Tokens of region {k} in its two longest latent axes"))
            for axis in axes:
                body.append(_axis(store, tokenizer, lens, k, axis, assigned.rows(k), z[:, axis]))
            body.append(_near(around.get(k, {}), names, shown))
            heading = f"Region {k}: {_share(summary)}"
            if k in labels:
                heading = f"{labels[k].label} (region {k}: {_share(summary)})"
                body.insert(0, _tag("p", labels[k].explanation, class_="note"))
            parts.append(_tag("section", _tag("h2", heading), *body, id=f"region-{k}"))
    atomic_write_text(path, _page(title, parts))
    return Path(path)


class _Html(str):
    """Text that is HTML already; `_tag` escapes any other."""


def _tag(name: str, *children: Any, **attributes: Any) -> _Html:
    """An element. Children and attribute values are escaped, but for those that `_tag` made; `class_` is class."""
    inside = "".join(child if isinstance(child, _Html) else html.escape(str(child)) for child in children)
    given = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    return _Html(f"<{name}{given}>{inside}</{name}>" if name != "img" else f"<img{given}>")


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]], class_: str) -> _Html:
    body = [_tag("tr", *(_tag("td", cell) for cell in row)) for row in rows]
    header = [_tag("thead", _tag("tr", *(_tag("th", cell) for cell in head)))] if head else []
    return _tag("div", _tag("table", *header, _tag("tbody", *body), class_=class_), class_="wide")


def _joined(parts: Sequence[Any], separator: str = " ") -> _Html:
    return _Html(separator.join(part if isinstance(part, _Html) else html.escape(str(part)) for part in parts))


def _token(token: str, **attributes: Any) -> _Html:
    return _tag("code", token, **attributes)


def _share(summary: RegionSummary) -> str:
    return f"{summary.rows:,} tokens, {summary.share:.2%} of all"


def _facts(mfa: MFA, store: ActivationStore, assigned: Assignments) -> _Html:
    meta = getattr(store, "meta", {})
    facts = [(name, meta[name]) for name in ("model", "layer") if meta.get(name) is not None]
    facts = [(name, shareable(str(value)) if name == "model" else value) for name, value in facts]
    facts += [
        ("regions", f"{mfa.n_components:,}, of which {int((assigned.counts == 0).sum()):,} own none of these tokens"),
        ("features", f"{mfa.n_features:,}"),
        ("latents per region", mfa.rank),
        ("tokens", f"{len(assigned.components):,}, of which {assigned.skipped:,} not finite and left out"),
        ("mean responsibility of a token's region", f"{float(assigned.responsibilities.nanmean()):.3f}"),
    ]
    return _table([], [(_tag("b", name), value) for name, value in facts], "facts")


def _how_to_read(lens: bool) -> _Html:
    text = (
        "A token belongs to the region with the largest responsibility for it. Tokens of a region are ordered by how "
        "much they set it apart from the whole; ×10 is ten times as frequent as overall. Contexts come by "
        "responsibility, and among equals by Mahalanobis distance to the centroid, nearest first. A latent z is in "
        "prior standard deviations: 0 at the centroid, mostly within -2 and 2. A fit gives it the sign that makes its "
        "largest loading positive; the order of the latents is arbitrary. Spaces are shown as ·, line ends as ⏎ and "
        "tabs as ⇥."
    )
    if lens:
        text += (
            " Next tokens come from the final norm and the unembedding applied where the mixture lives, later layers "
            "left out: for a centroid, its logits less the average region's; for a latent, the logits at z = +1 less "
            "those at z = -1; the number after a token is that difference, in nats."
        )
    return _tag("p", text, class_="note")


def _image(path: Path, description: str) -> _Html:
    data = base64.b64encode(path.read_bytes()).decode()
    return _tag("img", src=f"data:image/png;base64,{data}", alt=description)


def _overview(summaries: Sequence[RegionSummary]) -> _Html:
    rows = [
        (
            _tag("a", s.component, href=f"#region-{s.component}"),
            _share(s),
            _joined([_token(t.token) for t in s.tokens]),
            _sentence(s.contexts[0]) if s.contexts else "",
        )
        for s in summaries
    ]
    return _table(("region", "size", "tokens", "context nearest to the centroid"), rows, "overview")


def _sentence(context: Context) -> _Html:
    return _tag("span", context.before, _tag("mark", context.token), context.after, class_="text")


def _tokens(summary: RegionSummary) -> _Html:
    return _tag(
        "p",
        *(
            _tag(
                "span",
                _token(t.token, title=f"{t.count} of its {t.total} occurrences are here"),
                _tag("small", f"×{t.lift:,.3g}"),
                class_="chip",
            )
            for t in summary.tokens
        ),
    )


def _contexts(contexts: Sequence[Context], score: bool = False) -> _Html:
    rows = [(*([f"{c.score:+.2f}"] if score else []), c.before, _tag("mark", c.token), c.after) for c in contexts]
    return _table([], rows, "contexts scored" if score else "contexts")


def _lens(name: str, lens: LogitLens) -> _Html:
    def tokens(changes: Sequence[TokenChange]) -> _Html:
        return _joined(
            [_tag("span", _token(c.token), _tag("small", f"{c.change:+.1f}"), class_="chip") for c in changes]
        )

    return _table([], [(f"{name}: raised", tokens(lens.top)), ("lowered", tokens(lens.bottom))], "lens")


def _longest_axes(mfa: MFA, component: int, n: int) -> list[int]:
    return mfa.loadings.detach()[component].float().norm(dim=0).argsort(descending=True)[:n].tolist()


def _axis(
    store: ActivationStore, tokenizer: Any, lens: Lens | None, k: int, axis: int, rows: Tensor, z: Tensor
) -> _Html:
    low, middle, high = along_axis(store, tokenizer, k, rows, z, _AXIS_CONTEXTS, (0.0, 0.5, 1.0))
    parts = [_tag("h3", f"Latent z[{axis}], from {low.value:+.2f} to {high.value:+.2f} standard deviations")]
    parts.append(_contexts([*low.contexts, *middle.contexts, *high.contexts], score=True))
    if lens is not None:
        parts.append(_lens(f"Next token, by z[{axis}]", lens.read(k, axis, _LENS_TOKENS, tokenizer)))
    return _tag("div", *parts)


def _near(distances: dict[int, float], names: dict[int, str], shown: Sequence[int]) -> _Html:
    def name(k: int) -> _Html:
        number = _tag("a", k, href=f"#region-{k}") if k in shown else _tag("span", k)
        return _tag("span", number, " ", _token(names[k]), _tag("small", f"{distances[k]:.3g}"), class_="chip")

    what = "Nearest regions, with the Euclidean distance between centroids in the units of the activations: "
    return _tag("p", what, *map(name, distances)) if distances else _Html("")


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #66666b; --page: #ffffff; --line: #e1e1e6; --chip: #f1f1f4;
        --mark: #ffe08a; --link: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --soft: #a0a0a8; --page: #17171a; --line: #35353b; --chip: #26262b; --mark: #6b5200;
          --link: #7db8f5; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 0; } h3 { font-size: 1rem; margin: 1.5rem 0 0.3rem; }
a { color: var(--link); } .note, small { color: var(--soft); } small { margin-left: 0.25em; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; padding-top: 1.5rem; }
img { display: block; max-width: 100%; margin: 1rem auto; border-radius: 8px; background: #ffffff; }
section img { max-width: 40rem; width: 100%; }
code, mark, .text, .contexts td { font: 0.88rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
code { background: var(--chip); border-radius: 4px; padding: 0.1em 0.3em; }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0.1em 0.15em; }
.chip { display: inline-block; margin: 0 0.7em 0.3em 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: 0.2rem 0.7rem 0.2rem 0; text-align: left; vertical-align: top; }
.overview { width: 100%; } .overview td, .overview th { border-bottom: 1px solid var(--line); padding-block: 0.45rem; }
.contexts { width: 100%; table-layout: fixed; } .contexts td { padding: 0.1rem 0; }
.contexts td:nth-last-child(3) { text-align: right; width: 44%; }
.contexts td:nth-last-child(2) { text-align: center; width: 16%; }
.scored td:first-child { width: 4rem; color: var(--soft); }
.lens td:first-child { white-space: nowrap; color: var(--soft); text-align: right; } .lens { margin-top: 0.8rem; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _page(title: str, parts: Sequence[_Html]) -> str:
    head = _joined(
        [
            _Html('<meta charset="utf-8">'),
            _Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            _Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            _tag("title", title),
            _Html(f"<style>{_STYLE}</style>"),
        ],
        "\n",
    )
    body = _tag("body", _joined(parts, "\n"))
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n{body}\n</html>\n'

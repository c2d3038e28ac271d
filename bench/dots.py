"""Values with intervals as an SVG file, drawn by hand: the same numbers give the same bytes, on any machine."""

from __future__ import annotations

from html import escape
from pathlib import Path

from bench.curves import COLORS
from mfa_kernels.common.files import atomic_write_text
from mfa_kernels.evaluation import comparison

_PANEL, _ROW, _NAMES, _TOP, _GAP = 200, 18, 96, 52, 16


def svg(panels: dict[str, dict[str, tuple[float, float, float]]], title: str) -> str:
    """Panels side by side, from 0 to 1 each, with a row for each name.

    Args:
        panels: by title, by name: a value and the two ends of its interval.
        title: above.
    """
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    width = _NAMES + len(panels) * (_PANEL + _GAP)
    bottom = _TOP + _ROW * len(names)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 30}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{bottom + 30}" fill="white"/>',
        f'<text x="{width / 2}" y="16" text-anchor="middle" font-size="13">{escape(title)}</text>',
    ]
    for row, name in enumerate(names):
        out.append(f'<text x="{_NAMES - 6}" y="{_TOP + _ROW * row + 13}" text-anchor="end">{escape(name)}</text>')
    for number, (about, panel) in enumerate(panels.items()):
        left = _NAMES + number * (_PANEL + _GAP)
        out.append(f'<text x="{left + _PANEL / 2}" y="40" text-anchor="middle">{escape(about)}</text>')
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
            x = left + tick * _PANEL
            out.append(f'<path d="M{x} {_TOP}V{bottom}" stroke="#ddd"/>')
            if tick in (0.0, 0.5, 1.0):
                out.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
        for row, name in enumerate(names):
            if name not in panel:
                continue
            value, low, high = (round(left + share * _PANEL, 1) for share in panel[name])
            y = _TOP + _ROW * row + 9
            color = COLORS[5] if name in ("centroids", "regions", "columns") else COLORS[1]
            out.append(f'<path d="M{low} {y}H{high}" stroke="{color}" stroke-width="2"/>')
            out.append(f'<circle cx="{value}" cy="{y}" r="3.5" fill="{color}"/>')
    return "\n".join([*out, "</svg>\n"])


def overview(panels: dict[str, dict[str, tuple[float, float, float]]]) -> str:
    """The same values as a table in Markdown, a column for each panel."""
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    lines = ["| | " + " | ".join(panels) + " |", "|---|" + "---|" * len(panels)]
    for name in names:
        cells = ["{:.3f} ({:.2f} to {:.2f})".format(*panel[name]) if name in panel else "" for panel in panels.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(sites: list[tuple[str, str, list[comparison.Result]]], title: str, figure: Path) -> None:
    """Prints the results of several sites, (name, what is said of it, results), and writes their figure."""
    panels = {}
    for name, about, results in sites:
        print(f"\n**{name}**: {about}\n\n{comparison.table(results)}")
        panels[name] = {one.method: (one.iia, one.low, one.high) for one in results}
    print(f"\n{overview(panels)}")
    atomic_write_text(figure, svg(panels, title))
    print(f"\nwritten: {figure}")

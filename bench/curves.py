"""Curves over time as an SVG file, drawn by hand: the same numbers give the same bytes, on any machine."""

from __future__ import annotations

import math
from html import escape

COLORS = ("#222222", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")  # Okabe and Ito's, after black
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 34, 50
_LEAST = 0.1  # nats above the lowest, the bottom of the figure


def _decades(low: float, high: float) -> list[float]:
    return [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def svg(
    curves: dict[str, list[tuple[float, float]]],
    title: str,
    target: float | None = None,
    *,
    across: str = "seconds, K-means included",
    up: str = "held-out nats",
    above_lowest: bool = False,
) -> str:
    """Curves on logarithmic axes.

    Args:
        curves: by name, points (x, y), in order; a point at x = 0 is left out.
        title: above.
        target: y of a dashed line.
        across, up: what the axes are.
        above_lowest: show y less that of the lowest point of all.
    """
    kept = {name: [p for p in points if p[0] > 0 and math.isfinite(p[1])] for name, points in curves.items()}
    seconds = [p[0] for points in kept.values() for p in points]
    nats = [p[1] for points in kept.values() for p in points]
    if not seconds:
        raise ValueError("curves must have a point at more than 0 seconds")
    lowest = min(nats) if above_lowest else 0.0
    columns = _decades(min(seconds), max(seconds) * 1.0001)
    rows = _decades(_LEAST, max(10 * _LEAST, max(nats) - lowest)) if above_lowest else _decades(min(nats), max(nats))

    def place(value: float, ticks: list[float], begin: float, end: float) -> float:
        share = math.log10(max(value, ticks[0]) / ticks[0]) / max(1e-9, math.log10(ticks[-1] / ticks[0]))
        return round(begin + share * (end - begin), 1)

    def x(value: float) -> float:
        return place(value, columns, _LEFT, _WIDTH - _RIGHT)

    def y(value: float) -> float:
        return place(value - lowest, rows, _HEIGHT - _BOTTOM, _TOP)

    def text(content: str, at_x: float, at_y: float, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{at_x}" y="{at_y}" text-anchor="{anchor}"{more}>{escape(content)}</text>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        text(title, _WIDTH / 2, 20, more=' font-size="14"'),
        text(across, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12),
        text(
            f"{up} above {lowest:.1f}" if above_lowest else up, 18, (_TOP + _HEIGHT - _BOTTOM) / 2,
            more=f' transform="rotate(-90 18 {(_TOP + _HEIGHT - _BOTTOM) / 2})"',
        ),
    ]  # fmt: skip
    for tick in columns:
        out.append(f'<path d="M{x(tick)} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#dddddd"/>')
        out.append(text(f"{tick:g}", x(tick), _HEIGHT - _BOTTOM + 18))
    for tick in rows:
        out.append(f'<path d="M{_LEFT} {y(lowest + tick)}H{_WIDTH - _RIGHT}" stroke="#dddddd"/>')
        out.append(text(f"{tick:g}", _LEFT - 8, y(lowest + tick) + 4, "end"))
    if target is not None:
        out.append(f'<path d="M{_LEFT} {y(target)}H{_WIDTH - _RIGHT}" stroke="#888888" stroke-dasharray="5 4"/>')
    for i, (name, points) in enumerate(kept.items()):
        color = COLORS[i % len(COLORS)]
        path = "L".join(f"{x(s)} {y(n)}" for s, n in points)
        if points:
            out.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>')
            out += [f'<circle cx="{x(s)}" cy="{y(n)}" r="2.5" fill="{color}"/>' for s, n in points]
        out.append(f'<path d="M{_WIDTH - 190} {_TOP + 14 + 18 * i}h24" stroke="{color}" stroke-width="2"/>')
        out.append(text(name, _WIDTH - 160, _TOP + 18 + 18 * i, "start"))
    return "\n".join([*out, "</svg>", ""])


def side_by_side(figures: list[str]) -> str:
    """One figure of several, from left to right."""
    width = len(figures) * _WIDTH
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}">']
    for i, figure in enumerate(figures):
        out.append(figure.strip().replace("<svg ", f'<svg x="{i * _WIDTH}" width="{_WIDTH}" height="{_HEIGHT}" ', 1))
    return "\n".join([*out, "</svg>", ""])

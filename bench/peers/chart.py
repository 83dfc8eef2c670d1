"""The comparisons as a picture: a line of marks each, at how many times as fast as one peer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from xml.sax.saxutils import escape

from bench.peers import summary

# Pixels.
_WIDTH, _LEFT, _RIGHT = 900, 302, 48
_TOP, _ROW, _GROUP, _BOTTOM, _LEGEND = 84, 23, 30, 34, 22
_FONT = 'system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif'
_PAPER, _INK, _GREY, _GRID = "#fcfdfe", "#1c2430", "#6b7686", "#e3e7ec"
_OURS = "#1f5fa8"
_COLOURS = ("#e8833a", "#7a5bc7", "#12a07a", "#c2475b", "#8a7a1f", "#56616f")
# Marks about (0, 0), as paths.
_MARKS = (
    "M-4.5 0L0 -4.5L4.5 0L0 4.5Z",
    "M-4 -4H4V4H-4Z",
    "M-4.8 3.8H4.8L0 -4.6Z",
    "M-4.8 -3.8H4.8L0 4.6Z",
)


def draw(rows: Iterable[Mapping], reference: str) -> str:
    """An SVG document that needs nothing outside of itself; the same for the same rows.

    Args:
        rows: comparisons in order, see :func:`bench.peers.summary.comparisons`. Those in which the
            reference was not timed are left out.
        reference: the peer that stands at 1, on an axis of powers of 2.

    Raises:
        ValueError: none is left.
    """
    rows = [row for row in rows if reference in summary.peer_rows(row)]
    if not rows:
        raise ValueError(f"no comparison with {reference} to draw")
    names = [n for n in summary.peer_names(rows) if n != reference and n not in summary.OURS]
    groups = [(name, list(found)) for name, found in groupby(rows, summary.setting)]
    legend, lines = _legend(names)
    y = top = _TOP + (lines - 1) * _LEGEND
    height = top + len(groups) * _GROUP + len(rows) * _ROW + _BOTTOM
    ratios = [r["ratio"] for row in rows for n, r in summary.peer_rows(row).items()]
    axis = _Axis(min(ratios), max(ratios))
    title = f"Times as fast as {reference}, batch 1 unless said"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" font-family={_quoted(_FONT)}>',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" rx="10" fill="{_PAPER}"/>',
        _text(24, 34, title, 17, weight=600),
        *legend,
        *axis.lines(top, height - _BOTTOM),
    ]
    for name, found in groups:
        y += _GROUP
        parts.append(_text(24, y - 9, name, 12.5, weight=600))
        for row in found:
            parts += _line(row, names, axis, y + _ROW / 2)
            y += _ROW
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """Ratios on a scale of powers of 2 that holds the least and the most."""

    def __init__(self, least: float, most: float):
        self.first = min(-1, math.floor(math.log2(least)))
        self.last = max(1, math.ceil(math.log2(most)))

    def x(self, ratio: float) -> float:
        part = (math.log2(ratio) - self.first) / (self.last - self.first)
        return round(_LEFT + part * (_WIDTH - _LEFT - _RIGHT), 1)

    def lines(self, top: float, bottom: float) -> list[str]:
        parts = []
        for power in range(self.first, self.last + 1):
            x, colour = self.x(2.0**power), _GREY if power == 0 else _GRID
            parts.append(_path(f"M{x} {top}V{bottom}", f'stroke="{colour}"'))
            parts.append(_text(x, bottom + 18, f"{2.0**power:g}", 12, _GREY, "middle"))
        return parts


def _legend(names: Sequence[str]) -> tuple[list[str], int]:
    """Its marks and words, and how many lines they take."""
    parts = [_dot(30, 58, 5.5), _text(41, 62.3, "dass", 12.5)]
    x, line = 90, 0
    for i, name in enumerate(names):
        width = 34 + round(7.1 * len(name))
        if x + width > _WIDTH:
            x, line = 30, line + 1
        y = 58 + line * _LEGEND
        parts += [_mark(i, x, y), _text(x + 10, round(y + 4.3, 1), name, 12.5)]
        x += width
    return parts, line + 1


def _line(row: Mapping, names: Sequence[str], axis: _Axis, y: float) -> list[str]:
    found, mine = summary.peer_rows(row), summary.ours(row)
    end = axis.x(mine["ratio"])
    parts = [
        _text(36, y + 4.3, summary.network(row).removesuffix(", batch 1"), 12.5),
        _text(_LEFT - 14, y + 4.3, f"{row['sparsity']:.0%} zeros", 12.5, _GREY, "end"),
        _path(f"M{axis.x(1)} {y}H{end}", f'stroke="{_OURS}" stroke-width="2.5"'),
    ]
    parts += [
        _mark(i, axis.x(found[name]["ratio"]), y) for i, name in enumerate(names) if name in found
    ]
    free = 11 + max(axis.x(peer["ratio"]) for peer in found.values())
    return [*parts, _dot(end, y, 5.5), _text(free, y + 4.3, f"{mine['ratio']:.1f}", 12.5)]


def _mark(i: int, x: float, y: float) -> str:
    colour, mark = _COLOURS[i % len(_COLOURS)], _MARKS[i % len(_MARKS)]
    return f'<path d="{mark}" transform="translate({x} {y})" fill="{colour}" fill-opacity="0.85"/>'


def _dot(x: float, y: float, radius: float) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{_OURS}"/>'


def _path(d: str, style: str) -> str:
    return f'<path d="{d}" {style} fill="none"/>'


def _text(x: float, y: float, text: str, size: float, fill=_INK, anchor="start", weight=400) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'


def _quoted(text: str) -> str:
    return "'" + text + "'"

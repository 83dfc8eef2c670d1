"""Drawings of a genotype's cells, as SVG that needs nothing outside of itself, and as PNG.

Every node is a column and every edge a row, so that no two edges can lie on each other: an edge
runs from its source's column to the right, through the name of its operation, into its node. The
nodes, numbered as in `dass.space`, descend like stairs; a line from each runs to the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from dass.genotype import CELLS, Edge, Genotype
from dass.space import CONCAT, INPUTS

__all__ = ["draw_png", "draw_svg"]

_NAMES = {0: "c(k-2)", 1: "c(k-1)", **{node: str(node) for node in CONCAT}}
_TITLES = {"normal": "Normal cell", "reduce": "Reduction cell"}

# Pixels.
_MARGIN, _TITLE, _GAP = 30, 52, 26
_INPUT_COLUMN, _COLUMN, _OUTPUT_COLUMN = 66, 172, 76
_TOP, _ROW, _NODE_GAP = 46, 33, 14
_PILL_WIDTH, _PILL_HEIGHT, _PILL_TO_NODE, _RADIUS = 112, 24, 40, 15
_CELL_HEIGHT = _TOP + 7 * _ROW + 3 * _NODE_GAP + 20
_WIDTH = 2 * _MARGIN + 2 * 30 + _INPUT_COLUMN + 4 * _COLUMN + _OUTPUT_COLUMN

# Kind of operation -> (fill, border and text).
_COLOURS = {
    "none": ("#f1f3f5", "#868e96"),
    "max": ("#fff0e0", "#b8590b"),
    "avg": ("#fff8d6", "#8f6a00"),
    "skip": ("#eceff3", "#4b5768"),
    "sep": ("#e3eeff", "#1b5fc1"),
    "dil": ("#e1f6ee", "#0b7a57"),
}
_PAPER = "#fcfdfe"
_FONT = 'system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif'
_INK, _GREY = "#1c2430", "#c3cad4"
# Class of an element -> CSS.
_STYLES = {
    "title": {"font-size": "17px", "font-weight": "600", "fill": _INK},
    "facts": {"font-size": "12.5px", "fill": "#6b7686"},
    "label": {"font-size": "12.5px", "font-weight": "500"},
    "name": {"font-size": "13px", "font-weight": "600", "fill": _INK},
    "bar": {"stroke": _GREY, "stroke-width": "2.5", "fill": "none"},
    "halo": {"stroke": _PAPER, "stroke-width": "8", "fill": "none"},
    "edge": {"stroke-width": "1.8", "fill": "none"},
    "output": {"stroke": _GREY, "stroke-width": "1.8", "fill": "none"},
    "node": {"fill": "#ffffff", "stroke": "#56616f", "stroke-width": "1.8"},
}


@dataclass(frozen=True)
class _Place:
    """Where the parts of one cell lie; y is its upper edge."""

    y: float

    def column(self, node: int) -> float:
        """x of a node; number 6 is the output."""
        first = _MARGIN + 30 + min(node, 1) * _INPUT_COLUMN
        return first + min(max(node - 1, 0), 4) * _COLUMN + max(node - 5, 0) * _OUTPUT_COLUMN

    def row(self, i: int) -> float:
        """y of edge i of 8."""
        return self.y + _TOP + i * _ROW + i // 2 * _NODE_GAP

    def node(self, node: int) -> float:
        """y of a node: an input stands on top, the others between their two edges."""
        if node < INPUTS:
            return self.y + 4
        first = 2 * (node - INPUTS)
        return (self.row(first) + self.row(first + 1)) / 2


def draw_svg(genotype: Genotype) -> str:
    """Both cells of a genotype as one SVG document.

    Every edge is a ``<g>`` with data-cell, data-node, data-input and data-op.

    Raises:
        TypeError: ``genotype`` is none.
    """
    if not isinstance(genotype, Genotype):
        raise TypeError(f"genotype must be a dass.Genotype, got {type(genotype).__name__}")
    height = 2 * (_TITLE + _CELL_HEIGHT) + _GAP + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img">',
        "<title>Cells of a genotype</title>",
        f"<style>{_css()}</style>",
        f'<rect width="{_WIDTH}" height="{height}" rx="10" fill="{_PAPER}"/>',
    ]
    for i, cell in enumerate(CELLS):
        top = _MARGIN + i * (_TITLE + _CELL_HEIGHT + _GAP)
        parts += _heading(genotype, cell, top)
        parts += _cell(genotype, cell, _Place(top + _TITLE))
    return "\n".join([*parts, "</svg>"]) + "\n"


def draw_png(genotype: Genotype, scale: float = 2.0) -> bytes:
    """The same picture as a PNG file; ``scale`` is its pixels per unit of the SVG.

    Raises:
        TypeError: ``genotype`` is none. ValueError: a scale that is not in (0, 10].
        ImportError: no matplotlib (``pip install "dass[plot]"``).
    """
    if not 0 < scale <= 10:
        raise ValueError(f"scale must be in (0, 10], got {scale!r}")
    from dass.rasters import to_png

    return to_png(draw_svg(genotype), _STYLES, scale)


def _css() -> str:
    rules = [f"text {{ font-family: {_FONT}; }}"]
    for kind, style in _STYLES.items():
        body = " ".join(f"{key}: {value};" for key, value in style.items())
        rules.append(f".{kind} {{ {body} }}")
    return "\n".join(rules)


def _heading(genotype: Genotype, cell: str, top: float) -> list[str]:
    skips, free = genotype.skips()[cell], round(8 * genotype.parameter_free()[cell])
    facts = f"of 8 edges {skips} skip, {free} have no parameters"
    return [
        _text(_MARGIN, top + 8, _TITLES[cell], "title", "start"),
        _text(_WIDTH - _MARGIN, top + 8, facts, "facts", "end"),
    ]


def _cell(genotype: Genotype, cell: str, place: _Place) -> list[str]:
    edges = [edge for node in getattr(genotype, cell) for edge in node]
    parts = []
    for node in _NAMES:
        rows = [place.row(i) for i, edge in enumerate(edges) if edge.input == node]
        if rows:
            x = place.column(node)
            parts.append(_path(f"M{x} {place.node(node)}V{max(rows)}", "bar"))
    parts += [_edge(cell, i, edge, place) for i, edge in enumerate(edges)]
    return [*parts, *_output(place), *(_node(node, place) for node in _NAMES)]


def _edge(cell: str, i: int, edge: Edge, place: _Place) -> str:
    """From its source's upright line to the right, through its name, into its node."""
    node = INPUTS + i // 2
    x, y, end = place.column(edge.input), place.row(i), place.column(node)
    right = end - _PILL_TO_NODE
    left = right - _PILL_WIDTH
    curve = f"C{end - 22} {y} {end - 30} {place.node(node)} {end - _RADIUS} {place.node(node)}"
    fill, ink = _COLOURS[edge.op.split("_")[0]]
    facts = {"cell": cell, "node": node, "input": edge.input, "op": edge.op}
    data = " ".join(f"data-{key}={quoteattr(str(value))}" for key, value in facts.items())
    return "\n".join(
        [
            f"<g {data}>",
            f"<title>{escape(f'{edge.op}: {_NAMES[edge.input]} to {_NAMES[node]}')}</title>",
            _path(f"M{x + 7} {y}H{left}", "halo"),
            _path(f"M{x} {y}H{right}{curve}", "edge", f'stroke="{ink}"'),
            f'<circle cx="{x}" cy="{y}" r="3.4" fill="{ink}"/>',
            f'<rect x="{left}" y="{y - _PILL_HEIGHT / 2}" width="{_PILL_WIDTH}" '
            f'height="{_PILL_HEIGHT}" rx="{_PILL_HEIGHT / 2}" fill="{fill}" stroke="{ink}"/>',
            _text((left + right) / 2, y + 4.3, _label(edge), "label", "middle", f'fill="{ink}"'),
            "</g>",
        ]
    )


def _label(edge: Edge) -> str:
    """The words of an operation; if it has a density fewer words, then the density."""
    words = edge.op.replace("3x3", "3\u00d73").replace("5x5", "5\u00d75")
    if edge.density is None:
        return words.replace("_", " ")
    words = words.replace("_conv", "").replace("_connect", "").replace("_", " ")
    return f"{words} · {100 * edge.density:.3g} %"


def _output(place: _Place) -> list[str]:
    """Lines from the nodes to the upright line of the output, and its name."""
    end, ys = place.column(6), [place.node(node) for node in CONCAT]
    lines = [
        _path(f"M{place.column(node)} {y}H{end}", "output")
        for node, y in zip(CONCAT, ys, strict=True)
    ]
    middle = (ys[0] + ys[-1]) / 2
    return [*lines, _path(f"M{end} {ys[0]}V{ys[-1]}", "bar"), _word(end, middle, "c(k)")]


def _node(node: int, place: _Place) -> str:
    x, y = place.column(node), place.node(node)
    if node < INPUTS:
        return _word(x, y, _NAMES[node])
    circle = f'<circle class="node" cx="{x}" cy="{y}" r="{_RADIUS}"/>'
    return circle + _text(x, y + 4.5, _NAMES[node], "name", "middle")


def _word(x: float, y: float, word: str) -> str:
    """The name of what lies outside the cell, in a box."""
    box = f'<rect class="node" x="{x - 28}" y="{y - 13}" width="56" height="26" rx="6"/>'
    return box + _text(x, y + 4.5, word, "name", "middle")


def _path(d: str, kind: str, more: str = "") -> str:
    return f'<path class="{kind}" d="{d}" {more}/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str, more: str = "") -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place} {more}>{escape(text)}</text>'

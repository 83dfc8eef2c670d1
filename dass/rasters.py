"""Turns the simple SVG of `dass.drawing` into PNG with matplotlib, an optional dependency.

It knows rectangles, circles, paths of M, H, V and C in absolute coordinates, and text.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

_SVG = "{http://www.w3.org/2000/svg}"
_DPI = 100  # at scale 1, where a unit of the SVG is a pixel
_POINT = 72 / _DPI  # points per unit
_ANCHORS = {"start": "left", "middle": "center", "end": "right"}


def to_png(svg: str, styles: Mapping[str, Mapping[str, str]], scale: float) -> bytes:
    """A PNG file of an SVG document.

    Args:
        svg: the document; width and height in units, as numbers.
        styles: class of an element -> its CSS, which an attribute of the element adds to.
        scale: pixels per unit.

    Raises:
        ImportError: no matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    root = ET.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI * scale)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for order, element in enumerate(root.iter()):
        kind = element.tag.removeprefix(_SVG)
        if kind in _DRAW:
            style = {**element.attrib, **styles.get(element.get("class"), {})}
            _DRAW[kind](axes, element, style, order)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor="white", metadata={"Software": None})
    return out.getvalue()


def _shape(axes, patch, style: Mapping[str, str], order: int) -> None:
    line = style.get("stroke", "none")
    patch.set(
        facecolor=style.get("fill", "black"),
        edgecolor=line,
        linewidth=0 if line == "none" else float(style.get("stroke-width", 1)) * _POINT,
        capstyle="butt",
        zorder=order,
    )
    axes.add_patch(patch)


def _rect(axes, element, style, order) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y, w, h, r = (float(element.get(key, 0)) for key in ("x", "y", "width", "height", "rx"))
    box = f"round,pad=0,rounding_size={r}" if r else "square,pad=0"
    _shape(axes, FancyBboxPatch((x, y), w, h, boxstyle=box), style, order)


def _circle(axes, element, style, order) -> None:
    from matplotlib.patches import Circle

    x, y, r = (float(element.get(key)) for key in ("cx", "cy", "r"))
    _shape(axes, Circle((x, y), r), style, order)


def _path(axes, element, style, order) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    points, codes = [], []
    for letter, text in re.findall("([MHVC])([^MHVC]*)", element.get("d")):
        numbers = [float(n) for n in text.split()]
        if letter == "H":
            numbers = [numbers[0], points[-1][1]]
        elif letter == "V":
            numbers = [points[-1][0], numbers[0]]
        code = {"M": Path.MOVETO, "C": Path.CURVE4}.get(letter, Path.LINETO)
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        points += pairs
        codes += [code] * len(pairs)
    _shape(axes, PathPatch(Path(points, codes)), style, order)


def _text(axes, element, style, order) -> None:
    axes.text(
        float(element.get("x")),
        float(element.get("y")),
        element.text,
        color=style.get("fill", "black"),
        fontsize=float(style["font-size"].removesuffix("px")) * _POINT,
        fontweight="bold" if int(style.get("font-weight", 400)) > 500 else "normal",
        horizontalalignment=_ANCHORS[element.get("text-anchor", "start")],
        verticalalignment="baseline",
        zorder=order,
    )


_DRAW = {"rect": _rect, "circle": _circle, "path": _path, "text": _text}

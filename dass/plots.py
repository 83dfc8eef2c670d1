"""Plots for the reports, as SVG that stands inside an HTML page and takes on its text colour.

matplotlib is an optional dependency (``pip install "dass[plot]"``); :func:`available` tells.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Plot", "available", "to_svg"]

_INK = "#010203"  # replaced by currentColor: readable on light and dark pages
_COLOURS = ("#8b95a7", "#2f7ff0", "#12b48b", "#e8833a", "#a463d8", "#d9485f")
_WIDTH = 7.2  # inches


@dataclass(frozen=True)
class Plot:
    """A picture of numbers, drawn only where matplotlib is there.

    Args:
        kind: "bars" (series: name -> one number per category; horizontal, the first on top) or
            "lines" (series: name -> [(x, y), ...]).
        title, x_label, y_label: words; units belong in the labels.
        series: name -> data, in the order of the legend.
        categories: of the bars.
        marks: a dot at each point, with these labels beside those of the first series.
        dashed: series drawn thin and dashed, in the colour of the series after them.
        log_x: a logarithmic x axis, with a tick at each point.
        least_y: the y axis of lines spans at least so much.
    """

    kind: str
    title: str
    series: Mapping[str, Sequence]
    x_label: str = ""
    y_label: str = ""
    categories: Sequence[str] = ()
    marks: Sequence[str] = ()
    dashed: Sequence[str] = ()
    log_x: bool = False
    least_y: float = 0.0

    def to_dict(self) -> dict:
        """Plain JSON types."""
        series = {
            name: [list(v) if isinstance(v, (tuple, list)) else v for v in values]
            for name, values in self.series.items()
        }
        keys = ("kind", "title", "x_label", "y_label", "log_x")
        words = {key: getattr(self, key) for key in keys}
        return {**words, "categories": list(self.categories), "series": series}


def available() -> bool:
    """Whether matplotlib can be imported."""
    return importlib.util.find_spec("matplotlib") is not None


def to_svg(plot: Plot) -> str:
    """One <svg> element without references to anything outside of it.

    Raises:
        ValueError: an unknown kind. ImportError: no matplotlib.
    """
    if plot.kind not in _DRAW:
        raise ValueError(f"unknown kind of plot {plot.kind!r}; known: {', '.join(_DRAW)}")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": plot.title,
        "font.family": "sans-serif",
        "font.size": 9,
        **{key: _INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor")},
        **{key: _INK for key in ("xtick.color", "ytick.color")},
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
    }
    with matplotlib.rc_context(style):
        height = _bars_height(plot) if plot.kind == "bars" else 3.1
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        _DRAW[plot.kind](axes, plot)
        axes.set_title(plot.title, fontsize=10, loc="left", fontweight="bold")
        axes.set_xlabel(plot.x_label)
        axes.set_ylabel(plot.y_label)
        if len(plot.series) > 1:
            axes.legend(frameon=False, fontsize=8.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return embed(out.getvalue())


def _bars_height(plot: Plot) -> float:
    return 1.1 + len(plot.categories) * (0.12 + 0.15 * len(plot.series))


def _bars(axes, plot: Plot) -> None:
    count = len(plot.series)
    thick = 0.8 / count
    for i, (name, values) in enumerate(plot.series.items()):
        places = [n + (i - (count - 1) / 2) * thick for n in range(len(values))]
        axes.barh(places, values, thick * 0.92, label=name, color=_COLOURS[i % len(_COLOURS)])
    axes.set_yticks(range(len(plot.categories)), plot.categories)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.grid(axis="x", color=_INK, alpha=0.12, linewidth=0.6)
    axes.tick_params(axis="y", length=0)


def _lines(axes, plot: Plot) -> None:
    colour = 1  # the first is the grey of dense bars
    for i, (name, points) in enumerate(plot.series.items()):
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        dashed = name in plot.dashed
        style = {"linestyle": "--", "linewidth": 1.0} if dashed else {"linewidth": 1.8}
        marker = "o" if len(points) < 40 else ""
        shade = _COLOURS[colour % len(_COLOURS)]
        size = 2.5 if dashed else 4
        axes.plot(xs, ys, marker=marker, markersize=size, label=name, color=shade, **style)
        colour += not dashed
        if i == 0:
            for x, y, word in zip(xs, ys, plot.marks, strict=False):
                axes.annotate(word, (x, y), (0, 7), textcoords="offset points", ha="center")
    axes.margins(x=0.08, y=0.15)
    if plot.log_x:
        axes.set_xscale("log")
        places = sorted({p[0] for points in plot.series.values() for p in points})
        axes.set_xticks(places, [f"{x:,.0f}" for x in places])
        axes.minorticks_off()
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, high - plot.least_y), high)  # a small step is to look small
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)


_DRAW = {"bars": _bars, "lines": _lines}


def embed(svg: str) -> str:
    """The element alone: no prolog, no metadata, no names of schemas, fonts of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"'[\w .]+'(, '[\w .]+')+, sans-serif", "system-ui, sans-serif", svg)
    return svg.replace(_INK, "currentColor").strip()

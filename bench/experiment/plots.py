"""Held-out accuracy against nonzero multiply-adds and against time, a point per system."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.experiment.summary import Standing

__all__ = ["draw"]

INK = "#222222"


def draw(found: Sequence[Standing], path: Path) -> None:
    """Three panels: nonzeros, nonzero multiply-adds, microseconds by `dass.compile`.

    The bar is the standard deviation over seeds. The same results give the same file.

    Raises:
        ImportError: no matplotlib.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels: list[tuple[str, Callable]] = [
        ("nonzeros", lambda s: [r["nonzeros"] for r in s.results.values()]),
        ("multiply-adds of nonzeros, M", lambda s: _millions(s, "nonzero_macs")),
        ("us by dass.compile, batch 1, one thread", lambda s: s.us("compile")),
    ]
    style = {"svg.hashsalt": path.name, "svg.fonttype": "none", "font.size": 8}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, len(panels), sharey=True)
        for axis, (label, of) in zip(axes, panels, strict=True):
            _panel(axis, found, label, of)
        axes[0].set_ylabel("held out, %")
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None})
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def _millions(standing: Standing, key: str) -> list[float]:
    return [r[key] / 1e6 for r in standing.results.values()]


def _panel(axis, found: Sequence[Standing], label: str, of: Callable) -> None:
    for i, s in enumerate(found):
        xs, ys = of(s), list(s.accuracies.values())
        if xs:
            error = statistics.stdev(ys) if len(ys) > 1 else 0.0
            axis.errorbar(
                statistics.mean(xs),
                statistics.mean(ys),
                yerr=error,
                fmt="os^Dv"[i % 5],
                color=f"C{i % 10}",
                markersize=5,
                label=s.name,
            )
    axis.set_xlabel(label)
    axis.grid(color=INK, alpha=0.12, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)

"""Plots the figures of a run: how many times faster, by sparsity, against floors and goals.

python -m bench.plot runs/bench/figures.json -o runs/bench/figures.png      (or .svg, .pdf)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.table import machine_line

COLUMNS = 4
OURS, FLOOR, GOAL = "#1f5fa8", "#b5452c", "#3b7d4f"


def plot(document: dict, path: Path) -> None:
    """One panel per figure that has a floor or a goal: every row a point, their mean a line.

    Raises:
        ValueError: the document has no such figure. ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = [f for f in document.get("figures", []) if _has_target(f)]
    if not figures:
        raise ValueError("no figure with a floor or a goal to plot")
    columns = min(COLUMNS, len(figures))
    lines = -(-len(figures) // columns)
    size = (3.1 * columns, 2.7 * lines + 0.7)
    sheet, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for axis, figure in zip(axes.flat, figures, strict=False):
        _panel(axis, figure)
    for axis in axes.flat[len(figures) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    for axis in axes.flat[1 : len(figures)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    sheet.suptitle("Times faster than the baseline", x=0.01, ha="left", fontsize=11)
    sheet.legend(handles, labels, loc="upper right", ncols=len(labels), fontsize=8, frameon=False)
    sheet.text(0.01, 0.005, machine_line(document), fontsize=6, color="0.35")
    sheet.tight_layout(rect=(0, 0.02, 1, 0.97))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, dpi=150)
    plt.close(sheet)


def _has_target(figure: dict) -> bool:
    return any(point["floor"] or point["goal"] for point in figure["points"])


def _panel(axis, figure: dict) -> None:
    points = figure["points"]
    where = range(len(points))
    for i, point in zip(where, points, strict=True):
        spots = point["ratios"]
        axis.plot([i] * len(spots), spots, ".", color=OURS, alpha=0.25, ms=5, mec="none")
    axis.plot(where, [p["mean"] for p in points], "o-", color=OURS, ms=4, label="geometric mean")
    for key, color, style in (("floor", FLOOR, "--"), ("goal", GOAL, ":")):
        if all(point[key] is not None for point in points):
            axis.plot(where, [p[key] for p in points], style, color=color, label=key)
    axis.axhline(1, color="0.6", lw=0.8)
    axis.set_title(figure["title"], fontsize=9, loc="left")
    axis.set_xticks(where, [f"{p['sparsity']:.0%}" for p in points], fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="default: beside the file, as .png")
    options = parser.parse_args(arguments)
    output = options.output or options.file.with_suffix(".png")
    plot(json.loads(options.file.read_text()), output)
    print(output)


if __name__ == "__main__":
    main()

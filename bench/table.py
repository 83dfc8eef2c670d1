"""Markdown tables from the JSON of a run.

python -m bench.table runs/bench/*.json            the figures
python -m bench.table --rows runs/bench/*.json     and every row under them
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

VERDICTS = {"goal": "goal", "floor": "floor", "below": "BELOW FLOOR", "short of goal": "no goal"}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns line up in plain text too; all but the first are right-aligned."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def machine_line(document: dict) -> str:
    facts, settings = document["facts"], document["settings"]
    caches = ", ".join(f"{name} {size}" for name, size in facts["caches"].items())
    dense = "" if settings["dense_isa"] == "best" else f" (torch kept to {settings['dense_isa']})"
    return (
        f"{facts['cpu']}, {facts['cores']} cores ({caches}); torch {facts['torch']}; "
        f"{settings['isa']}{dense}; {settings['rounds']} rounds; {document['date']}"
    )


def _point(point: dict) -> str:
    shown = point["least"] if point["worst_counts"] else point["mean"]
    return f"{shown:.2f} ({point['least']:.2f} to {point['most']:.2f})"


def _targets(points: list[dict], key: str) -> str:
    if any(point[key] is None for point in points):
        return ""
    values = [f"{point[key]:g}" for point in points]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _verdict(points: list[dict]) -> str:
    found = [VERDICTS[point["verdict"]] if point["verdict"] else "" for point in points]
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def figures_table(document: dict) -> str:
    """Machine, and a table of figures for each set of sparsities."""
    parts = [machine_line(document)]
    figures = document.get("figures", [])
    for sparsities in dict.fromkeys(_sparsities(figure) for figure in figures):
        header = ["figure", *(f"{s:.0%}" for s in sparsities), "floor", "goal", "reached"]
        header += ["rows", "baseline", "layout", "dtype", "threads"]
        rows = []
        for figure in figures:
            points = figure["points"]
            if _sparsities(figure) != sparsities:
                continue
            rows.append(
                [
                    figure["title"],
                    *map(_point, points),
                    *(_targets(points, key) for key in ("floor", "goal")),
                    _verdict(points),
                    _counts(points),
                    figure["baseline"],
                    figure["layout"],
                    figure["dtype"],
                    figure["threads"],
                ]
            )
        parts.append(markdown(header, rows))
    notes = dict.fromkeys(f"{f['group']}: {f['note']}" for f in figures if f["note"])
    parts.append("\n".join(f"- {note}" for note in [*notes, *document["notes"]]))
    return "\n\n".join(filter(None, parts))


def _counts(points: list[dict]) -> str:
    return " / ".join(dict.fromkeys(str(point["rows"]) for point in points))


def _sparsities(figure: dict) -> tuple[float, ...]:
    return tuple(point["sparsity"] for point in figure["points"])


def rows_table(rows: list[dict]) -> str:
    """Every row: the baselines' fastest entries, our times with their spread, the ratios."""
    header = ["shape", "sparsity", "baseline", "us", "ours", "us", "spread", "ratio"]
    lines = []
    for row in rows:
        for pair, ratio in row["ratios"].items():
            ours, baseline = pair.split("/", 1)
            rival, mine = row["times"][row["fastest"][baseline]], row["times"][ours]
            lines.append(
                [
                    row["label"],
                    f"{row['sparsity']:.0%}",
                    _rival_name(row, baseline),
                    f"{rival['median_us']:.1f}",
                    ours,
                    f"{mine['median_us']:.1f}",
                    f"{mine['spread']:.0%}",
                    f"{ratio:.2f}",
                ]
            )
    return markdown(header, lines)


def _rival_name(row: dict, baseline: str) -> str:
    entry = row["fastest"][baseline]
    return entry if entry.startswith(baseline) else f"{baseline}: {entry}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rows", action="store_true", help="every row too")
    options = parser.parse_args(arguments)
    for file in options.files:
        document = json.loads(file.read_text())
        print(figures_table(document) + "\n")
        if options.rows or not document.get("figures"):
            for group in dict.fromkeys(row["group"] for row in document["rows"]):
                rows = [row for row in document["rows"] if row["group"] == group]
                print(f"{group}\n\n{rows_table(rows)}\n")


if __name__ == "__main__":
    main()

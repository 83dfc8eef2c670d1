"""``dass plot``: accuracy against nonzeros of several run folders; which of them are dominated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dass.report import Plot, Report, Section, Table
from dass.runs import UserError
from dass.tables import percent

__all__ = ["Point", "pareto_report", "read_point"]


@dataclass(frozen=True)
class Point:
    """A finished run: accuracy on the test images after the last epoch, nonzero weights."""

    name: str
    accuracy: float
    nonzeros: int

    def beats(self, other: Point) -> bool:
        """Whether it is no worse in both, and better in one."""
        no_worse = self.accuracy >= other.accuracy and self.nonzeros <= other.nonzeros
        return no_worse and (self.accuracy, -self.nonzeros) != (other.accuracy, -other.nonzeros)


def read_point(folder: Path) -> Point:
    """The point of a run of train, sparse, prune or finetune.

    Raises:
        UserError: no report there, or one without accuracy and nonzeros.
    """
    path = folder / "report.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        if "stages" in data:
            last = list(data["stages"].values())[-1]
            return Point(folder.name, last["history"][-1]["test_accuracy"], data["nonzeros"])
        found = next(data[key] for key in ("train", "prune", "finetune") if key in data)
        return Point(folder.name, found["accuracy"], found["nonzeros"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration):
        raise UserError(
            f"{path} has no accuracy and nonzeros: name run folders of dass train, sparse, prune "
            "(with --finetune) or finetune"
        ) from None


def pareto_report(folders: Sequence[Path]) -> Report:
    """The plot and the table of the runs, by nonzeros.

    Raises:
        UserError: a folder that is no finished run.
    """
    points = sorted((read_point(Path(f)) for f in folders), key=lambda p: (p.nonzeros, p.name))
    front = [p for p in points if not any(other.beats(p) for other in points)]
    rows = [
        (p.name, f"{p.nonzeros:,}", percent(p.accuracy, 2), "yes" if p in front else "")
        for p in points
    ]
    series = {
        "runs": [(p.nonzeros, 100 * p.accuracy) for p in points],
        "not dominated": [(p.nonzeros, 100 * p.accuracy) for p in front],
    }
    plot = Plot(
        "lines",
        "Accuracy against nonzeros",
        series,
        x_label="nonzero weights",
        y_label="accuracy, %",
        marks=[p.name for p in points],
        dashed=["runs"],
        log_x=True,
    )
    columns = ("run", "nonzeros", "accuracy", "not dominated")
    intro = ["Accuracies are of the last epoch, on each run's own test images."]
    data = {"points": [{**asdict(p), "front": p in front} for p in points]}
    return Report(
        "dass plot", intro, (), [Section("Runs", items=[Table(columns, rows), plot])], data
    )

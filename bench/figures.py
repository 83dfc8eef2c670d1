"""The figures of the project: floors and goals, and how they are measured.

    python -m bench.figures                                       everything
    python -m bench.figures --group conv1x1 linear --rounds 3     some of it, roughly
    python -m bench.figures --isa avx2 --json out.json            on another instruction set
    python -m bench.figures --group dlmc --dlmc PATH              needs the matrices

A ratio is how many times faster ours is than the fastest of its baseline's ways, the median over
rounds in which both were timed in turn; a figure is the geometric mean of its rows. Every result is
compared with its baseline's before either is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bench import cases, inference
from bench.bench_models import sparsified
from bench.bench_training import training
from bench.contest import Contest
from bench.session import Session, add_common_arguments, exit_on_failures, parse
from bench.table import figures_table

Numbers = tuple[float, ...] | None
BLOCK_KINDS = {rows: (f"{rows}x1 1x1", f"{rows}x1 linear") for rows in cases.BLOCK_ROWS}


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    ours, baseline: which ratio of the group's rows.
    floor, goal: per sparsity of the group, in order; None where there is none.
    kinds: only rows of these kinds.
    least_us: only rows whose baseline takes at least so long.
    worst: the floor holds for every row, not for the mean.
    layout: of input and output, where it is not the rows'.
    """

    group: str
    title: str
    ours: str
    baseline: str
    floor: Numbers = None
    goal: Numbers = None
    kinds: tuple[str, ...] | None = None
    least_us: float = 0.0
    worst: bool = False
    layout: str | None = None


@dataclass(frozen=True)
class Group:
    """Rows that are measured together. contests: sparsities, options -> contests."""

    contests: Callable[..., Iterator[Contest]]
    sparsities: tuple[float, ...] = cases.SPARSITIES
    note: str = ""


GROUPS = {
    "conv1x1": Group(inference.conv1x1),
    "conv3x3": Group(inference.conv3x3),
    "conv3x3_b16": Group(inference.conv3x3_b16),
    "linear": Group(inference.linear, note="1x1 at batch 8, planes of 14 and 7; Linear at 8-128"),
    "blocks": Group(inference.blocks, note="random blocks at the stated density"),
    "dlmc": Group(inference.dlmc, note="all 54 layers, the 7x7 stem and the classifier included"),
    "training": Group(training, note="forward, dX and dW on the mask, through autograd, batch 16"),
    "threads": Group(inference.threads, note="layers that take 100 us or more on one thread"),
    "sparsify": Group(
        partial(sparsified, networks=cases.SPARSIFY_NETWORKS),
        cases.SPARSIFY_SPARSITIES,
        "whole networks at 224, batch 1; uniform magnitude masks",
    ),
}

FIGURES = (
    Figure("conv1x1", "1x1, batch 1", "module", "dense", (2.4, 3.2, 4.2), (3.5, 5.5, 9)),
    Figure("conv3x3", "3x3, batch 1", "module", "dense", (2.6, 4, 5.5), (4, 6.5, 10)),
    Figure("conv3x3_b16", "3x3, batch 16, NCHW", "module", "dense", None, (4, 6, 9)),
    Figure(
        "conv3x3_b16",
        "3x3, batch 16, own layout",
        "lanes",
        "dense",
        (4, 7, 12),
        (4.8, 8, 14),
        layout="batch innermost",
    ),
    Figure("linear", "1x1 and Linear, batch >= 8", "module", "dense", (3, 5, 8), (4, 7, 12)),
    Figure("linear", "- 1x1 only", "module", "dense", kinds=("1x1",)),
    Figure("linear", "- Linear only", "module", "dense", kinds=("linear",)),
    Figure("blocks", "R x 1 blocks, batch >= 8", "module", "dense", (5, 8, 10), (7, 11, 15)),
    *(
        Figure("blocks", f"- {rows} x 1 only", "module", "dense", kinds=kinds)
        for rows, kinds in BLOCK_KINDS.items()
    ),
    Figure("dlmc", "DLMC ResNet-50 vs torch.mm", "spmm", "mm", (2.5, 4, 6)),
    Figure("dlmc", "- vs fastest dense, packed too", "spmm", "dense"),
    Figure("dlmc", "DLMC ResNet-50 vs CSR (MKL)", "spmm", "csr", (1.7,) * 3, (2.8,) * 3),
    Figure("training", "training step, op", "op", "dense", (2.5, 3.5, 5), (3.3, 5.5, 9)),
    Figure("training", "training step, module", "module", "dense", (2.5, 3.5, 5), (3.3, 5.5, 9)),
    Figure("training", "- module, 1x1 only", "module", "dense", kinds=("1x1",)),
    Figure("training", "- module, 3x3 only", "module", "dense", kinds=("3x3",)),
    Figure("training", "op vs SparseProp", "op", "sparseprop", (2.5,) * 3, (5,) * 3),
    Figure("training", "module vs SparseProp", "module", "sparseprop", (2.5,) * 3, (5,) * 3),
    Figure("threads", "two threads", "two", "one thread", (1.7,) * 3, (1.9,) * 3, None, 100),
    Figure("sparsify", "sparsify(auto)", "auto", "eager", (0.98,) * 3, worst=True),
    Figure("sparsify", "sparsify(auto) vs fastest dense", "auto", "dense"),
)


def summarise(rows: list[dict]) -> list[dict]:
    """The figures that the rows support, as JSON-ready dicts."""
    found = []
    for figure in FIGURES:
        mine = [row for row in rows if _counts(row, figure)]
        if not mine:
            continue
        points = []
        for i, sparsity in enumerate(GROUPS[figure.group].sparsities):
            key = f"{figure.ours}/{figure.baseline}"
            ratios = [row["ratios"][key] for row in mine if row["sparsity"] == sparsity]
            if ratios:
                points.append(_point(figure, i, sparsity, ratios))
        found.append(
            {
                "group": figure.group,
                "title": figure.title,
                "ours": figure.ours,
                "baseline": figure.baseline,
                "note": GROUPS[figure.group].note,
                **{key: _common(mine, key) for key in ("dtype", "layout", "threads")},
                **({"layout": figure.layout} if figure.layout else {}),
                "points": points,
            }
        )
    return found


def _common(rows: list[dict], key: str) -> object:
    """The value of all rows, or all values."""
    values = list(dict.fromkeys(row[key] for row in rows))
    return values[0] if len(values) == 1 else ", ".join(map(str, values))


def _counts(row: dict, figure: Figure) -> bool:
    """Whether a row belongs to a figure and has what it compares."""
    return (
        row["group"] == figure.group
        and (figure.kinds is None or row["kind"] in figure.kinds)
        and f"{figure.ours}/{figure.baseline}" in row["ratios"]
        and row["times"][row["fastest"][figure.baseline]]["median_us"] >= figure.least_us
    )


def _point(figure: Figure, i: int, sparsity: float, ratios: list[float]) -> dict:
    mean = statistics.geometric_mean(ratios)
    value = min(ratios) if figure.worst else mean
    floor, goal = (numbers[i] if numbers else None for numbers in (figure.floor, figure.goal))
    verdict = None
    if goal is not None and value >= goal:
        verdict = "goal"
    elif floor is not None:
        verdict = "floor" if value >= floor else "below"
    elif goal is not None:
        verdict = "short of goal"
    return {
        "sparsity": sparsity,
        "mean": mean,
        "least": min(ratios),
        "most": max(ratios),
        "ratios": ratios,
        "rows": len(ratios),
        "floor": floor,
        "goal": goal,
        "worst_counts": figure.worst,
        "verdict": verdict,
    }


def measure_groups(options: argparse.Namespace) -> dict:
    """Measures the groups of ``options.group`` and returns the document."""
    session = Session(options)
    for name in options.group:
        group = GROUPS[name]
        more = {"path": options.dlmc} if name == "dlmc" else {}
        session.hold(name, group.contests(group.sparsities, **more))
        session.document["figures"] = summarise(session.document["rows"])
        session.save()
    return session.document


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    found.add_argument("--group", nargs="+", choices=GROUPS, default=list(GROUPS))
    found.add_argument("--dlmc", help="DLMC matrices (default: the environment's DASS_DLMC)")
    add_common_arguments(found)
    return found


def main(arguments: list[str] | None = None) -> dict:
    document = measure_groups(parse(parser(), arguments))
    print("\n" + figures_table(document))
    exit_on_failures(document)
    return document


if __name__ == "__main__":
    main()

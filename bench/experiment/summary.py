"""The tables of docs/results.md, made of the files of results alone.

The same files give the same text. What is missing is left out, and how much of it there is stands
in the table: a mean of two seeds says so.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.experiment import plots
from bench.experiment.protocol import Protocol
from bench.experiment.rows import Row, read, rows
from bench.experiment.systems import BASELINE, SYSTEMS
from bench.table import markdown
from dass.report import write_text

__all__ = ["Standing", "difference", "standings", "table", "write_document"]

NONE = "-"


@dataclass(frozen=True)
class Standing:
    """A system at a sparsity, over the seeds that are finished.

    results, latencies, tests: seed -> the file's content.
    """

    name: str
    sparsity: float
    results: dict[int, dict]
    latencies: dict[int, dict]
    tests: dict[int, dict]

    @property
    def accuracies(self) -> dict[int, float]:
        """Held out, in per cent, by seed."""
        return {seed: 100 * r["held_out_accuracy"] for seed, r in self.results.items()}

    def us(self, way: str) -> list[float]:
        return [found["times"][way]["median_us"] for found in self.latencies.values()]

    def speedups(self, way: str, part: str) -> list[float]:
        return [found["speedup"][way][part] for found in self.latencies.values()]


def standings(results: Path, protocol: Protocol, sparsity: float) -> list[Standing]:
    """Of the systems that have a finished row, in the order of SYSTEMS."""
    found = []
    for name in SYSTEMS:
        mine = list(rows(protocol, name, sparsity))
        parts = [_files(mine, results, kind) for kind in ("", "latency", "test")]
        if parts[0]:
            found.append(Standing(name, sparsity, *parts))
    return found


def _files(mine: Sequence[Row], results: Path, kind: str) -> dict[int, dict]:
    files = {row.seed: read(row.file(results, kind)) for row in mine}
    return {seed: content for seed, content in files.items() if content is not None}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """ "mean +- standard deviation (number)"; one value has no spread."""
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (1)"
    return f"{mean} +- {statistics.stdev(values):.{digits}f} ({len(values)})"


def difference(a: Standing, b: Standing) -> list[float]:
    """Points by which `a` is ahead of `b` on the held-out images, for each seed that both have."""
    mine, theirs = a.accuracies, b.accuracies
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def table(found: Sequence[Standing]) -> str:
    """Accuracy and size, a row per system."""
    baseline = next((s for s in found if s.name == BASELINE), None)
    header = ["system", "weights", "nonzeros", "MACs", "of nonzeros", "held out, %", "test, %"]
    header += ["ahead of MobileNet-v2, points"]
    lines = []
    for s in found:
        first = next(iter(s.results.values()))
        ahead = difference(s, baseline) if baseline and s is not baseline else []
        lines.append(
            [
                SYSTEMS[s.name].title,
                f"{first['weights']:,}",
                _alike([r["nonzeros"] for r in s.results.values()]),
                f"{first['macs'] / 1e6:.1f} M",
                spread([r["nonzero_macs"] / 1e6 for r in s.results.values()]) + " M",
                spread(list(s.accuracies.values())),
                spread([100 * t["test_accuracy"] for t in s.tests.values()]),
                spread(ahead),
            ]
        )
    return markdown(header, lines)


def _alike(counts: Sequence[int]) -> str:
    return " / ".join(f"{count:,}" for count in dict.fromkeys(counts))


def pairs_table(found: Sequence[Standing]) -> str:
    """Rows minus columns, held out, in points: the mean over the seeds that both have."""
    header = ["", *(s.name for s in found)]
    lines = []
    for a in found:
        cells = [difference(a, b) if a is not b else [] for b in found]
        lines.append([a.name, *(f"{statistics.mean(c):+.2f}" if c else "" for c in cells)])
    return markdown(header, lines)


def latency_table(found: Sequence[Standing]) -> str:
    """Times of the systems that were timed, and how well they were predicted.

    That of sparse MobileNet-v2 over another's is the quotient of how much faster both are than
    dense MobileNet-v2, each in turn with it.
    """
    header = ["system", "sparsify, us", "compile, us", "dense MobileNet-v2 / compile"]
    header += ["sparse MobileNet-v2 / compile", "itself dense / compile", "predicted / sparsify"]
    sparse = next((s.speedups("compile", "baseline") for s in found if s.name == BASELINE), [])
    lines, errors = [], []
    for s in found:
        if not s.latencies:
            continue
        timed = [f for f in s.latencies.values() if f["predicted_us"] is not None]
        ratios = [f["predicted_us"] / f["times"]["sparsify"]["median_us"] for f in timed]
        errors += [abs(ratio - 1) for ratio in ratios]
        faster = s.speedups("compile", "baseline")
        lines.append(
            [
                SYSTEMS[s.name].title,
                spread(s.us("sparsify"), 1),
                spread(s.us("compile"), 1),
                spread(faster),
                f"{statistics.mean(faster) / statistics.mean(sparse):.2f}" if sparse else NONE,
                spread(s.speedups("compile", "dense")),
                spread(ratios),
            ]
        )
    if not lines:
        return "Not timed yet."
    told = f"\n\nPredicted against measured: median error {statistics.median(errors):.0%}."
    return markdown(header, lines) + (told if errors else "")


def cost_line(results: Path) -> str:
    """What all of it took; dense trainings that rows share count once."""
    hours, shared = 0.0, set()
    for path in sorted(results.glob("*.json")):
        found = read(path)
        if "stages" in found:
            for stage in found["stages"]:
                key = (stage["stage"], stage["held_out_loss"], stage["cpu_seconds"])
                if key not in shared:
                    shared.add(key)
                    hours += stage["cpu_seconds"] / 3600
        elif "config" in found:
            hours += found["cpu_seconds"] / 3600
    return f"Processor time of the rows below and their searches: {hours:.1f} hours."


def write_document(results: Path, document: Path, protocol: Protocol) -> None:
    """Puts the tables between the markers of a document, and the plots beside it.

    Raises:
        ValueError: the document lacks a marker.
    """
    text = _between(document.read_text(encoding="utf-8"), "cost", cost_line(results))
    for sparsity in protocol.sparsities:
        found, label = standings(results, protocol, sparsity), f"{100 * sparsity:.4g}"
        if found:
            parts = [table(found), f"![accuracy](results-{label}.svg)"]
            parts += ["Row minus column, points:", pairs_table(found), latency_table(found)]
            plots.draw(found, document.with_name(f"results-{label}.svg"))
        else:
            parts = ["No row is finished yet."]
        text = _between(text, label, "\n\n".join(parts))
    write_text(document, text)


def _between(text: str, marker: str, content: str) -> str:
    begin, end = f"<!-- begin {marker} -->", f"<!-- end {marker} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the document lacks {begin} or {end}")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}\n\n{content}\n\n{end}", text, flags=re.S)

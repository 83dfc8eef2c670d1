"""Many comparisons in one table: how many times as fast as each peer the engine is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.table import markdown

OURS = "dass-compile"


def read(files: Iterable[Path]) -> list[dict]:
    """The comparisons of files that ``run --json`` wrote, in order."""
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def table(comparisons: Iterable[Mapping]) -> str:
    """A row per network, sparsity and batch; a ratio is the peer's time over the engine's.

    Ratios are of medians taken in one interleaved run. A peer that was not timed has none.
    """
    comparisons = [c for c in comparisons if _times(c).get(OURS)]
    names = list(dict.fromkeys(n for c in comparisons for n in _times(c) if n != OURS))
    lines = []
    for c in comparisons:
        times = _times(c)
        ratios = [f"{times[n] / times[OURS]:.2f}" if n in times else "" for n in names]
        what = f"{c['network']} {c['size']}, batch {c['batch']}"
        what += f", {c['threads']} threads" if c["threads"] > 1 else ""
        lines.append([what, f"{c['sparsity']:.0%}", f"{times[OURS] / 1e3:.3f}", *ratios])
    return markdown(["network", "zeros", f"{OURS} ms", *(f"x {name}" for name in names)], lines)


def _times(comparison: Mapping) -> dict[str, float]:
    return {row["peer"]: row["median_us"] for row in comparison["rows"]}

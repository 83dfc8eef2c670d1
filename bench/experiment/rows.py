"""Rows of the experiment, their files of results, and what is yet to be done.

results/SYSTEM-SPARSITY-SEED.json           a trained network: held-out accuracy, exact counts
results/SYSTEM-SPARSITY-SEED.latency.json   its times, taken later on a quiet machine
results/SYSTEM-SPARSITY-SEED.test.json      its accuracy on the test set, read once
results/SYSTEM-SPARSITY.search.json         the search that gave a system's cells
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.experiment.protocol import Protocol
from bench.experiment.systems import SYSTEMS, System
from dass.report import write_text

__all__ = ["RESULTS", "Row", "read", "rows", "write"]

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Row:
    """One training: a system at a sparsity, with a seed."""

    name: str
    sparsity: float
    seed: int

    @property
    def system(self) -> System:
        return SYSTEMS[self.name]

    @property
    def label(self) -> str:
        return f"{self.name}-{100 * self.sparsity:.4g}-{self.seed}"

    @property
    def search_label(self) -> str:
        return f"{self.name}-{100 * self.sparsity:.4g}"

    def file(self, results: Path, kind: str = "") -> Path:
        """kind: "", "latency" or "test"."""
        return results / f"{self.label}{'.' if kind else ''}{kind}.json"

    def search_file(self, results: Path) -> Path:
        return results / f"{self.search_label}.search.json"


def rows(
    protocol: Protocol,
    system: str | None = None,
    sparsity: float | None = None,
    seed: int | None = None,
) -> Iterator[Row]:
    """All rows, or those that are named, in the order in which they are run.

    Raises:
        SystemExit: a system, sparsity or seed that the protocol does not have.
    """
    for what, wanted, known in (
        ("system", system, tuple(SYSTEMS)),
        ("sparsity", sparsity, protocol.sparsities),
        ("seed", seed, protocol.seeds),
    ):
        if wanted is not None and wanted not in known:
            raise SystemExit(f"--{what} {wanted}: unknown; known: {', '.join(map(str, known))}")
    for s in protocol.sparsities if sparsity is None else (sparsity,):
        for n in protocol.seeds if seed is None else (seed,):
            for name in SYSTEMS if system is None else (system,):
                yield Row(name, s, n)


def read(path: Path) -> dict | None:
    """A file of results, or None where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(path: Path, result: dict) -> dict:
    """Writes a file of results whole or not at all; -> the result as JSON gives it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False)
    write_text(path, text + "\n")
    return json.loads(text)

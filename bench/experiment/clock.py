"""CPU time of a run over all its sittings, and of all runs together."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dass.report import write_text

__all__ = ["Clock", "used_hours"]

_NAME = "cpu.json"


class Clock:
    """Seconds of processor time spent on a run, kept in a file of its folder.

    A kill loses what was spent since the last `note`.
    """

    def __init__(self, folder: Path):
        self.path = folder / _NAME
        self._before = _read(self.path)
        self._start = time.process_time()

    @property
    def seconds(self) -> float:
        return self._before + time.process_time() - self._start

    def note(self) -> float:
        """Writes the seconds, and returns them."""
        write_text(self.path, json.dumps({"cpu_seconds": self.seconds}) + "\n")
        return self.seconds

    def on_epoch(self, history: Sequence[Mapping]) -> None:
        """For :func:`dass.training.train` and :func:`dass.search`."""
        self.note()


def used_hours(runs: Path) -> float:
    """Processor hours of all runs below a folder."""
    return sum(_read(path) for path in sorted(runs.glob(f"*/{_NAME}"))) / 3600


def _read(path: Path) -> float:
    return json.loads(path.read_text())["cpu_seconds"] if path.exists() else 0.0

"""One progress display for a command that goes through several stages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Display", "Tell"]

Tell = Callable[[float, str], None]  # share done of the stage, what is going on


class Display:
    """Bars on a terminal for the stage and for the whole; elsewhere a line per finished stage.

        with Display({"train": 60, "measure": 20}, console) as display:
            with display.stage("train") as tell:
                tell(0.5, "epoch 5 of 10")
            display.say("train: 68 %")

    Args:
        stages: name -> about how many seconds, for the bar of the whole.
    """

    def __init__(self, stages: Mapping[str, float], console: Console):
        self.console, self._weights = console, dict(stages)
        self._done = 0.0
        self._number = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        total = sum(self._weights.values())
        self._whole = self._progress.add_task("[bold]all", total=total, note="")
        self._now = self._progress.add_task("", total=1.0, note="", visible=False)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._progress.console.print(text, highlight=False)

    def skip(self, name: str) -> None:
        """A stage that was finished by an earlier run."""
        self._number += 1
        self._done += self._weights[name]
        self._progress.update(self._whole, completed=self._done)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Tell]:
        """Shows a stage; yields the function that tells how far it is."""
        self._number += 1
        weight = self._weights[name]
        label = f"[{self._number}/{len(self._weights)}] {name}"
        self._progress.reset(self._now, description=escape(label), visible=True, note="")
        last = 0.0

        def tell(share: float, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < 0.1:
                return
            last = now
            self._progress.update(self._now, completed=share, note=escape(note))
            self._progress.update(self._whole, completed=self._done + share * weight)

        yield tell
        self._done += weight
        self._progress.update(self._whole, completed=self._done)
        self._progress.update(self._now, visible=False)

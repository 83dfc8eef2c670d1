"""What every command runs in: a console, errors as one line and an exit code, threads."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

__all__ = ["deterministic", "errors", "inherit", "on_threads", "publish", "session"]


@contextlib.contextmanager
def session() -> Iterator[Console]:
    """A console, the package's messages on it, and errors as one line and an exit code.

    Of the processes that torchrun starts, only the first one's console says anything.
    """
    from rich.logging import RichHandler

    console = Console(quiet=not _is_first())
    if not console.is_terminal:
        console = Console(width=100, quiet=not _is_first())
    log = logging.getLogger("dass")
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    said: set[str] = set()  # both parts of a data set may say the same
    handler.addFilter(lambda r: r.getMessage() not in said and not said.add(r.getMessage()))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with errors():
            yield console
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    from dass.data import DataError
    from dass.files import FileError
    from dass.runs import UserError
    from dass.training import CheckpointError, TrainingError

    err = Console(stderr=True, soft_wrap=True)
    try:
        yield
    except (UserError, DataError, FileError, CheckpointError, TrainingError, OSError) as error:
        words = " ".join(str(error).split())
        err.print(f"[red]error:[/] {escape(words)}", highlight=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        err.print("stopped; what was done is kept, and the same command goes on from there")
        raise typer.Exit(130) from None


def publish(report, folder: Path | None, console: Console) -> None:
    """Prints a report and writes its files; of torchrun's processes the first one does."""
    from dass.report import print_report, save_report

    if not _is_first():
        return
    print_report(report, console)
    if folder is not None:
        paths = save_report(report, folder)
        console.print(f"\nreport: {paths['html']} (also .md and .json)", soft_wrap=True)


def inherit(source: str, data: str | None, size: int | None, limit: int | None):
    """What the run of the source was on, where the command says nothing."""
    from dass.runs import run_settings

    found = run_settings(source)
    if data is None and found.get("data") is not None:
        data, size = found["data"], size or found.get("size")
        limit = limit or found.get("limit")
    return data, size, limit


def on_threads(count: int | None):
    """A block with so many torch threads; None: as they are."""
    from dass import arguments
    from dass.timing import threads

    return threads(arguments.at_least_one(count))


@contextlib.contextmanager
def deterministic(wanted: bool, seed: int) -> Iterator[None]:
    """If wanted: torch refuses what is not deterministic, and every generator starts from `seed`.

    What was set before is set again afterwards.
    """
    if not wanted:
        yield
        return
    import random

    import numpy as np
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.use_deterministic_algorithms(True)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _is_first() -> bool:
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return alone or int(os.environ.get("RANK", "0")) == 0

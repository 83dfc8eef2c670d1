"""Checkpoint files: written whole or not at all, and never in the middle of a step."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

__all__ = [
    "CheckpointError",
    "check_identity",
    "deferred_interrupts",
    "read_checkpoint",
    "save_whole",
]


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or belongs to another run."""


def save_whole(state: dict, path: Path) -> None:
    """Writes the whole file or none: a kill half-way leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path, format: int) -> dict:
    """What :func:`save_whole` wrote; nothing of it is executed.

    Raises:
        CheckpointError: it cannot be read, or has another format number.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read ({first}); delete it to start over") from None
    if not isinstance(state, dict) or state.get("format") != format:
        raise CheckpointError(f"{path} is no checkpoint of this version; delete it to start over")
    return state


def check_identity(path: Path, found: dict, mine: dict, what: str) -> None:
    """Raises CheckpointError, naming each difference, unless `found` says what `mine` does."""
    wrong = [f"{k} {found.get(k)}, not {v}" for k, v in mine.items() if found.get(k) != v]
    if wrong:
        raise CheckpointError(f"{path} is of another {what}: it has {'; '.join(wrong)}")


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C or SIGTERM only makes the yielded function true; a second one acts.

    An optimiser step cut in half would leave weights that no straight run has.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may set handlers
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    for number in before:
        signal.signal(number, handler)
    try:
        yield lambda: bool(received)
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)

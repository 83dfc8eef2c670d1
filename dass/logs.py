"""The course of a run, epoch by epoch: ``log.jsonl``, and TensorBoard's events if it is installed.

    with RunLog(folder, "finetune") as log:
        train(model, data, config, on_epoch=log)

log.jsonl             one line per epoch: time (UTC), stage, and the numbers of the history's row
events/STAGE/*        the same numbers as scalars: loss/train, accuracy/test, lr, nonzeros, ...
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

from dass.distributed import rank_and_world

__all__ = ["RunLog", "read_log"]

_PARTS = ("train", "test", "val")


class RunLog:
    """Called with a stage's whole history, writes the epochs that the folder's log lacks.

    So a run that is gone on with, or called twice, leaves one line per epoch. In a process group
    rank 0 writes. A line that a kill cut short is dropped.

    Args:
        folder: of the run; made if it is not there.
        stage: name of the training.
    """

    def __init__(self, folder: str | os.PathLike, stage: str):
        self.stage, self.path = stage, Path(folder) / "log.jsonl"
        self._events = None
        self._active = rank_and_world()[0] == 0
        if not self._active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            whole, newline, rest = self.path.read_bytes().rpartition(b"\n")
            if rest:
                os.truncate(self.path, len(whole) + len(newline))
        self._done = {row["epoch"] for row in read_log(folder) if row["stage"] == stage}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error) -> None:
        if self._events is not None:
            self._events.close()

    def __call__(self, history: Sequence[Mapping[str, object]]) -> None:
        """history: rows as in `dass.training.TrainResult`; what is no number is left out."""
        for row in history if self._active else ():
            if row["epoch"] in self._done:
                continue
            now = time.time()
            numbers = {k: v for k, v in row.items() if isinstance(v, Real) and k != "epoch"}
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
            line = {"time": stamp, "stage": self.stage, "epoch": row["epoch"], **numbers}
            with open(self.path, "ab", buffering=0) as file:
                file.write((json.dumps(line) + "\n").encode())
            self._scalars(row["epoch"], numbers, now)
            self._done.add(row["epoch"])

    def _scalars(self, epoch: int, numbers: Mapping[str, Real], now: float) -> None:
        if self._events is None:
            self._events = _writer(self.path.parent / "events" / self.stage)
        for key, value in numbers.items():
            part, _, rest = key.partition("_")
            tag = f"{rest}/{part}" if part in _PARTS else key
            self._events.add_scalar(tag, value, epoch, walltime=now)
        self._events.flush()


def read_log(folder: str | os.PathLike) -> list[dict]:
    """The rows of a folder's log, oldest first; [] without one."""
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class _NoEvents:
    def add_scalar(self, *args, **kwargs) -> None:
        pass

    flush = close = add_scalar


def _writer(folder: Path):
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder)
    return _NoEvents()

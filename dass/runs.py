"""Run folders: what a command did lies in one folder, stage by stage, and a rerun goes on there.

runs/NAME/run.json          the settings that the folder is for
runs/NAME/stages/*.json     the result of each finished stage
runs/NAME/log.jsonl         a line per epoch; events/ has the same for TensorBoard (``dass.logs``)
runs/NAME/*.safetensors     networks (``dass.load``)
runs/NAME/report.*          Markdown, HTML, JSON

In a process group rank 0 alone reads and writes the folder, and all get what it found.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dass.distributed import on_rank_zero
from dass.report import write_text

__all__ = ["ROOT", "RunFolder", "UserError", "model_file", "run_settings"]

ROOT = Path("runs")
_OURS = (
    ".*.tmp",
    "*.pt",
    "*.safetensors",
    "events/*/events.out.*",
    "log.jsonl",
    "report.html",
    "report.json",
    "report.md",
    "stages/*.json",
)


class UserError(Exception):
    """Something that the user can put right; the message is one line and says how."""


class RunFolder:
    """The folder of one run.

    Args:
        path: made if it is not there.
        settings: JSON types; a folder with other settings is another run.
        fresh: remove what an earlier run left in it. Files that are not a run's stay.

    Raises:
        UserError: the folder is of another run, or is there and no run folder at all.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], fresh: bool = False):
        self.path, self.settings = path, json.loads(json.dumps(settings))
        on_rank_zero(lambda: self._open(fresh))

    def _open(self, fresh: bool) -> None:
        path, marker = self.path, self.path / "run.json"
        if path.exists() and not marker.is_file() and (path.is_file() or any(path.iterdir())):
            raise UserError(f"{path} is there and is no run folder: name another one with --run")
        if marker.is_file():
            if fresh:
                self._clear()
            else:
                self._compare(_read_json(marker))
        try:
            (path / "stages").mkdir(parents=True, exist_ok=True)
            write_text(marker, json.dumps(self.settings, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None

    def _compare(self, found: dict) -> None:
        # A setting that an older version did not know is off: absent, None and False are one.
        keys = sorted({*found, *self.settings})
        wrong = [
            f"{key} {found.get(key)!r}, not {self.settings.get(key)!r}"
            for key in keys
            if (found.get(key) or None) != (self.settings.get(key) or None)
        ]
        if wrong:
            raise UserError(
                f"{self.path} holds a run with {'; '.join(wrong)}: "
                "--fresh starts over, --run NAME takes another folder"
            )

    def _clear(self) -> None:
        for pattern in _OURS:
            for path in self.path.glob(pattern):
                path.unlink()

    def unfinished(self) -> bool:
        """Whether a training was broken off here."""
        return on_rank_zero(lambda: any(self.path.glob("*.pt")))

    def stage(self, name: str, machine: Mapping[str, object] | None = None) -> dict | None:
        """The result of a finished stage, or None.

        machine: what the stage's times depend on; times of another machine are no result here.
        """
        path = self._stage(name)
        found = on_rank_zero(lambda: _read_json(path) if path.is_file() else None)
        return found["result"] if found and found["machine"] in (None, machine) else None

    def finish(self, name: str, result: dict, machine: Mapping[str, object] | None = None) -> dict:
        """Records a stage's result; -> it, as JSON gives it back."""
        text = json.dumps({"machine": machine, "result": result}, indent=1, allow_nan=False)
        on_rank_zero(lambda: write_text(self._stage(name), text + "\n"))
        return json.loads(text)["result"]

    def drop_checkpoints(self) -> None:
        """What a finished training no longer needs."""

        def drop() -> None:
            for path in self.path.glob("*.pt"):
                path.unlink()

        on_rank_zero(drop)

    def _stage(self, name: str) -> Path:
        return self.path / "stages" / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, or use --fresh") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what a run writes: delete it, or use --fresh")
    return found


def model_file(source: str | os.PathLike) -> Path:
    """The network's file of a run folder, or the file itself.

    Raises:
        UserError: nothing there.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.is_file():
            raise UserError(f"{source} has no model.safetensors: name a finished run, or a file")
    if not path.is_file():
        raise UserError(f"{source} does not exist: expected a run folder or a file of dass.save")
    return path


def run_settings(source: str | os.PathLike) -> dict:
    """run.json beside a network, or {}."""
    path = Path(source)
    marker = (path if path.is_dir() else path.parent) / "run.json"
    return _read_json(marker) if marker.is_file() else {}

"""The parent's side of a worker: starts it, asks, waits, and says why it failed."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bench.peers import install

ROOT = Path(__file__).resolve().parents[2]
LOAD_SECONDS = 900  # torch.compile and sparsify take their time on a busy machine
ANSWER_SECONDS = 300
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(Exception):
    """A worker failed, died or did not answer in time; the message ends with what it printed."""


class Worker:
    """A peer in its process, asleep in a read of its stdin unless it is asked something.

    Args:
        job: see :mod:`bench.peers.worker`.
        environment: of :data:`bench.peers.install.ENVIRONMENTS`; None is the present one.
        log: file for what the peer prints.
        limits: variables of the process's environment, over all others.

    Attributes:
        facts: what the worker said when it was ready.

    Raises:
        NotAvailable: the environment is not set up. WorkerError: it did not get ready.
    """

    def __init__(
        self,
        job: Mapping[str, object],
        environment: str | None,
        log: Path,
        limits: Mapping[str, str] | None = None,
    ):
        executable = str(install.python(environment)) if environment else sys.executable
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [executable, "-m", "bench.peers.worker", json.dumps(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                cwd=log.parent,
                env=_environ(environment, job["threads"]) | dict(limits or {}),
            )
        self._unread = b""
        try:
            self.facts = self._reply(LOAD_SECONDS)
        except BaseException:
            self.close()
            raise

    def times_ns(self, count: int) -> list[int]:
        """Nanoseconds of each of `count` inferences, after warm-up."""
        return self._ask(f"time {count}")["times_ns"]

    def memory(self) -> dict[str, int]:
        """Resident bytes: ``peak`` and, on Linux, ``now``."""
        return self._ask("memory")

    def close(self) -> None:
        """Ends the process; it may be called twice."""
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _ask(self, command: str) -> dict:
        try:
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words("it has ended")) from None
        return self._reply(ANSWER_SECONDS)

    def _reply(self, seconds: float) -> dict:
        reply = json.loads(self._line(time.monotonic() + seconds, seconds))
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _line(self, deadline: float, seconds: float) -> bytes:
        while b"\n" not in self._unread:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()
                raise WorkerError(self._last_words(f"no answer within {seconds} s"))
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                status = self._process.wait()
                raise WorkerError(self._last_words(f"it ended with status {status}"))
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self, what: str) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line]
        return f"{what}: {lines[-1]}" if lines else what


def _environ(environment: str | None, threads: int) -> dict[str, str]:
    """All libraries kept to `threads`, and this repository's `bench` on the path."""
    found = dict(os.environ) if environment is None else install.environ()
    path = found.get("PYTHONPATH")
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), path]))
    found |= dict.fromkeys(THREAD_VARIABLES, str(threads))
    return {**found, "TORCHINDUCTOR_COMPILE_THREADS": "1"}

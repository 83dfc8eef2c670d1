"""How long two cores take to hand each other a line of the cache, and back.

python -m bench.cache_line

Cores that share a cache need some tens of ns for it, others several hundred, and a virtual machine
may be moved from the one kind to the other while it runs. What threads gain depends on it.

Two processes, each bound to its core, pass a byte of memory that they share to and fro. They are
Python, so a round trip has some steps of the interpreter in it; how long these take in one process
is measured too.
"""

from __future__ import annotations

import mmap
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS, TURNS = 2000, 25
LONGEST_SECONDS = 60  # after which a process that was left alone ends
IDLE, ASKED, DONE = 0, 1, 2


def round_trip(cores: tuple[int, int], rounds: int = ROUNDS, turns: int = TURNS) -> dict:
    """Nanoseconds of a round trip between two cores.

    Returns:
        ``ns``: all of it, the median of `turns` means of `rounds`; ``interpreter_ns``: what the
        same steps take in one process; ``cores``.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()

        def start(part: str, core: int, **how) -> subprocess.Popen:
            words = [part, file.name, core, rounds, turns]
            return subprocess.Popen([sys.executable, "-S", __file__, *map(str, words)], **how)

        answering = start("answer", cores[1])
        try:
            asking = start("ask", cores[0], stdout=subprocess.PIPE, text=True)
            told, _ = asking.communicate()
        finally:
            answering.kill()
            answering.wait()
    if asking.returncode:
        raise RuntimeError(f"the process that asks ended with status {asking.returncode}")
    ns, own = map(float, told.split())
    return {"ns": ns, "interpreter_ns": own, "cores": list(cores)}


def _answer(line: mmap.mmap) -> None:
    while True:
        while (value := line[0]) == IDLE:
            pass
        if value == DONE:
            return
        line[0] = IDLE


def _ask(line: mmap.mmap, rounds: int) -> None:
    for _ in range(rounds):
        line[0] = ASKED
        while line[0] == ASKED:
            pass


def _alone(line: mmap.mmap, rounds: int) -> None:
    """The steps of both sides in turn."""
    for _ in range(rounds):
        line[0] = ASKED
        while (value := line[0]) == IDLE:
            pass
        if value == DONE:
            return
        line[0] = IDLE
        while line[0] == ASKED:
            pass


def _median_ns(function, line: mmap.mmap, rounds: int, turns: int) -> float:
    times = []
    for _ in range(turns):
        start = time.perf_counter_ns()
        function(line, rounds)
        times.append((time.perf_counter_ns() - start) / rounds)
    return statistics.median(times)


def _take_part(part: str, path: str, core: int, rounds: int, turns: int) -> None:
    signal.alarm(LONGEST_SECONDS)
    os.sched_setaffinity(0, [core])
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as line:
        if part == "answer":
            _answer(line)
            return
        _ask(line, 1)  # until the other one is there
        print(_median_ns(_ask, line, rounds, turns))
        line[0] = DONE
        with mmap.mmap(-1, mmap.PAGESIZE) as own:
            print(_median_ns(_alone, own, rounds, turns))


def first_two_cores() -> tuple[int, int]:
    """Of those that this process may use.

    Raises:
        ValueError: there is one only, or the system does not tell.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(allowed) < 2:
        raise ValueError("two cores are needed")
    return allowed[0], allowed[1]


def words(found: dict) -> str:
    return (
        f"a line of the cache from core {found['cores'][0]} to core {found['cores'][1]} and back: "
        f"{found['ns']:.0f} ns, of which {found['interpreter_ns']:.0f} ns are Python's own"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _take_part(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
    else:
        try:
            print(words(round_trip(first_two_cores())))
        except ValueError as reason:
            raise SystemExit(str(reason)) from None

"""One run of contests: the instruction set, progress lines, and the JSON document it leaves."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import dass_kernels
from bench.contest import Contest, NotAvailable, ResultsDiffer, hold
from bench.table import rows_table
from dass.timing import machine_facts

ROUND_SECONDS = 0.02  # per entry and round
# What keeps torch's own libraries to an instruction set; read once, when they are first used.
DENSE_LIMITS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "scalar": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--isa", help="instruction set, for both sides (default: the best)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each rival (default: 9)")
    parser.add_argument(
        "--free-dense", action="store_true", help="with --isa: leave torch its best instruction set"
    )


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None
) -> argparse.Namespace:
    """The options, of the command line if no arguments are given.

    Where the command line asks for an instruction set, the process starts itself anew in an
    environment that keeps torch's libraries to it, too.
    """
    options = parser.parse_args(arguments)
    limits = {} if options.free_dense else DENSE_LIMITS.get(options.isa, {})
    if arguments is None and not _in_force(limits):
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **limits})
    return options


def _in_force(limits: dict[str, str]) -> bool:
    return all(os.environ.get(name) == value for name, value in limits.items())


class Session:
    """Holds contests and collects rows and notes.

    options: of :func:`add_common_arguments`.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        if options.isa:
            dass_kernels.set_isa(options.isa)
        self.document = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "facts": machine_facts(),
            "settings": {
                "rounds": options.rounds,
                "isa": dass_kernels.active_isa(),
                "dense_isa": _dense_isa(),
            },
            "rows": [],
            "seconds": {},
            "notes": [],
            "failures": [],
        }

    def hold(self, group: str, contests: Iterable[Contest]) -> None:
        """Holds a group's contests; what is missing becomes a note, a wrong result a failure."""
        start = time.perf_counter()
        try:
            for contest in contests:
                self._hold(contest)
                for reason in contest.missing:
                    self.note(f"{group}: {reason}")
        except NotAvailable as reason:
            self.note(f"{group}: {reason}")
        self.document["seconds"][group] = round(time.perf_counter() - start, 1)
        self.save()

    def _hold(self, contest: Contest) -> None:
        rounds = self.options.rounds
        try:
            row = hold(contest, rounds=rounds, seconds=rounds * ROUND_SECONDS)
        except ResultsDiffer as error:
            self.document["failures"].append(str(error))
            print(f"FAILED {error}", file=sys.stderr, flush=True)
            return
        self.document["rows"].append(row)
        print(progress_line(row), flush=True)

    def note(self, text: str) -> None:
        """Keeps and prints a remark, once."""
        if text not in self.document["notes"]:
            self.document["notes"].append(text)
            print(f"note: {text}", flush=True)

    def save(self) -> None:
        """Writes the document so far, whole or not at all."""
        path = self.options.json
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.document, indent=1) + "\n")
        os.replace(part, path)


def run(contests: Iterable[Contest], options: argparse.Namespace) -> None:
    """Holds contests that belong to no figure and prints their table."""
    session = Session(options)
    session.hold("run", contests)
    print("\n" + rows_table(session.document["rows"]))
    exit_on_failures(session.document)


def exit_on_failures(document: dict) -> None:
    if document["failures"]:
        raise SystemExit("some results differ: see above")


def _dense_isa() -> str:
    """What the environment keeps torch's libraries to."""
    return next((isa for isa, limits in DENSE_LIMITS.items() if _in_force(limits)), "best")


def progress_line(row: dict) -> str:
    """E.g. ``conv1x1 64->256@56 90%: dense 61.2 us (nchw); module 20.1 us +-3%, 3.04x dense``."""
    times = row["times"]
    parts = [
        f"{baseline} {times[name]['median_us']:.1f} us ({name})"
        for baseline, name in row["fastest"].items()
    ]
    ours: dict[str, list[str]] = {}
    for pair, ratio in row["ratios"].items():
        name, baseline = pair.split("/", 1)
        ours.setdefault(name, []).append(f"{ratio:.2f}x {baseline}")
    for name, ratios in ours.items():
        time_us, spread = times[name]["median_us"], times[name]["spread"]
        parts.append(f"{name} {time_us:.1f} us +-{spread:.0%}, {', '.join(ratios)}")
    return f"{row['group']} {row['label']} {row['sparsity']:.0%}: " + "; ".join(parts)

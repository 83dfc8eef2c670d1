"""python -m bench.experiment list | run | latency | test | tables; see docs/results.md."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path

import typer

from bench.experiment import running, summary, timing
from bench.experiment.clock import used_hours
from bench.experiment.protocol import PROTOCOL, Protocol
from bench.experiment.rows import RESULTS, Row, read, rows, write
from dass import timing as clocks
from dass.session import session
from dass.training import TrainingError, evaluate

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "results.md"


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(prog="python -m bench.experiment", description=__doc__)
    commands = parsed.add_subparsers(dest="command", required=True)
    for name, what in (
        ("list", "every row: done, in progress, missing"),
        ("run", "run what is missing; broken off, the same command goes on"),
        ("latency", "time the trained networks, on a quiet machine"),
        ("test", "read the test set, once per trained network"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--system", help="one system (default: all)")
        command.add_argument("--sparsity", type=float, help="such as 0.99 (default: all)")
        command.add_argument("--seed", type=int, help="one seed (default: all)")
        command.add_argument("--runs", type=Path, default=Path("runs/experiment"))
        command.add_argument("--results", type=Path, default=RESULTS)
        if name == "run":
            command.add_argument("--cores", type=int, default=1, help="threads (default: 1)")
            command.add_argument("--commit", action="store_true", help="git commit each result")
        if name == "latency":
            command.add_argument("--table", action="store_true", help="only the table of times")
            command.add_argument("--seconds", type=float, default=1.0, help="per form")
    tables = commands.add_parser("tables", help="docs/results.md and its plots, from the results")
    tables.add_argument("--results", type=Path, default=RESULTS)
    tables.add_argument("--document", type=Path, default=DOCUMENT)
    return parsed


def chosen(options: argparse.Namespace, protocol: Protocol) -> list[Row]:
    return list(rows(protocol, options.system, options.sparsity, options.seed))


def state(row: Row, options: argparse.Namespace) -> str:
    """In words, for `list`."""
    found = read(row.file(options.results))
    if found:
        more = [k for k in ("latency", "test") if row.file(options.results, k).exists()]
        return " ".join((f"{found['held_out_accuracy']:.2%} held out", *more))
    stages = sorted((options.runs / row.label / "stages").glob("*.json"))
    started = (options.runs / row.label).exists()
    return f"in progress: {len(stages)} of 2 stages" if started else "missing"


def list_rows(options: argparse.Namespace, protocol: Protocol) -> None:
    for row in chosen(options, protocol):
        print(f"{row.label:28}  {state(row, options)}")
    print(f"{used_hours(options.runs):.1f} of {protocol.core_hours:g} core-hours used")


def run(options: argparse.Namespace, protocol: Protocol) -> None:
    """What is missing, in order; a row that has to wait for another step is passed over."""
    with session() as console, clocks.threads(options.cores):
        for row in chosen(options, protocol):
            if row.file(options.results).exists():
                continue
            if used_hours(options.runs) >= protocol.core_hours:
                console.print(f"stopped at {protocol.core_hours:g} core-hours")
                return
            try:
                running.run_row(row, protocol, options.runs, options.results, console)
            except (running.Blocked, TrainingError) as reason:
                console.print(f"passed over {row.label}: {reason}")
                continue
            if options.commit:
                commit(row, options.results)


def commit(row: Row, results: Path) -> None:
    """What a row has written, and nothing else that is staged."""
    files = [row.file(results).resolve(), row.search_file(results).resolve()]
    files = [file for file in files if file.exists()]
    for command in (["add"], ["commit", "-q", "-m", f"Result: {row.label}"]):
        subprocess.run(["git", *command, "--", *map(str, files)], cwd=results, check=True)


def latency(options: argparse.Namespace, protocol: Protocol) -> None:
    with session() as console:
        timing.fill(protocol, options.runs, console)
        for row in [] if options.table else chosen(options, protocol):
            if waits_for(row, options, "latency"):
                timing.time_row(row, protocol, options.runs, options.results, options.seconds)
                console.print(f"{row.label} timed")


def test(options: argparse.Namespace, protocol: Protocol) -> None:
    with session() as console:
        images = protocol.test()
        for row in chosen(options, protocol):
            if waits_for(row, options, "test"):
                network = running.trained(row, options.runs)
                found = evaluate(network, images)
                result = {"test_accuracy": found.accuracy, "test_images": found.images}
                write(row.file(options.results, "test"), result)
                console.print(f"{row.label} {found.accuracy:.2%}")


def waits_for(row: Row, options: argparse.Namespace, kind: str) -> bool:
    """Whether a row was trained in this folder of runs and has no file of that kind."""
    there = row.file(options.results).exists() and running.is_trained(row, options.runs)
    return there and not row.file(options.results, kind).exists()


def tables(options: argparse.Namespace, protocol: Protocol) -> None:
    summary.write_document(options.results, options.document, protocol)
    print(options.document)


COMMANDS: dict[str, Callable] = {
    "list": list_rows,
    "run": run,
    "latency": latency,
    "test": test,
    "tables": tables,
}


def main(arguments: list[str] | None = None, protocol: Protocol = PROTOCOL) -> None:
    options = parser().parse_args(arguments)
    try:
        COMMANDS[options.command](options, protocol)
    except typer.Exit as stop:  # what session() makes of an error, having told it
        raise SystemExit(stop.exit_code) from None


if __name__ == "__main__":
    main()

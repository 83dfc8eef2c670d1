"""Whole pruned networks in several inference runtimes, in one interleaved run.

    python -m bench.peers setup [NAMES]      each runtime into an environment of its own
    python -m bench.peers run --network mobilenet_v2 --size 224 --sparsity 0.9 0.95 --json FILE
    python -m bench.peers table FILES        the engine against each of them, in one table
    python -m bench.peers report FILES       that, a picture and memory into docs/benchmarks.md

See docs/peers.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from bench.contest import NotAvailable
from bench.peers import install, report, summary


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(prog="python -m bench.peers", description=_first_line())
    commands = parsed.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="install the runtimes; what is there is kept")
    known = ["torch", *install.ENVIRONMENTS]
    setup.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    setup.add_argument("--python", default=sys.executable, help="the Python to make them from")
    run = commands.add_parser("run", help="compare and time them")
    run.add_argument("--network", nargs="+", default=["mobilenet_v2"], help="of the zoo")
    run.add_argument(
        "--genotype",
        type=Path,
        metavar="FILE",
        help="a genotype.json of a search, for --network cells: a network as large as dass_tiny",
    )
    run.add_argument("--size", type=int, nargs="+", default=[None], help="pixels; 32 is CIFAR")
    run.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    run.add_argument("--batch", type=int, default=1)
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--rounds", type=int, default=7, help="turns of each runtime (default: 7)")
    run.add_argument("--seconds", type=float, default=0.2, help="length of a turn")
    run.add_argument("--peers", nargs="+", metavar="NAME", help="default: all that are set up")
    run.add_argument(
        "--dense",
        nargs="*",
        metavar="LAYER",
        help="layers left dense, by glob or word (default: first depthwise last)",
    )
    run.add_argument("--isa", choices=["avx2"], help="keep to it whatever can be kept to it")
    run.add_argument("--json", type=Path, help="write everything to this file")
    told = commands.add_parser("table", help="one table of what `run --json` wrote")
    told.add_argument("files", nargs="+", type=Path, metavar="FILE")
    wrote = commands.add_parser("report", help="write what `run --json` wrote into the documents")
    wrote.add_argument("files", nargs="+", type=Path, metavar="FILE")
    wrote.add_argument("--to", type=Path, default=Path("docs"), help="their folder (default: docs)")
    wrote.add_argument("--keep", type=Path, help="also copy what is shown of the files there")
    return parsed


def _first_line() -> str:
    return __doc__.split("\n")[0]


def set_up(options: argparse.Namespace) -> None:
    """Exits with 1 if a runtime could not be installed; the others are, then."""
    known = ["torch", *install.ENVIRONMENTS]
    if unknown := set(options.names) - set(known):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if failed := install.setup_all(options.names or known, options.python):
        raise SystemExit(f"not set up: {', '.join(failed)}")


def run(options: argparse.Namespace) -> dict:
    """Compares; returns the document that --json writes, after each network anew."""
    from bench import session
    from bench.peers import catalogue, models, race

    exclude = models.EXCLUDE if options.dense is None else options.dense
    wanted = list(itertools.product(options.network, options.size, options.sparsity))
    try:
        race.cores(options.threads)
        if options.genotype and options.network != ["cells"]:
            raise ValueError("--genotype goes with --network cells")
        if options.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {options.rounds}")
        for network, size, _ in wanted:
            models.input_shape(network, size)
        peers, reasons = catalogue.available(options.peers)
    except (NotAvailable, ValueError) as reason:
        raise SystemExit(str(reason)) from None
    held = session.Session(options)
    held.document["settings"] |= {"seconds": options.seconds, "reference": catalogue.REFERENCE}
    held.document["settings"]["dense_isa"] = options.isa or "best"  # of the workers
    if options.isa:
        reasons += [f"{p.name}: --isa {options.isa} is without it" for p in peers if p.cpu_flags]
        peers = [peer for peer in peers if not peer.cpu_flags]
    for reason in reasons:
        held.note(f"left out: {reason}")
    how = {"threads": options.threads, "rounds": options.rounds, "seconds": options.seconds}
    how["limits"] = catalogue.LIMITS[options.isa]
    for network, size, sparsity in wanted:
        with tempfile.TemporaryDirectory(prefix="dass-peers-") as folder:
            case = models.make(
                network,
                sparsity,
                Path(folder),
                size=size,
                batch=options.batch,
                exclude=exclude,
                genotype=options.genotype,
            )
            result = race.compare(case, peers, **how)
        result["isa"] = held.document["settings"]["isa"]
        held.document["rows"].append(result)
        held.document["failures"] += [
            f"{result['network']} {sparsity}: {name}: {why}"
            for name, why in result["failures"].items()
        ]
        held.save()
        print(f"\n{race.table(result)}", flush=True)
    return held.document


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.command == "setup":
        set_up(options)
    elif options.command == "table":
        documents = summary.read(options.files)
        print(f"{summary.machine(documents)}\n\n{summary.table(summary.comparisons(documents))}")
    elif options.command == "report":
        try:
            print(*report.write(options.files, options.to, options.keep), sep="\n")
        except ValueError as reason:
            raise SystemExit(str(reason)) from None
    elif failures := run(options)["failures"]:
        raise SystemExit(f"{len(failures)} without a time: see above")


if __name__ == "__main__":
    main()

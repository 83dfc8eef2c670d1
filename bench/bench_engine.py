"""The engine by itself: two threads over one, what removing dead channels gives, memory.

    python -m bench.bench_engine --rounds 15 --json FILE
    python -m bench.bench_engine --part memory --peers FILES

- ``threads``: networks at 95 % zeros on one thread and on two, and what a line of the cache takes
  from one core to the other and back, before and after (:mod:`bench.cache_line`).
- ``dead``: networks at 99 % zeros in all layers, with the channels that are constant or unread
  taken out, as `dass.compile` does, and with all of them left; both against float64.
- ``memory``: a process that loads an engine's file and runs it, one that only imports torch, and
  OpenVINO's from files of ``python -m bench.peers run --json``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import dass
import dass_kernels
from bench import cache_line, session
from bench.contest import Contest, Entry, NotAvailable
from bench.inference import two_threads
from bench.peers import models, race, summary
from bench.peers.catalogue import PEERS, REFERENCE
from bench.table import machine_line, markdown
from dass.engine import tuning
from dass.engine.capture import capture
from dass.engine.compiler import Engine
from dass.engine.passes import simplify
from dass.latency import relative_error

ROOT = Path(__file__).resolve().parent.parent
NETWORKS = (("mobilenet_v2", 224), ("resnet18", 224), ("resnet50", 224))
SPARSITY = 0.95
DEAD_NETWORKS = (("mobilenet_v2", 32), ("mobilenet_v2", 224), ("dass_tiny", 32))
DEAD_SPARSITY = 0.99
IMPORT_TORCH = "import numpy, torch; from bench.peers.worker import memory; print(memory()['peak'])"


def thread_contests(networks: Iterable[tuple[str, int]] = NETWORKS) -> Iterator[Contest]:
    """One engine on two threads and on one, which must give the same bits.

    Raises:
        NotAvailable: this process may use one core only.
    """
    try:
        cache_line.first_two_cores()
    except ValueError as reason:
        raise NotAvailable(str(reason)) from None
    for network, size in networks:
        yield thread_contest(network, size)


def thread_contest(network: str, size: int, sparsity: float = SPARSITY) -> Contest:
    with tempfile.TemporaryDirectory() as folder:
        case = models.make(network, sparsity, Path(folder), size=size)
    engine = dass.compile(case.model, case.example)
    return two_threads(lambda: engine(case.example), network, f"{network} {size}", sparsity)


def dead_contests(networks: Iterable[tuple[str, int]] = DEAD_NETWORKS) -> Iterator[Contest]:
    for network, size in networks:
        yield dead_contest(network, size)


def dead_contest(network: str, size: int, sparsity: float = DEAD_SPARSITY) -> Contest:
    """The engine with dead channels taken out, against the engine that computes them all.

    The row has each one's largest error against float64, too.
    """
    with tempfile.TemporaryDirectory() as folder:
        case = models.make(network, sparsity, Path(folder), size=size, exclude=())
    x = case.example
    with torch.inference_mode():
        exact = dass.densify(case.model).double()(x.double())
    graph = capture(case.model, x)
    engines, facts = {}, {}
    for name, keep in (("removed", False), ("kept", True)):
        engine = Engine(*simplify(graph, keep_dead=keep), tune=True, cache=tuning.cache_file())
        engine.prepare(x)
        engines[name], facts[name] = engine, facts_of(engine)
        facts[name]["error"] = relative_error(engine(x).double(), exact)
    return Contest(
        group="dead",
        kind=network,
        label=f"{network} {size}",
        sparsity=sparsity,
        entries={name: Entry(lambda e=engine: e(x)) for name, engine in engines.items()},
        baselines={"all channels": ("kept",)},
        tolerance=1e-5,
        facts={"engines": facts},
    )


def facts_of(engine: Engine) -> dict[str, int]:
    """Nodes, channels of all nodes, weights that are multiplied, steps, bytes of activations."""
    told = engine.explain()
    return {
        "nodes": len(engine.graph.nodes),
        "channels": sum(node.shape[0] for node in engine.graph),
        "nonzeros": told.facts["nonzeros"],
        "steps": len(told.steps),
        "arena_bytes": round(told.facts["arena_mib"] * summary.MEBIBYTE),
    }


def memory_rows(
    files: Iterable[Path], networks: Iterable[tuple[str, int]] = NETWORKS, sparsity=SPARSITY
) -> Iterator[dict]:
    """Per network: peak resident bytes of the engine's process, of torch alone, of OpenVINO's."""
    code = [sys.executable, "-c", IMPORT_TORCH]
    torch_alone = int(subprocess.run(code, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    peaks = reference_peaks(files)
    for network, size in networks:
        with tempfile.TemporaryDirectory() as folder:
            case = models.make(network, sparsity, Path(folder), size=size)
            limits = {"DASS_ISA": dass_kernels.active_isa()}
            with race.start(case, PEERS["dass-engine"], 1, limits) as worker:
                error = race.check(case, PEERS["dass-engine"])
                worker.times_ns(10)
                peak = worker.memory()["peak"]
            file_bytes = case.path("engine").stat().st_size
        yield {
            "network": case.facts["network"],
            "size": size,
            "batch": 1,
            "sparsity": sparsity,
            "error": error,
            "file_bytes": file_bytes,
            "peak": peak,
            "torch_alone": torch_alone,
            "reference_peak": peaks.get((case.facts["network"], size, 1, sparsity)),
        }


def reference_peaks(files: Iterable[Path]) -> dict[tuple, int]:
    """(network, size, batch, sparsity) -> peak bytes of OpenVINO's process on one thread."""
    rows = [row for document in summary.read(files) for row in document["rows"]]
    return {
        (row["network"], row["size"], row["batch"], row["sparsity"]): found["memory_bytes"]["peak"]
        for row in rows
        if row["threads"] == 1 and (found := summary.peer_rows(row).get(REFERENCE))
    }


def table(document: dict) -> str:
    """All parts that a run has, in Markdown."""
    groups = {name: [r for r in document["rows"] if r["group"] == name] for name in _TABLES}
    groups["memory"] = document.get("memory", [])
    parts = [machine_line(document), *map(cache_line.words, document.get("cache_line", []))]
    parts += [_TABLES[name](rows) for name, rows in groups.items() if rows]
    return "\n\n".join(parts)


def _thread_table(rows: Iterable[dict]) -> str:
    header = ["network", "zeros", "one thread ms", "spread", "two threads ms", "spread", "x"]
    lines = []
    for row in rows:
        one, two = row["times"]["one"], row["times"]["two"]
        times = [*_time(one), *_time(two), f"{row['ratios']['two/one thread']:.2f}"]
        lines.append([row["label"], f"{row['sparsity']:.0%}", *times])
    return markdown(header, lines)


def _dead_table(rows: Iterable[dict]) -> str:
    keys = ("nodes", "channels", "nonzeros", "steps")
    header = ["network", "zeros", "dead channels", *keys, "MiB", "error", "ms", "spread", "x"]
    lines = []
    for row in rows:
        for name, facts in row["engines"].items():
            counts = [f"{facts[key]:,}" for key in keys]
            counts.append(f"{facts['arena_bytes'] / summary.MEBIBYTE:.2f}")
            ratio = f"{row['ratios']['removed/all channels']:.2f}" if name == "removed" else ""
            times = [f"{facts['error']:.1e}", *_time(row["times"][name]), ratio]
            lines.append([row["label"], f"{row['sparsity']:.0%}", name, *counts, *times])
    return markdown(header, lines)


def _memory_table(rows: Iterable[dict]) -> str:
    header = ["network", "zeros", "file MiB", "peak MiB", "torch alone", "above it"]
    lines = []
    for row in rows:
        sizes = [
            row["file_bytes"],
            row["peak"],
            row["torch_alone"],
            row["peak"] - row["torch_alone"],
        ]
        reference = row["reference_peak"]
        what = summary.network(row).removesuffix(", batch 1")
        lines.append(
            [
                what,
                f"{row['sparsity']:.0%}",
                *map(_mebibytes, sizes),
                _mebibytes(reference) if reference else "",
                f"{row['peak'] / reference:.2f}" if reference else "",
            ]
        )
    return markdown([*header, f"peak of {REFERENCE}", "ratio"], lines)


def _time(sample: dict) -> tuple[str, str]:
    return f"{sample['median_us'] / 1e3:.3f}", f"{sample['spread']:.0%}"


def _mebibytes(count: int) -> str:
    return f"{count / summary.MEBIBYTE:.1f}"


_TABLES = {"threads": _thread_table, "dead": _dead_table, "memory": _memory_table}


def run(options: argparse.Namespace) -> dict:
    held = session.Session(options)
    document = held.document
    if "threads" in options.part:
        lines = document["cache_line"] = []
        _hand_over(held, lines)
        held.hold("threads", thread_contests())
        _hand_over(held, lines)
    if "dead" in options.part:
        held.hold("dead", dead_contests())
    if "memory" in options.part:
        document["memory"] = list(memory_rows(options.peers))
    held.save()
    return document


def _hand_over(held: session.Session, lines: list[dict]) -> None:
    try:
        lines.append(cache_line.round_trip(cache_line.first_two_cores()))
        print(cache_line.words(lines[-1]), flush=True)
    except ValueError as reason:
        held.note(f"a line of the cache: {reason}")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    session.add_common_arguments(found)
    found.add_argument("--part", nargs="+", choices=list(_TABLES), default=list(_TABLES))
    published = sorted((ROOT / "bench/results/peers").glob("*.json"))
    found.add_argument(
        "--peers", nargs="+", type=Path, default=published, metavar="FILE",
        help="of `python -m bench.peers run --json` (default: the published ones)",
    )  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> None:
    document = run(session.parse(parser(), arguments))
    print("\n" + table(document))
    session.exit_on_failures(document)


if __name__ == "__main__":
    main()

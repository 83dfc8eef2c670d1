"""Peers on one network: outputs compared first, then timed in turn; rows and their table."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import numpy as np
import torch

from bench.contest import NotAvailable
from bench.peers.catalogue import REFERENCE, TOLERANCES, Peer
from bench.peers.client import Worker, WorkerError
from bench.peers.models import Case
from bench.table import markdown
from dass import timing
from dass.latency import relative_error
from dass.timing import Sample, speedup

SETTLE_SECONDS = 0.02  # for threads of the last worker that still spin
MOST_INFERENCES = 10_000  # per round
MEBIBYTE = 1 << 20


def compare(
    case: Case,
    peers: Iterable[Peer],
    *,
    threads: int = 1,
    rounds: int = 7,
    seconds: float = 0.2,
    limits: Mapping[str, str] | None = None,
) -> dict:
    """Checks every peer's output and times those that agree, in turn.

    Args:
        threads: for each peer; all run on the same processor cores.
        rounds: turns of each peer. seconds: a turn's length, at least one inference.
        limits: environment of every worker, see ``catalogue.LIMITS``.

    Returns:
        case.facts with ``threads``, ``cpus`` (numbers of the cores), ``rows`` (see :func:`row`) and
        ``failures`` (peer -> why it has no row: it failed, or its output differs).

    Raises:
        ValueError: no such number of threads.
    """
    result = {**case.facts, "threads": threads, "cpus": cores(threads), "rows": [], "failures": {}}
    failures = result["failures"]
    with ExitStack() as stack:
        workers, errors = {}, {}
        for peer in peers:
            try:
                worker = stack.enter_context(start(case, peer, threads, limits))
                errors[peer] = check(case, peer)
                workers[peer] = worker
            except (WorkerError, NotAvailable) as reason:
                failures[peer.name] = str(reason)
        samples, memory = race(workers, rounds, seconds, failures)
    reference = next((s for peer, s in samples.items() if peer.name == REFERENCE), None)
    result["rows"] = [
        row(peer, workers[peer].facts, sample, errors[peer], memory[peer], reference)
        for peer, sample in samples.items()
    ]
    return result


def cores(threads: int) -> list[int]:
    """The first of the cores that this process may use; ValueError if there are too few."""
    known = hasattr(os, "sched_getaffinity")
    allowed = sorted(os.sched_getaffinity(0)) if known else list(range(os.cpu_count() or 1))
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"threads must be 1 to {len(allowed)}, the cores there are; got {threads}")
    return allowed[:threads]


def start(case: Case, peer: Peer, threads: int, limits: Mapping[str, str] | None = None) -> Worker:
    """A worker that has loaded the network, run it once and written its output."""
    with timing.threads(threads):  # an engine is measured in this process, then saved
        model = case.path(peer.form)
    job = {
        "runtime": peer.runtime,
        "entry": peer.entry,
        "model": str(model),
        "input": str(case.folder / "input.npy"),
        "output": str(_output(case, peer)),
        "threads": threads,
        "cpus": cores(threads),
    }
    worker = Worker(job, peer.environment, case.folder / f"{peer.name}.log", limits)
    if worker.facts["precision"] != peer.precision:
        worker.close()
        raise WorkerError(f"computes in {worker.facts['precision']}, not in {peer.precision}")
    return worker


def _output(case: Case, peer: Peer):
    return case.folder / f"{peer.name}.npy"


def check(case: Case, peer: Peer) -> float:
    """Largest difference of a peer's output from torch's, over torch's largest output.

    Raises:
        WorkerError: another shape, or more than the precision's tolerance.
    """
    got = torch.from_numpy(np.load(_output(case, peer)))
    if got.shape != case.want.shape:
        raise WorkerError(f"output of shape {tuple(got.shape)}, not {tuple(case.want.shape)}")
    error, allowed = relative_error(got.float(), case.want), TOLERANCES[peer.precision]
    if not error <= allowed:
        raise WorkerError(
            f"not timed: its output differs by {error:.2g} of the largest, allowed {allowed:g}"
        )
    return error


def race(
    workers: Mapping[Peer, Worker], rounds: int, seconds: float, failures: dict[str, str]
) -> tuple[dict[Peer, Sample], dict[Peer, dict]]:
    """Times workers in turn, each round in the opposite order of the last.

    A round's number is the median of its inferences. A peer that fails on the way is left out and
    gets a line in `failures`.
    """
    counts: dict[Peer, int] = {}
    times: dict[Peer, list[float]] = {peer: [] for peer in workers}
    memory: dict[Peer, dict] = {}
    # The first turn finds out how many inferences a round takes; the last asks for the memory.
    for turn in range(rounds + 2):
        for peer in list(times)[:: -1 if turn % 2 else 1]:
            time.sleep(SETTLE_SECONDS)
            try:
                if turn == 0:
                    counts[peer] = inferences(workers[peer], seconds)
                elif turn <= rounds:
                    times[peer].append(statistics.median(workers[peer].times_ns(counts[peer])))
                else:
                    memory[peer] = workers[peer].memory()
            except WorkerError as reason:
                del times[peer]
                failures[peer.name] = str(reason)
    return {p: Sample(tuple(t / 1e3 for t in ns), counts[p]) for p, ns in times.items()}, memory


def inferences(worker: Worker, seconds: float) -> int:
    """How many of them last so long; also the warm-up."""
    count = 1
    while True:
        took = 1e-9 * statistics.median(worker.times_ns(count))
        wanted = max(1, min(MOST_INFERENCES, round(seconds / max(took, 1e-9))))
        if count >= wanted / 2:
            return wanted
        count = min(wanted, 8 * count)


def row(
    peer: Peer, facts: Mapping, sample: Sample, error: float, memory: Mapping, reference
) -> dict:
    """A peer's line: what it is, times in microseconds, bytes, and how much faster it is.

    reference: the Sample that ``ratio`` compares with, round by round; None gives None.
    """
    return {
        "peer": peer.name,
        **{k: v for k, v in facts.items() if k != "ready"},
        "layout": peer.layout,
        "error": error,
        "tolerance": TOLERANCES[peer.precision],
        **sample.to_dict(),
        "inferences": sample.calls,
        "times_us": list(sample.times_us),
        "memory_bytes": dict(memory),
        "ratio": None if reference is None else speedup(reference, sample),
    }


def title(result: Mapping) -> str:
    """E.g. ``mobilenet_v2_imagenet, 224 x 224, batch 1, 1 thread, 95 % zeros: ...``."""
    zeros = 1 - result["nonzeros"] / result["weights"]
    threads = f"{result['threads']} thread" + ("s" if result["threads"] > 1 else "")
    dense = ", ".join(result["dense_layers"]) or "none"
    return (
        f"{result['network']}, {result['size']} x {result['size']}, batch {result['batch']}, "
        f"{threads}, {result['sparsity']:.0%} zeros ({zeros:.1%} of all weights; dense: {dense})"
    )


def table(result: Mapping) -> str:
    """The rows of :func:`compare` in Markdown, fastest first, and what failed below it."""
    header = ["runtime", "version", "precision", "layout", "threads", "ms", "spread", "peak MiB"]
    lines = [
        [
            row["peer"],
            row["version"],
            row["precision"],
            row["layout"],
            str(result["threads"]),
            f"{row['median_us'] / 1e3:.3f}",
            f"{row['spread']:.0%}",
            f"{row['memory_bytes'].get('peak', math.nan) / MEBIBYTE:.0f}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        ]
        for row in sorted(result["rows"], key=lambda row: row["median_us"])
    ]
    parts = [title(result), markdown([*header, f"x {REFERENCE}"], lines)]
    parts += ["\n".join(f"- {name}: {why}" for name, why in result["failures"].items())]
    return "\n\n".join(filter(None, parts))

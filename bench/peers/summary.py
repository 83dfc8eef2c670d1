"""Many comparisons in one table: how many times as fast as each peer the engine is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.peers.catalogue import PEERS
from bench.peers.models import EXCLUDE, IMAGENET
from bench.table import markdown

OURS = ("dass-compile", "dass-engine")  # the first one that was timed counts
ISAS = {"avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON", "scalar": "scalar"}
MEBIBYTE = 1 << 20


def read(files: Iterable[Path]) -> list[dict]:
    """The documents that ``run --json`` wrote, every comparison with its instruction set."""
    found = [json.loads(file.read_text()) for file in files]
    for document in found:
        for row in document["rows"]:
            row.setdefault("isa", document["settings"]["isa"])
    return found


def comparisons(documents: Iterable[Mapping]) -> list[dict]:
    """All that have a time of the engine: by setting, then large images, then small networks."""
    order = list(ISAS)
    rows = [row for document in documents for row in document["rows"] if ours(row)]
    return sorted(
        rows,
        key=lambda c: (
            order.index(c["isa"]), c["threads"], -c["size"], c["weights"], c["batch"],
            c["sparsity"],
        ),
    )  # fmt: skip


def ours(comparison: Mapping) -> dict | None:
    """The engine's row."""
    rows = peer_rows(comparison)
    return next((rows[name] for name in OURS if name in rows), None)


def peer_rows(comparison: Mapping) -> dict[str, dict]:
    return {row["peer"]: row for row in comparison["rows"]}


def peer_names(rows: Iterable[Mapping]) -> list[str]:
    """Of those that were timed in any of the comparisons, in the catalogue's order."""
    found = {name for row in rows for name in peer_rows(row)}
    return [name for name in PEERS if name in found]


def setting(comparison: Mapping) -> str:
    """E.g. ``2 threads, AVX-512``."""
    count = comparison["threads"]
    threads = "1 thread" if count == 1 else f"{count} threads"
    return f"{threads}, {ISAS[comparison['isa']]}"


def network(comparison: Mapping) -> str:
    """E.g. ``mobilenet_v2 224, batch 1``; the size says which form of the network it is."""
    name = comparison["network"].removesuffix(IMAGENET)
    return f"{name} {comparison['size']}, batch {comparison['batch']}"


def title(comparison: Mapping) -> str:
    return f"{network(comparison)}, {setting(comparison)}"


def table(rows: Iterable[Mapping]) -> str:
    """A row per comparison; a ratio is the peer's median over the engine's in the same run.

    A peer that was not timed has none.
    """
    rows = [row for row in rows if ours(row)]
    names = [name for name in peer_names(rows) if name not in OURS]
    lines = []
    for row in rows:
        times = {name: found["median_us"] for name, found in peer_rows(row).items()}
        mine = ours(row)["median_us"]
        ratios = [f"{times[name] / mine:.2f}" if name in times else "" for name in names]
        lines.append([title(row), f"{row['sparsity']:.0%}", f"{mine / 1e3:.3f}", *ratios])
    return markdown(["network", "zeros", "dass ms", *(f"x {name}" for name in names)], lines)


def memory_table(rows: Iterable[Mapping]) -> str:
    """Peak MiB of every peer's process."""
    rows = list(rows)
    names = peer_names(rows)
    lines = []
    for row in rows:
        found = peer_rows(row)
        peaks = [
            f"{found[n]['memory_bytes']['peak'] / MEBIBYTE:.0f}" if n in found else ""
            for n in names
        ]
        lines.append([network(row), f"{row['sparsity']:.0%}", *peaks])
    return markdown(["network", "zeros", *names], lines)


def machine(documents: Iterable[Mapping]) -> str:
    """Processor, caches, cores, system, builds and days; a line for each machine there is."""
    lines: dict[str, list[Mapping]] = {}
    for document in documents:
        facts = document["facts"]
        caches = ", ".join(f"{name} {size}" for name, size in facts["caches"].items())
        line = (
            f"{facts['cpu']}, {facts['machine_cores']} cores, {caches}; {system(facts)}; "
            f"torch {facts['torch']}; Python {facts['python']}"
        )
        lines.setdefault(line, []).append(document)
    return "\n".join(f"{line}; {_when(found)}." for line, found in lines.items())


def system(facts: Mapping) -> str:
    """``Linux 6.18.44 x86_64``: without what a distribution adds to the kernel's version."""
    return re.sub(r"^(\S+ [\d.]+)\S*", r"\1", facts["system"])


def _when(documents: Iterable[Mapping]) -> str:
    days = sorted({document["date"][:10] for document in documents})
    rounds = sorted({document["settings"]["rounds"] for document in documents})
    return f"{', '.join(days)}; {' or '.join(map(str, rounds))} rounds"


def versions(rows: Iterable[Mapping]) -> str:
    """E.g. ``mnn 3.6.1, openvino 2026.4.1``, each version once."""
    found = {}
    for row in rows:
        for name, peer in peer_rows(row).items():
            found.setdefault(name, []).append(peer["version"])
    return ", ".join(f"{n} {' or '.join(dict.fromkeys(found[n]))}" for n in PEERS if n in found)


def notes(rows: Iterable[Mapping]) -> list[str]:
    """What a reader of the table must know: other layers, limits, peers without a time."""
    rows, found = list(rows), []
    for row in rows:
        if row["dense_layers"] != list(EXCLUDE):
            dense = ", ".join(row["dense_layers"]) or "none"
            found.append(f"{network(row)}, {row['sparsity']:.0%}: layers left dense: {dense}.")
    if any(row["isa"] == "avx2" for row in rows):
        found.append(
            "AVX2: this library, OpenVINO, DeepSparse and torch are kept to it; onnxruntime and "
            "MNN have no such switch and use what the processor has."
        )
    for row in rows:
        where = f"{title(row)}, {row['sparsity']:.0%}"
        found += [f"{where}: {name}: {why}." for name, why in row["failures"].items()]
    return list(dict.fromkeys(found))

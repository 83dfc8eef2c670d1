"""The section on other runtimes in docs/benchmarks.md, and its picture, from files of runs."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from bench.peers import chart, summary

PAGE, PICTURE = "benchmarks.md", "peers.svg"
BEGIN = "<!-- peers:begin: `python -m bench.peers report` writes what is between these lines -->"
END = "<!-- peers:end -->"
# What the report and a doubtful reader need.
_FACTS = ("cpu", "machine_cores", "caches", "system", "python", "torch")
_COMPARISON = (
    *("network", "size", "batch", "sparsity", "threads", "isa", "dense_layers", "weights"),
    *("nonzeros", "failures"),
)
_PEER = (
    *("peer", "version", "precision", "layout", "load_seconds", "error", "median_us", "spread"),
    *("times_us", "memory_bytes", "ratio"),
)


def write(files: Sequence[Path], folder: Path, keep: Path | None = None) -> list[Path]:
    """Rewrites the section and the picture in `folder`; returns what was written.

    Args:
        files: of ``run --json``, or what an earlier report kept. None may repeat a comparison.
        keep: a folder for copies of the files with what the report needs; None: none.

    Raises:
        ValueError: nothing with a time of the engine and of OpenVINO, a comparison twice, or no
            such section.
    """
    documents = summary.read(files)
    rows = summary.comparisons(documents)
    page = folder / PAGE
    text = replaced(page.read_text(), section(documents, rows), page)
    written = {folder / PICTURE: chart.draw(rows, _reference(documents)), page: text}
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for file, document in zip(files, documents, strict=True):
            written[keep / file.name] = json.dumps(trimmed(document)) + "\n"
    for path, content in written.items():
        path.write_text(content)
    return list(written)


def section(documents: Sequence[Mapping], rows: Sequence[Mapping]) -> str:
    """Machine, versions, picture, the table of times, what to know of it, the table of memory.

    Raises:
        ValueError: no comparison, or one twice.
    """
    if not rows:
        raise ValueError(f"no comparison with a time of {' or '.join(summary.OURS)}")
    told = Counter(f"{summary.title(row)}, {row['sparsity']:.0%}" for row in rows)
    if twice := [what for what, count in told.items() if count > 1]:
        raise ValueError(f"compared more than once: {'; '.join(twice)}")
    first = list(next(groupby(rows, summary.setting))[1])
    parts = [
        _wrapped(f"{summary.machine(documents)} {summary.versions(rows)}."),
        f"![Times as fast as {_reference(documents)}]({PICTURE})",
        summary.table(rows),
        "\n".join(_wrapped(f"- {note}", "  ") for note in summary.notes(rows)),
        f"Peak MiB of each process, {summary.setting(first[0])}:",
        summary.memory_table(first),
    ]
    return "\n\n".join(filter(None, parts))


def replaced(page: str, text: str, path: Path) -> str:
    """The page with `text` between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def trimmed(document: Mapping) -> dict:
    """A document of the same form without what no table and no picture shows."""
    facts = {key: document["facts"][key] for key in _FACTS}
    rows = [
        {
            **{key: row[key] for key in _COMPARISON},
            "rows": [{key: peer[key] for key in _PEER} for peer in row["rows"]],
        }
        for row in document["rows"]
    ]
    return {
        "date": document["date"],
        "facts": {**facts, "system": summary.system(facts)},
        "settings": document["settings"],
        "rows": rows,
    }


def _wrapped(text: str, indent: str = "") -> str:
    """Lines as long as those around them."""
    return textwrap.fill(text, 108, subsequent_indent=indent, break_on_hyphens=False)


def _reference(documents: Sequence[Mapping]) -> str:
    return documents[0]["settings"]["reference"]

"""What is told of many comparisons with other runtimes: table, picture, section of a document."""

import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.importorskip("bench.peers", reason="the benchmarks are not part of this tree")

from bench.peers import __main__ as command
from bench.peers import chart, report, summary

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"
PAGE = f"# Before\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n"


def comparison(network, times, **more):
    """One row of `run --json`; times: peer -> ms."""
    reference = times.get("openvino")
    rows = [
        {
            "peer": name, "version": "1.2", "precision": "fp32", "layout": "NCHW",
            "load_seconds": 1.0, "error": 1e-6, "tolerance": 1e-4, "median_us": 1e3 * ms,
            "spread": 0.01, "rounds": 1, "inferences": 5, "times_us": [1e3 * ms], "numpy": "2",
            "memory_bytes": {"peak": 3 << 20, "now": 2 << 20},
            "ratio": reference / ms if reference else None,
        }
        for name, ms in times.items()
    ]  # fmt: skip
    facts = {
        "network": network, "size": 32, "batch": 1, "sparsity": 0.95, "threads": 1, "cpus": [0],
        "dense_layers": ["first", "depthwise", "last"], "weights": 1000, "nonzeros": 100,
        "failures": {},
    }  # fmt: skip
    return {**facts, **more, "rows": rows}


def document(*rows, isa="avx512", **facts):
    facts = {
        "cpu": "Some CPU", "cores": 1, "machine_cores": 2, "caches": {"L2 Unified": "1024K"},
        "system": "Linux 6.1.2-of-someone x86_64", "python": "3.11.7", "torch": "2.13.0",
    } | facts  # fmt: skip
    settings = {"rounds": 5, "isa": isa, "reference": "openvino"}
    date = "2026-11-25T00:11:47+00:00"
    return {
        "date": date, "facts": facts, "settings": settings, "rows": list(rows), "notes": ["n"],
    }  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Writes documents, and a page with a section to fill."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / report.PAGE).write_text(PAGE)

    def write(*documents):
        paths = [tmp_path / f"{i}.json" for i in range(len(documents))]
        for path, found in zip(paths, documents, strict=True):
            path.write_text(json.dumps(found))
        return paths

    return write


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_many_comparisons_in_one_table(files):
    kept = document(comparison("a", {"dass-compile": 2.0, "mnn": 4.0}), isa="avx2")
    first = document(
        comparison("b", {"dass-compile": 1.0, "openvino": 2.5, "onnxruntime": 3.0}, weights=2000),
        comparison("a", {"mnn": 1.5, "dass-engine": 0.52, "dass-compile": 0.5}, batch=16),
        comparison("a", {"dass-engine": 0.25, "mnn": 1.0}, threads=2),
        comparison("net_imagenet", {"dass-compile": 3.0, "openvino": 9.0}, size=224, sparsity=0.9),
        comparison("c", {"openvino": 1.0}),  # the engine was not timed: no row
    )
    told = cells(summary.table(summary.comparisons(summary.read(files(kept, first)))))
    assert told[0] == ["network", "zeros", "dass ms", "x onnxruntime", "x openvino", "x mnn"]
    assert told[2:] == [
        ["net 224, batch 1, 1 thread, AVX-512", "90%", "3.000", "", "3.00", ""],
        ["a 32, batch 16, 1 thread, AVX-512", "95%", "0.500", "", "", "3.00"],
        ["b 32, batch 1, 1 thread, AVX-512", "95%", "1.000", "3.00", "2.50", ""],
        ["a 32, batch 1, 2 threads, AVX-512", "95%", "0.250", "", "", "4.00"],
        ["a 32, batch 1, 1 thread, AVX2", "95%", "2.000", "", "", "2.00"],
    ]


def test_the_row_knows_its_instruction_set_better_than_the_settings(files):
    row = comparison("a", {"dass-compile": 1.0}, isa="avx2")
    (found,) = summary.read(files(document(row)))
    assert summary.setting(found["rows"][0]) == "1 thread, AVX2"


def test_what_a_reader_must_know(files):
    rows = [
        comparison("a", {"dass-compile": 1.0}, failures={"mnn": "not timed: it differs"}),
        comparison("tiny", {"dass-compile": 1.0}, dense_layers=[]),
    ]
    assert summary.notes([{**row, "isa": "avx512"} for row in rows]) == [
        "tiny 32, batch 1, 95%: layers left dense: none.",
        "a 32, batch 1, 1 thread, AVX-512, 95%: mnn: not timed: it differs.",
    ]
    (limited,) = summary.notes([{**comparison("a", {"dass-compile": 1.0}), "isa": "avx2"}])
    assert "onnxruntime and MNN have no such switch" in limited


def test_the_machine_stands_above_the_table(files, capsys):
    row = comparison("a", {"dass-compile": 1.0, "openvino": 2.0})
    command.main(["table", *map(str, files(document(row), document(row, cpu="Another")))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "Some CPU, 2 cores, L2 Unified 1024K; Linux 6.1.2 x86_64; torch 2.13.0; Python 3.11.7; "
        "2026-11-25; 5 rounds."
    )
    assert lines[1].startswith("Another, ")
    assert cells("\n".join(lines[3:]))[2][-1] == "2.00"


def test_marks_stand_at_their_ratios():
    times = {"openvino": 2.0, "mnn": 4.0, "dass-compile": 0.5}
    row = {**comparison("a", times), "isa": "avx512"}
    text = chart.draw(
        [row, {**comparison("b", {"dass-compile": 1.0}), "isa": "avx512"}], "openvino"
    )
    root = ET.fromstring(text)
    words = {t.text: float(t.get("x")) for t in root.iter(f"{SVG}text")}
    assert {"a 32", "95% zeros", "1 thread, AVX-512", "mnn", "4.0"} <= set(words)
    assert "b 32" not in words  # nothing to compare it with
    at = {float(text): words[text] for text in ("0.5", "1", "2", "4")}
    step = at[1] - at[0.5]
    assert all(at[r] == pytest.approx(at[1] + step * math.log2(r), abs=0.2) for r in at)
    ours = [float(c.get("cx")) for c in root.iter(f"{SVG}circle")]
    assert ours[-1] == at[4]
    moved = [path.get("transform") for path in root.iter(f"{SVG}path") if path.get("transform")]
    assert [float(re.findall(r"[\d.]+", place)[0]) for place in moved][-1] == at[0.5]
    assert chart.draw([row], "openvino") == chart.draw([row], "openvino")
    with pytest.raises(ValueError, match="no comparison with mnn2"):
        chart.draw([row], "mnn2")


def test_a_report_replaces_its_section_only(files, tmp_path):
    times = {"openvino": 2.0, "dass-compile": 0.5}
    paths = files(document(comparison("a", times), comparison("b", times, threads=2)))
    docs, keep = tmp_path / "docs", tmp_path / "kept"
    command.main(["report", *map(str, paths), "--to", str(docs), "--keep", str(keep)])
    page, picture = (docs / report.PAGE).read_text(), (docs / report.PICTURE).read_text()
    assert page.startswith(f"# Before\n\n{report.BEGIN}\n\nSome CPU")
    assert page.endswith(f"\n\n{report.END}\n\nAfter.\n") and "old" not in page
    assert page.count("| a 32, batch 1") == 2  # times and memory
    assert page.count("| b 32, batch 1") == 1  # memory is told of the first setting
    assert picture.startswith("<svg")
    kept = json.loads((keep / "0.json").read_text())
    assert kept["rows"][0]["rows"][0]["times_us"] == [2000.0]
    assert "numpy" not in kept["rows"][0]["rows"][0] and "notes" not in kept
    command.main(["report", str(keep / "0.json"), "--to", str(docs), "--keep", str(keep)])
    assert (docs / report.PAGE).read_text() == page
    assert (docs / report.PICTURE).read_text() == picture
    assert json.loads((keep / "0.json").read_text()) == kept


def test_a_report_that_cannot_be_written_changes_nothing(files, tmp_path):
    row = comparison("a", {"openvino": 2.0, "dass-compile": 0.5})
    docs = tmp_path / "docs"
    wrong = {
        "compared more than once: a 32, batch 1, 1 thread, AVX-512, 95%": [document(row, row)],
        "no comparison with a time of dass-compile": [document()],
        "no comparison with openvino": [document(comparison("a", {"dass-compile": 0.5}))],
    }
    for says, documents in wrong.items():
        with pytest.raises(SystemExit, match=says):
            command.main(["report", *map(str, files(*documents)), "--to", str(docs)])
    assert (docs / report.PAGE).read_text() == PAGE
    assert [path.name for path in docs.iterdir()] == [report.PAGE]
    (docs / report.PAGE).write_text("# No marks\n")
    with pytest.raises(SystemExit, match="has no lines"):
        command.main(["report", *map(str, files(document(row))), "--to", str(docs)])


def test_the_documents_say_what_the_kept_files_say(tmp_path):
    kept, docs = sorted((ROOT / "bench/results/peers").glob("*.json")), ROOT / "docs"
    if not kept or not (docs / report.PAGE).exists():
        pytest.skip("not in the repository")
    for name in (report.PAGE, report.PICTURE):
        (tmp_path / name).write_text((docs / name).read_text())
    report.write(kept, tmp_path)
    for name in (report.PAGE, report.PICTURE):
        assert (tmp_path / name).read_text() == (docs / name).read_text()

"""The figures of the engine alone: equal results, what is counted, tables; no time is asserted."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.importorskip("bench.bench_engine", reason="the benchmarks are not part of this tree")

from bench import bench_engine, cache_line, contest
from bench.contest import NotAvailable
from dass.engine import roofline, tuning

SMALL = [("resnet20", 32)]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Measurements are short, and nothing reaches the user's cache."""
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "RUNS", 1)
    monkeypatch.setattr(roofline, "PICTURES", dict.fromkeys(roofline.PICTURES, (2, 256)))
    monkeypatch.setenv("DASS_CACHE", str(tmp_path / "cache"))


def run(*words):
    return bench_engine.run(bench_engine.parser().parse_args([*map(str, words), "--rounds", "1"]))


def test_one_engine_gives_the_same_bits_on_two_threads(monkeypatch):
    monkeypatch.setattr(cache_line, "first_two_cores", lambda: (0, 1))
    (found,) = bench_engine.thread_contests(SMALL)
    before, counts = torch.get_num_threads(), set()
    entry = found.entries["two"]
    entry.setup()
    counts.add(torch.get_num_threads())
    row = contest.hold(found, rounds=1, seconds=0)
    torch.set_num_threads(before)
    assert counts == {2} and found.tolerance == 0
    table = bench_engine.table({**document(), "rows": [row]}).splitlines()
    assert [cell.strip() for cell in table[-1].split("|")[1:3]] == ["resnet20 32", "95%"]


def test_threads_need_two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    with pytest.raises(NotAvailable, match="two cores"):
        list(bench_engine.thread_contests(SMALL))


def test_dead_channels_are_counted_and_change_no_result():
    (found,) = bench_engine.dead_contests(SMALL)
    row = contest.hold(found, rounds=1, seconds=0)  # checks that both give the same
    removed, kept = row["engines"]["removed"], row["engines"]["kept"]
    assert removed["channels"] < kept["channels"]
    assert removed["nonzeros"] < kept["nonzeros"]
    assert removed["steps"] <= kept["steps"] and removed["nodes"] <= kept["nodes"]
    assert removed["error"] <= 1e-5 and kept["error"] <= 1e-5
    table = bench_engine.table({**document(), "rows": [row]}).splitlines()
    assert [line.split("|")[3].strip() for line in table[-2:]] == ["removed", "kept"]
    assert f"{kept['channels']:,}" in table[-1]


def test_memory_is_that_of_a_process_that_loads_a_file(tmp_path):
    rows = [
        {
            "network": "resnet20", "size": 32, "batch": 1, "sparsity": 0.95, "threads": threads,
            "rows": [{"peer": "openvino", "memory_bytes": {"peak": peak}}],
        }
        for threads, peak in ((1, 100 << 20), (2, 900 << 20))
    ]  # fmt: skip
    file = tmp_path / "peers.json"
    file.write_text(json.dumps({"settings": {"isa": "avx512"}, "rows": rows}))
    (row,) = bench_engine.memory_rows([file], SMALL)
    assert row["error"] <= 1e-4 and row["reference_peak"] == 100 << 20
    assert row["peak"] > row["torch_alone"] > 1 << 26
    assert 0 < row["file_bytes"] < 1 << 20
    cells = [c.strip() for c in bench_engine.table({**document(), "memory": [row]}).split("|")]
    assert cells[-3] == "100.0" and cells[-2] == f"{row['peak'] / (100 << 20):.2f}"
    assert bench_engine.reference_peaks([]) == {}


def test_a_run_writes_the_parts_that_were_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    path = tmp_path / "out.json"
    found = run("--part", "threads", "--json", path)
    assert json.loads(path.read_text()) == found
    assert found["rows"] == [] and "memory" not in found
    assert "threads: two cores are needed" in found["notes"]
    assert "a line of the cache: two cores are needed" in found["notes"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
def test_two_processes_hand_a_line_over_and_end():
    core = min(os.sched_getaffinity(0))
    found = cache_line.round_trip((core, core), rounds=2, turns=1)  # they wait for their turns
    assert found["ns"] > 0 and found["interpreter_ns"] > 0
    assert cache_line.words(found).startswith(f"a line of the cache from core {core} to")
    with pytest.raises(RuntimeError, match="ended with status"):
        cache_line.round_trip((1 << 14, core), rounds=2, turns=1)


def document():
    facts = {"cpu": "Some CPU", "cores": 2, "caches": {}, "torch": "2"}
    settings = {"isa": "avx512", "dense_isa": "best", "rounds": 1}
    return {"facts": facts, "settings": settings, "date": "2026-11-25", "rows": []}

"""``dass search`` and ``dass latency-table``: folders, reports, predictions."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import dass
from dass import cli, search_cost
from dass.checkpoints import CheckpointError
from dass.latency_table import LatencyTable, blocks_of
from dass.strategies import SearchConfig
from dass.supernet import Supernet

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--data", "synthetic", "--size", "8", "--limit", "32", "--threads", "1"]
IMAGE = (3, 8, 8)


def ok(*words):
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def short(monkeypatch):
    """A search of a second, by the name of a preset."""
    tiny = {"channels": 4, "layers": 1, "epochs": (1, 1, 1), "batch_size": 8, "density": 0.1}
    monkeypatch.setitem(dass.strategies.PRESETS, "smoke", tiny)


def test_a_search_leaves_a_folder_and_is_not_repeated(short, tmp_path):
    folder = tmp_path / "run"
    command = ["search", "--preset", "smoke", *TINY, "--run", folder]
    output = ok(*command)
    assert "prune" in output and "skips in the two cells" in output
    genotype = dass.Genotype.from_json(folder / "genotype.json")
    svg = (folder / "cells.svg").read_text()
    edges = svg.count("data-op=")
    assert edges == 16 == (folder / "report.html").read_text().count("data-op=")
    found = json.loads((folder / "report.json").read_text())["data"]
    assert dass.Genotype.from_json(found["search"]["genotype"]) == genotype
    assert [row["phase"] for row in found["search"]["history"]] == ["pretrain", "prune", "finetune"]
    assert found["finetuning_step"]["speedup"] > 0 and found["finetuning_step"]["layers"] > 50
    assert not list(folder.glob("*.pt"))
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in logged] == [1, 2, 3]
    assert logged[0]["train_loss"] == found["search"]["history"][0]["train_loss"]
    before = (folder / "stages" / "search.json").read_text()
    ok(*command)
    assert (folder / "stages" / "search.json").read_text() == before
    small = ["--channels", "4", "--layers", "3", "--recipe", "smoke", "--sparsity", "0.8"]
    ok("sparse", folder, *small, *TINY, "--run", tmp_path / "trained")
    network = dass.load(tmp_path / "trained" / "model.safetensors")
    assert network.genotype == genotype and len(network.cells) == 3
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    missing = CliRunner().invoke(cli.app, ["sparse", str(tmp_path), *small, *TINY])
    assert missing.exit_code == 2 and "is no genotype" in " ".join(missing.output.split())


def test_what_the_user_gets_wrong_is_one_line(short, tmp_path):
    for words, message in (
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--preset", "smoke", "--density", "2"], "density and densities must be in (0, 1]"),
        (["--preset", "smoke", "--epochs", "1,x,1"], "--epochs must be whole numbers"),
        (
            ["--preset", "smoke", "--latency-weight", "1"],
            "latency_weight and latency_limit_us need",
        ),
    ):
        done = CliRunner().invoke(cli.app, ["search", *words, *TINY, "--run", str(tmp_path / "x")])
        assert done.exit_code == 2
        assert message in " ".join(done.output.split())


def test_the_estimate_counts_steps_and_bytes(monkeypatch):
    config = SearchConfig(channels=4, layers=1, batch_size=8, epochs=(2, 1, 3), size=8)
    data = dass.data.load("synthetic", train=True, size=8, limit=32)
    clock = itertools.count()
    monkeypatch.setattr(search_cost, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    guess = search_cost.estimate(config, data)
    again = search_cost.estimate(replace(config, recompute=True), data)
    assert guess.seconds == (32 // 2) // 8 * 6  # a second per step
    network = Supernet(4, 1, len(data.classes))
    assert guess.bytes > 3 * 4 * sum(p.numel() for p in network.parameters())
    assert again.bytes < guess.bytes


def test_a_table_measures_what_is_asked_for_and_keeps_it(tmp_path, monkeypatch):
    table = LatencyTable()
    first = table.time_us("sep_conv_3x3", (4, 8, 8), 4, density=0.1)
    assert first > 0
    monkeypatch.setattr(LatencyTable, "_measure", lambda *args: pytest.fail("measured twice"))
    assert table.time_us("sep_conv_3x3", (4, 8, 8), 4, density=0.1) == first
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json").rows == table.rows
    with pytest.raises(CheckpointError, match="threads 1, not 2"):
        LatencyTable.load(tmp_path / "table.json", threads=2)
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no latency table"):
        LatencyTable.load(tmp_path / "table.json")


def test_between_two_densities_the_time_is_interpolated(monkeypatch):
    times = {0.05: 10.0, 0.1: 20.0, 1.0: 50.0}
    monkeypatch.setattr(LatencyTable, "_measure", lambda self, *args: times[args[-1]])
    table = LatencyTable()
    assert table.time_us("dil_conv_3x3", (4, 8, 8), 4, density=0.075) == pytest.approx(15.0)
    assert table.time_us("dil_conv_3x3", (4, 8, 8), 4, density=0.05) == 10.0
    assert table.time_us("max_pool_3x3", (4, 8, 8), 4, density=0.05) == 50.0  # has no weights


def test_calibration_brings_the_sum_of_the_blocks_to_the_network(monkeypatch):
    monkeypatch.setattr(LatencyTable, "_measure", lambda self, name, shape, *rest: shape[0])
    monkeypatch.setattr(LatencyTable, "_glue", lambda self, name, shape, count: 1.0)
    monkeypatch.setattr(LatencyTable, "network_us", lambda self, *args: 1234.0)
    table = LatencyTable()
    table.calibrate(4, 3, 0.1, IMAGE)
    monkeypatch.undo()
    monkeypatch.setattr(LatencyTable, "_measure", lambda self, name, shape, *rest: shape[0])
    monkeypatch.setattr(LatencyTable, "_glue", lambda self, name, shape, count: 1.0)
    sums = []
    for seed in (1_000_001, 1_000_002):
        network = dass.build(dass.Genotype.random(seed), channels=4, layers=3, classes=10)
        sums.append(table.predict_us(network, 0.1, IMAGE) / table.factor)
    assert table.factor == pytest.approx(sum(1234.0 / s for s in sums) / 2)


def test_a_pruned_network_is_timed():
    table = LatencyTable()
    network = dass.build(dass.Genotype.random(0), channels=4, layers=3, classes=10).eval()
    assert table.network_us(network, 0.2, IMAGE) > 0


def test_costs_are_sums_over_the_cells_of_a_kind(monkeypatch):
    monkeypatch.setattr(LatencyTable, "_measure", lambda self, name, shape, *rest: shape[0])
    network = Supernet(4, 3, 10)
    tables = LatencyTable().costs(network, (3, 16, 16), 0.1)
    channels = {"normal": 0.0, "reduce": 0.0}
    for edge, shape in network.edge_shapes((3, 16, 16)).items():
        kind = next(cell.kind for cell in network.cells if edge in list(cell.edges))
        channels[kind] += shape[0]
    for kind, table in tables.items():
        assert float(table.sum()) == len(network.choices) * channels[kind]


def test_the_blocks_of_a_network_are_all_its_modules():
    genotype = dass.Genotype.random(0)
    network = dass.build(genotype, channels=4, layers=3, classes=10)
    blocks = blocks_of(network, (3, 16, 16))
    names = [block.name for block in blocks]
    ops = [edge.op for cell in network.cells for edge in cell.edges]
    assert sorted(n for n in names if n in dass.space.OPS) == sorted(ops)
    assert names.count("add") == 4 * 3 and names.count("cat") == 3
    assert names.count("preprocess") + names.count("preprocess_reduce") == 6
    reduce = [b for b in blocks if b.place.startswith("cells.1.ops") and b.shape[1] == 16]
    assert reduce and all(b.stride == 2 for b in reduce)

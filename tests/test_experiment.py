"""The experiment: exact counts, resumed rows, tables from files of results."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.importorskip("bench.experiment", reason="the benchmarks are not part of this tree")

import dass
from bench.experiment import __main__ as command
from bench.experiment import running, sizing, summary, timing
from bench.experiment.clock import Clock, used_hours
from bench.experiment.falling import FallingDensity
from bench.experiment.protocol import PROTOCOL, Protocol
from bench.experiment.rows import Row, read, rows, write
from bench.experiment.systems import BASELINE, SYSTEMS
from dass import prune, zoo
from dass.genotype import Genotype
from dass.sources import count_weights

TINY = Protocol(
    data="digits",
    size=16,
    images=96,
    held_out=48,
    epochs=(1, 1, 2),
    batch_size=16,
    width=0.05,
    layers=3,
    seeds=(0,),
    sparsities=(0.9,),
    search_channels=2,
    search_epochs=(1, 1, 1),
)
FOUND = [name for name, system in SYSTEMS.items() if not system.search]


@pytest.fixture
def console():
    return Console(quiet=True)


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "runs", tmp_path / "results"


def _kept_after_pruning(sized):
    """The nonzeros that pruning a real network by the allotment leaves, layer by layer."""
    model = zoo.create(sized.network, **sized.overrides)
    densities = sized.densities(sizing.layers_of(sized.network, sized.overrides))
    report = prune(model, 0.5, densities=densities)
    assert {row.names[0]: row.kept for row in report.layers} == sized.kept
    return count_weights(model)


@pytest.mark.parametrize("sparsity", PROTOCOL.sparsities)
@pytest.mark.parametrize("name", FOUND)
def test_every_network_keeps_as_many_weights(name, sparsity):
    sized = sizing.size_of(SYSTEMS[name], PROTOCOL, sparsity)
    counts = _kept_after_pruning(sized)
    assert counts["nonzeros"] == sizing.nonzeros_of(PROTOCOL, sparsity)
    assert counts["weights"] == sized.weights
    reference = sizing.size_of(SYSTEMS[BASELINE], PROTOCOL, sparsity).weights
    if SYSTEMS[name].densities != "exempt":
        assert sized.weights == pytest.approx(reference, rel=0.16)


@pytest.mark.parametrize("sparsity", PROTOCOL.sparsities)
def test_the_baseline_is_pruned_as_the_paper_does(sparsity):
    model = zoo.create("mobilenet_v2", width=PROTOCOL.width)
    report = prune(model, sparsity)
    sized = sizing.size_of(SYSTEMS[BASELINE], PROTOCOL, sparsity)
    assert {row.names[0]: row.kept for row in report.layers} == sized.kept


def test_depthwise_layers_that_are_exempt_stay_dense():
    sized = sizing.size_of(SYSTEMS["mobilenet_v2_exempt"], PROTOCOL, 0.99)
    for layer in sizing.layers_of(sized.network, sized.overrides):
        if layer.depthwise:
            assert sized.kept[layer.name] == layer.weights


def test_densities_of_a_genotype_keep_their_proportions():
    plain = Genotype.random(0)

    def with_density(nodes, density):
        return [[(edge.op, edge.input, density) for edge in node] for node in nodes]

    genotype = Genotype(with_density(plain.normal, 0.05), with_density(plain.reduce, 0.002))
    sized = sizing.size_of(SYSTEMS["search_density"], PROTOCOL, 0.99, genotype)
    assert sum(sized.kept.values()) == sizing.nonzeros_of(PROTOCOL, 0.99)
    layers = sizing.layers_of(sized.network, sized.overrides)
    share = {own: [0, 0] for own in (0.05, 0.002, None)}
    for layer in layers:
        share[layer.own][0] += sized.kept[layer.name]
        share[layer.own][1] += layer.weights
    density = {own: kept / weights for own, (kept, weights) in share.items()}
    assert density[0.05] / density[None] == pytest.approx(5, rel=0.1)
    assert density[0.05] / density[0.002] == pytest.approx(25, rel=0.5)  # at least 1 in each layer


def test_an_allotment_that_cannot_be_is_an_error():
    layers = sizing.layers_of("resnet18", {"width": 0.0625})
    with pytest.raises(ValueError, match="cannot be spread"):
        sizing.allot(layers, len(layers) - 1, "uniform", 0.01)
    with pytest.raises(ValueError, match="unknown scope 'lamp'"):
        sizing.allot(layers, 1000, "lamp", 0.01)
    assert set(sizing.allot(layers, len(layers), "uniform", 0.01).values()) == {1}


def test_the_density_falls_to_what_each_layer_is_to_keep():
    model = torch.nn.Sequential(dass.SparseConv2d(4, 8, 3), dass.SparseConv2d(8, 8, 1))
    for layer, density in zip(model, (0.01, 0.3), strict=True):
        layer.learn_mask(density)
    schedule = FallingDensity(model, None, 40)
    seen = [[layer.density for layer in model]]
    for _ in range(40):
        schedule.step()
        seen.append([layer.density for layer in model])
    assert seen[0] == [1.0, 1.0] and seen[30:] == [[0.01, 0.3]] * 11
    for layer in range(2):
        course = [densities[layer] for densities in seen[:31]]
        assert course == sorted(set(course), reverse=True)
    other = FallingDensity(model, None, 40)
    other.load_state_dict({"done": 7})
    assert [layer.density for layer in model] == seen[7]


class _Killed(Exception):
    pass


def test_a_row_that_was_killed_ends_as_one_that_ran_through(
    folders, console, monkeypatch, tmp_path
):
    runs, results = folders
    row = Row(BASELINE, 0.9, 0)
    straight = running.run_row(row, TINY, tmp_path / "straight", results, console)
    assert straight == read(row.file(results))
    row.file(results).unlink()
    for stage, step in (("pretrain", 3), ("prune", 2), ("finetune", 8)):
        with monkeypatch.context() as patch:
            _kill_in(patch, stage, step)
            with pytest.raises(_Killed):
                running.run_row(row, TINY, runs, results, console)
        assert not row.file(results).exists()
    resumed = running.run_row(row, TINY, runs, results, console)
    times = ("cpu_seconds", "date", "stages")
    assert {k: v for k, v in resumed.items() if k not in times} == {
        k: v for k, v in straight.items() if k not in times
    }
    losses = [[stage["train_loss"] for stage in found["stages"]] for found in (straight, resumed)]
    assert losses[0] == losses[1]
    assert resumed["nonzeros"] == sizing.nonzeros_of(TINY, 0.9)
    assert used_hours(runs) > 0


def _kill_in(patch, stage, step):
    """Makes training raise in the middle of a stage, as a kill would: nothing is saved then."""
    whole = running.run_stage

    def run_stage(model, this, data, *, on_step, **kwargs):
        def killing(progress):
            if this.name == stage and progress.step == step:
                raise _Killed
            on_step(progress)

        return whole(model, this, data, on_step=killing, **kwargs)

    patch.setattr(running, "run_stage", run_stage)


def test_rows_of_one_network_share_its_dense_training(folders, console):
    runs, results = folders
    for name in (BASELINE, "mobilenet_v2_erk"):
        running.run_row(Row(name, 0.9, 0), TINY, runs, results, console)
    assert len(list(runs.glob("pretrain-*"))) == 1
    both = [read(Row(name, 0.9, 0).file(results)) for name in (BASELINE, "mobilenet_v2_erk")]
    assert both[0]["stages"][0] == both[1]["stages"][0]
    assert both[0]["weights_sha256"] != both[1]["weights_sha256"]
    network = running.trained(Row("mobilenet_v2_erk", 0.9, 0), runs)
    assert running.fingerprint(network) == both[1]["weights_sha256"]
    assert not network.training


def test_a_searched_system_and_the_later_steps(folders, capsys):
    runs, results = map(str, folders)
    where = ["--runs", runs, "--results", results, "--system", "search"]
    command.main(["run", *where], TINY)
    row = Row("search", 0.9, 0)
    found, searched = read(row.file(folders[1])), read(row.search_file(folders[1]))
    assert found["overrides"]["genotype"] == searched["genotype"]
    assert found["nonzeros"] == sizing.nonzeros_of(TINY, 0.9)
    assert len(searched["history"]) == 3
    command.main(["test", *where], TINY)
    assert read(row.file(folders[1], "test"))["test_images"] > 100
    command.main(["list", *where], TINY)
    assert "held out test" in capsys.readouterr().out


def test_the_search_by_time_waits_for_its_table(folders, capsys):
    runs, results = map(str, folders)
    command.main(["run", "--runs", runs, "--results", results, "--system", "search_time"], TINY)
    assert "latency --table" in " ".join(capsys.readouterr().out.split())
    assert not list(folders[1].glob("*.json"))


def test_no_row_is_started_above_the_limit(folders, capsys):
    runs, results = map(str, folders)
    spent = replace(TINY, core_hours=0.0)
    command.main(["run", "--runs", runs, "--results", results, "--system", BASELINE], spent)
    assert "stopped at 0 core-hours" in capsys.readouterr().out


def test_unknown_rows_are_named():
    with pytest.raises(SystemExit, match="--system vgg: unknown; known: mobilenet_v2, "):
        list(rows(PROTOCOL, "vgg"))
    with pytest.raises(SystemExit, match="--seed 7"):
        list(rows(PROTOCOL, seed=7))
    assert len(list(rows(PROTOCOL))) == 2 * 3 * len(SYSTEMS)


def test_a_clock_goes_on_after_a_break(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    Clock(folder).note()
    (folder / "cpu.json").write_text(json.dumps({"cpu_seconds": 7200.0}))
    assert Clock(folder).note() >= 7200
    assert used_hours(tmp_path) >= 2


def _made_up(accuracy, seed, name):
    return {
        "system": name,
        "held_out_accuracy": accuracy,
        "nonzeros": 100,
        "weights": 10_000,
        "macs": 5_000_000,
        "nonzero_macs": 50_000,
        "stages": [{"stage": "finetune", "held_out_loss": accuracy, "cpu_seconds": 360.0 + seed}],
    }


@pytest.fixture
def filled(tmp_path):
    """Two systems at 99 %: the second is ahead by 1, 2 and 3 points, and has been timed once."""
    results, document = tmp_path / "results", tmp_path / "results.md"
    for seed, (a, b) in enumerate(((0.30, 0.31), (0.32, 0.34), (0.34, 0.37))):
        write(Row(BASELINE, 0.99, seed).file(results), _made_up(a, seed, BASELINE))
        write(Row("dass_99", 0.99, seed).file(results), _made_up(b, seed + 9, "dass_99"))
    times = {name: {"median_us": us} for name, us in (("sparsify", 200.0), ("compile", 50.0))}
    ratios = {way: {"dense": 3.0, "baseline": 4.0} for way in times}
    timed = {"times": times, "speedup": ratios, "predicted_us": 220.0}
    write(Row("dass_99", 0.99, 0).file(results, "latency"), timed)
    markers = ("cost", "99", "95")
    text = "\n".join(f"<!-- begin {m} -->\nold\n<!-- end {m} -->" for m in markers)
    document.write_text(f"before\n{text}\nafter\n")
    return results, document


def test_the_tables_say_what_the_files_hold(filled):
    results, document = filled
    summary.write_document(results, document, PROTOCOL)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    row = next(line for line in text.splitlines() if line.startswith("| DASS, published 99"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["10,000", "100", "5.0 M"]
    assert cells[5:] == ["34.00 +- 3.00 (3)", "-", "2.00 +- 1.00 (3)"]
    assert "220.0" not in text and "1.10 (1)" in text and "50.0 (1)" in text
    assert re.search(r"\| +\+2.00 \|", text) and re.search(r"\| +-2.00 \|", text)
    assert "No row is finished yet." in text
    assert "median error 10%" in text
    assert "searches: 0.6 hours" in text  # 6 trainings of 6 minutes
    assert (document.parent / "results-99.svg").stat().st_size > 1000


def test_the_document_is_the_same_twice(filled):
    results, document = filled
    plot = document.with_name("results-99.svg")
    summary.write_document(results, document, PROTOCOL)
    before = document.read_bytes(), plot.read_bytes()
    summary.write_document(results, document, PROTOCOL)
    assert before == (document.read_bytes(), plot.read_bytes())


def test_differences_are_of_the_seeds_that_both_have(filled):
    results, _ = filled
    Row("dass_99", 0.99, 1).file(results).unlink()
    a, b = summary.standings(results, PROTOCOL, 0.99)
    assert summary.difference(b, a) == pytest.approx([1.0, 3.0])


def test_a_document_without_markers_is_an_error(filled):
    results, document = filled
    document.write_text("no markers")
    with pytest.raises(ValueError, match="begin cost"):
        summary.write_document(results, document, PROTOCOL)


@pytest.mark.slow
def test_a_row_is_timed(folders, console, monkeypatch):
    runs, results = folders
    monkeypatch.setattr(timing, "_CALIBRATION_CHANNELS", 4)
    row = Row("dass_99", 0.9, 0)
    running.run_row(row, TINY, runs, results, console)
    timing.time_row(row, TINY, runs, results, seconds=0.01)
    found = read(row.file(results, "latency"))
    assert {"sparsify", "compile", found["dense"], found["baseline"]} <= found["times"].keys()
    assert all(time["median_us"] > 0 for time in found["times"].values())
    assert found["predicted_us"] > 0
    (timed,) = summary.standings(results, TINY, 0.9)
    assert timed.us("compile") == [found["times"]["compile"]["median_us"]]
    assert SYSTEMS["dass_99"].title in summary.latency_table([timed])

"""The benchmarks measure what they say: shapes, masks, equal results, figures, tables."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.importorskip("bench.cases", reason="the benchmarks are not part of this tree")

from bench import (
    bench_models,
    bench_ops,
    bench_training,
    cases,
    contest,
    figures,
    inference,
    layers,
    plot,
    session,
    table,
)
from bench.cases import Conv, Linear
from bench.contest import Contest, Entry, NotAvailable, ResultsDiffer
from bench.peers import sparseprop

SMALL = Conv(8, 16, 6, 3)
ALL_CASES = {
    "conv1x1": (cases.CONV1X1, 17),
    "conv3x3": (cases.CONV3X3, 8),
    "conv1x1_small": (cases.CONV1X1_SMALL, 10),
    "linear": (cases.LINEAR, 6),
    "blocks": (cases.BLOCK_CONV1X1, 4),
    "training": (cases.TRAINING, 8),
}


@pytest.fixture(autouse=True)
def _no_peers(tmp_path, monkeypatch):
    """What is compared does not depend on what this machine has installed."""
    monkeypatch.setenv("DASS_PEERS", str(tmp_path))


def options(path=None, **more):
    given = {"isa": None, "json": path, "rounds": 1, "free_dense": False, "dlmc": None}
    return Namespace(**{**given, **more})


@pytest.mark.parametrize("name", ALL_CASES)
def test_cases_are_well_formed(name):
    rows, count = ALL_CASES[name]
    assert len(rows) == len(set(rows)) == count
    for case in rows:
        with torch.device("meta"):
            module = case.module()
            y = module(torch.empty(case.input_shape(2)))
        if isinstance(case, Conv):
            assert y.shape == (2, case.outputs, case.size, case.size)
            assert case.flops == 2 * module.weight.numel() * case.size**2
        else:
            assert y.shape == (2, case.outputs)


def test_labels_name_one_case_each():
    rows = {*cases.CONV1X1, *cases.CONV3X3, *cases.TRAINING, *cases.LINEAR}
    assert len({(case.label, getattr(case, "batch", 1)) for case in rows}) == len(rows)
    assert cases.CONV1X1[0].label == "1x1 64->256@56"


@pytest.mark.parametrize("name", ["mobilenet_v2_imagenet", "resnet18_imagenet", "resnet50"])
def test_zoo_layers_are_the_networks_own(name):
    found = cases.zoo_layers(name)
    assert len(found) == len(set(found))
    if name == "resnet50":
        assert Conv(3, 64, 112, 7, 2) in found
        assert Conv(256, 512, 28, 1, 2) in found
        assert Linear(1, 2048, 1000) in found
        assert {case for case in cases.CONV1X1[:8]} <= set(found)
    if name == "mobilenet_v2_imagenet":
        assert {case for case in cases.CONV1X1[8:]} <= set(found)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.98])
def test_masks_have_the_exact_count(rows, sparsity):
    mask = layers.random_mask((32, 20, 3, 3), sparsity, layers.seed("mask"), rows)
    blocks = mask.view(32 // rows, rows, -1)
    assert (blocks.any(1) == blocks.all(1)).all()
    assert int(mask.sum()) == rows * round((1 - sparsity) * (32 // rows * 180))


def test_cases_repeat():
    one, two = (layers.masked_layer(SMALL, 0.9)[0].weight for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, layers.masked_layer(SMALL, 0.95)[0].weight)


@pytest.mark.parametrize("rows", cases.BLOCK_ROWS)
def test_block_masks_reach_the_block_kernels(rows):
    layer, mask = layers.masked_layer(Conv(8, 32, 6), 0.8, rows=rows)
    assert layers.sparse_layer(layer, mask).packed().format == f"{rows}x1"


CONTESTS = {
    "conv": lambda: inference.layer_contest("g", SMALL, 0.9, 1),
    "strided": lambda: inference.layer_contest("g", Conv(8, 16, 6, 3, 2), 0.9, 3),
    "lanes": lambda: inference.layer_contest("g", SMALL, 0.9, 16, lanes=True),
    "linear": lambda: inference.layer_contest("g", Linear(9, 33, 20), 0.9),
    "blocks": lambda: inference.layer_contest("g", Linear(8, 33, 32), 0.9, rows=8),
    "threads": lambda: inference.thread_contest(SMALL, 0.9, 4),
    "training": lambda: bench_training.layer_contest(SMALL, 0.9, 2),
    "matrix": lambda: inference.matrix_contest(_matrix(), 0.5),
}


@pytest.mark.parametrize("name", CONTESTS)
def test_contestants_agree(name):
    held = CONTESTS[name]()
    contest.check(held)
    assert held.ours
    row = contest.hold(held, rounds=2, seconds=0)
    assert set(row["times"]) == set(held.entries)
    assert all(ratio > 0 for ratio in row["ratios"].values())
    assert len(row["ratios"]) == len(held.ours) * len(held.baselines)
    json.dumps(row)


def test_layer_baselines_are_every_way_torch_has():
    names = CONTESTS["conv"]().baselines["dense"]
    assert {"nchw", "channels_last", "frozen"} <= set(names)


def _pair(result, **more) -> Contest:
    found = {"ours": Entry(lambda: result), "dense": Entry(lambda: torch.ones(4))}
    return Contest("g", "k", "label", 0.9, found, {"dense": ("dense",)}, **more)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.ones(5), torch.full((4,), torch.nan)])
def test_a_wrong_result_is_not_timed(bad):
    with pytest.raises(ResultsDiffer, match="ours differs from dense"):
        contest.hold(_pair(bad), rounds=1, seconds=0)


def test_difference_is_relative_to_the_largest_value():
    a = torch.tensor([100.0, 0.0])
    assert contest.difference([a], [a + torch.tensor([0.0, 1.0])]) == pytest.approx(0.01)


def test_session_records_what_is_missing_and_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "run" / "out.json"
    held = session.Session(options(path))

    def group():
        yield _pair(torch.ones(4), missing=("a peer is not here",))
        yield _pair(torch.zeros(4))
        raise NotAvailable("no data")

    held.hold("g", group())
    written = json.loads(path.read_text())
    assert len(written["rows"]) == 1 and len(written["failures"]) == 1
    assert written["notes"] == ["g: a peer is not here", "g: no data"]
    assert written["facts"]["cpu"] and written["settings"]["isa"]
    assert "FAILED" in capsys.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]
    with pytest.raises(SystemExit):
        session.exit_on_failures(written)


def test_an_instruction_set_binds_both_sides(monkeypatch):
    started = []
    monkeypatch.setattr(session.os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "argv", ["bench", "--isa", "avx2", "--group", "linear"])
    for name in session.DENSE_LIMITS["avx2"]:
        monkeypatch.delenv(name, raising=False)
    session.parse(figures.parser(), ["--isa", "avx2"])
    assert not started  # called from Python: the environment is the caller's
    assert session.parse(figures.parser()).group == ["linear"]
    _, command, environment = started.pop()
    assert command[1:] == sys.orig_argv[1:]
    for name, value in session.DENSE_LIMITS["avx2"].items():
        assert environment[name] == value
        monkeypatch.setenv(name, value)
    session.parse(figures.parser())
    assert not started
    assert session.Session(options()).document["settings"]["dense_isa"] == "avx2"


def _row(group, kind, sparsity, ratio, us=500.0, pair="module/dense"):
    ours, baseline = pair.split("/")
    times = {ours: us / ratio, "nchw": us}
    return {
        "group": group,
        "kind": kind,
        "label": f"{kind} x",
        "sparsity": sparsity,
        "dtype": "float32",
        "layout": "NCHW",
        "threads": 1,
        "times": {k: {"median_us": v, "spread": 0.1, "rounds": 3} for k, v in times.items()},
        "fastest": {baseline: "nchw"},
        "ratios": {pair: ratio},
    }


def _document():
    rows = [_row("conv1x1", "1x1", s, r) for s in cases.SPARSITIES for r in (2.0, 8.0)]
    rows += [_row("threads", "1x1", 0.9, 1.8, us, "two/one thread") for us in (50.0, 150.0)]
    rows += [
        _row("sparsify", "net", s, r, pair="auto/eager")
        for s in cases.SPARSIFY_SPARSITIES
        for r in (0.9, 1.5)
    ]
    document = session.Session(options()).document
    return {**document, "rows": rows, "figures": figures.summarise(rows)}


def test_figures_are_geometric_means_with_verdicts():
    found = {f["title"]: f["points"] for f in _document()["figures"]}
    one = found["1x1, batch 1"]
    assert [round(p["mean"], 6) for p in one] == [4.0, 4.0, 4.0]
    assert [p["verdict"] for p in one] == ["goal", "floor", "below"]
    assert found["two threads"][0]["rows"] == 1  # the 50 us layer does not count
    assert {p["verdict"] for p in found["sparsify(auto)"]} == {"below"}  # its worst row counts


def test_tables_and_plot(tmp_path):
    document = _document()
    text = table.figures_table(document)
    assert "| 1x1, batch 1" in text and "4.00 (2.00 to 8.00)" in text
    assert "goal / floor / BELOW FLOOR" in text and "0.90 (0.90 to 1.50)" in text
    assert table.rows_table(document["rows"]).count("\n") == len(document["rows"]) + 1
    pytest.importorskip("matplotlib")
    for name in ("plot.png", "plot.svg"):
        plot.plot(document, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ValueError, match="no figure"):
        plot.plot({**document, "figures": []}, tmp_path / "none.png")


def test_every_figure_belongs_to_its_group():
    assert {figure.group for figure in figures.FIGURES} == set(figures.GROUPS)
    for figure in figures.FIGURES:
        count = len(figures.GROUPS[figure.group].sparsities)
        for numbers in (figure.floor, figure.goal):
            assert numbers is None or (len(numbers) == count and list(numbers) == sorted(numbers))
        if figure.floor and figure.goal:
            assert all(f <= g for f, g in zip(figure.floor, figure.goal, strict=True))


def _matrix() -> cases.Matrix:
    indptr = np.array([0, 2, 2, 3], np.int32)
    return cases.Matrix("layer", indptr, np.array([0, 3, 1], np.int32), (3, 4), 5)


@pytest.fixture(params=["npz", "folder", "smtx"])
def dlmc(request, tmp_path):
    """The same two matrices in each form that is read."""
    one = _matrix()
    if request.param == "smtx":
        folder = tmp_path / "rn50" / "magnitude_pruning" / "0.9"
        folder.mkdir(parents=True)
        (folder / "layer.smtx").write_text("3, 4, 3\n0 2 2 3\n0 3 1\n")
        (folder / "empty.smtx").write_text("2, 2, 0\n0 0 0\n")
        (tmp_path / "rn50_batchsizes.txt").write_text("layer,5\nempty,7\n")
        return tmp_path
    file = tmp_path / "dlmc.npz"
    arrays = {"0.9/layer/indptr": one.indptr, "0.9/layer/indices": one.indices.astype(np.int16)}
    arrays |= {"0.9/empty/indptr": np.zeros(3, np.int32), "0.9/empty/indices": np.zeros(0, "i2")}
    np.savez(file, layers=["layer", "empty"], shapes=[[3, 4], [2, 2]], n=[5, 7], **arrays)
    return file if request.param == "npz" else tmp_path


def test_dlmc_reader(dlmc):
    one, empty = cases.dlmc_matrices(dlmc, 0.9)
    assert (one.name, one.shape, one.columns) == ("layer", (3, 4), 5)
    assert one.mask().tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert (empty.shape, empty.columns, int(empty.mask().sum())) == ((2, 2), 7, 0)


def test_dlmc_place(tmp_path, monkeypatch):
    monkeypatch.delenv("DASS_DLMC", raising=False)
    assert cases.dlmc_path() is None
    with pytest.raises(NotAvailable, match="DASS_DLMC"):
        next(inference.dlmc([0.9]))
    monkeypatch.setenv("DASS_DLMC", str(tmp_path))
    assert cases.dlmc_path() == tmp_path
    with pytest.raises(FileNotFoundError, match=r"npz"):
        next(cases.dlmc_matrices(tmp_path, 0.9))
    with pytest.raises(FileNotFoundError, match="missing"):
        cases.dlmc_path(tmp_path / "missing")


def test_bench_ops_reaches_every_kernel_family_and_format():
    rows = list(bench_ops.table(full=False))
    assert len({str(row) for row in rows}) == len(rows)
    isa = next(row.isa for row in rows if row.isa)
    measured = {(row.op, row.format, row.dtype) for row in rows if row.format}
    # dX runs on the transpose, whose rows are single ones.
    exist = {key for key in bench_ops.kernels(isa) if key[0] != "dx" or key[1] == "csr"}
    assert exist == measured


@pytest.mark.parametrize("op", bench_ops.OPS)
@pytest.mark.parametrize("case", [SMALL, Linear(4, 24, 16)], ids=["conv", "linear"])
@pytest.mark.parametrize("rows", [1, 4])
def test_bench_ops_problems_agree_with_dense(case, op, rows):
    format = "csr" if rows == 1 else f"{rows}x1"
    problem = bench_ops.Problem(bench_ops.Row(case, 4, 0.8, op, "f32", rows, format))
    assert problem.error(problem.sparse()()) <= bench_ops.TOLERANCE["f32"]


def test_training_network_contest_agrees():
    held = bench_training.network_contest("resnet20", 0.9, batch=2, width=0.5)
    contest.check(held)
    for entry in held.entries.values():
        entry.run()
    contest.check(held)  # after a step too, pruned weights still zero


def test_network_contest_agrees():
    held = bench_models.network_contest("resnet20", 0.9, policies=("always",))
    contest.check(held)
    assert held.facts["sparse_layers"]["always"].split(" of ")[0] != "0"


def test_peer_that_is_not_installed_is_a_reason():
    with pytest.raises(NotAvailable, match="not installed"):
        sparseprop.load()

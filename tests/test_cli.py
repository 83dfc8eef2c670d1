"""The command line: train, prune, evaluate and bench on small networks; errors of the user."""

import json
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dass
from dass import cli, commands, training

SMALL = ["--data", "synthetic", "--size", "16", "--limit", "64", "--threads", "1"]


def dass_(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def ok(*words):
    done = dass_(*words)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "r20"
    command = ["train", "resnet20", *SMALL, "--epochs", 2, "--width", 0.5, "--run", folder]
    return folder, ok(*command), command


@pytest.mark.parametrize(
    "command",
    [["train", "resnet20", "--epochs", 2], ["sparse", "resnet20", "--recipe", "smoke"]],
    ids=["train", "sparse"],
)
def test_deterministic_runs_end_with_the_same_bits(tmp_path, monkeypatch, command):
    switched = []
    real = training._Run._step
    monkeypatch.setattr(
        training._Run,
        "_step",
        lambda *a: switched.append(torch.are_deterministic_algorithms_enabled()) or real(*a),
    )
    states = []
    for name in ("one", "two"):
        torch.manual_seed(len(states))  # what a caller's generator holds must not matter
        before = torch.get_rng_state()
        words = [*SMALL, "--width", 0.25, "--seed", 3, "--run", tmp_path / name]
        ok(*command, *words, "--deterministic")
        assert torch.equal(torch.get_rng_state(), before)
        states.append(dass.load(tmp_path / name / "model.safetensors").state_dict())
        assert "all generators from seed 3" in (tmp_path / name / "report.md").read_text()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert switched and all(switched) and not torch.are_deterministic_algorithms_enabled()
    done = dass_(*command, *words)
    assert done.exit_code == 2 and "deterministic True" in " ".join(done.output.split())


def test_deterministic_refuses_what_is_not():
    from dass.session import deterministic

    ring = torch.zeros(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="deterministic"), deterministic(True, 0):
        torch.nn.functional.max_unpool2d(ring, torch.zeros(2, 3, 4, 4, dtype=torch.int64), 2)
    drawn = []
    for _ in range(2):
        with deterministic(True, 7):
            drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
    assert drawn[0] == drawn[1]


@pytest.fixture(scope="module")
def pruned(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "r20-80"
    output = ok(
        "prune", trained[0], "--sparsity", 0.8, "--finetune", 1, "--exclude", "first",
        "--run", folder, "--threads", 1,
    )  # fmt: skip
    return folder, output


def test_finetune_keeps_the_masks(pruned, tmp_path):
    folder = tmp_path / "tuned"
    output = ok("finetune", pruned[0], "--epochs", 1, "--run", folder, "--threads", 1)
    assert "accuracy after the last epoch" in output
    before, after = (dass.load(path / "model.safetensors") for path in (pruned[0], folder))
    masks = dict(before.named_buffers())
    changed = 0
    for name, mask in after.named_buffers():
        if name.endswith("mask"):
            assert torch.equal(mask, masks[name])
            weight = after.get_parameter(name[:-4] + "weight")
            assert bool((weight[~mask] == 0).all())
            changed += not torch.equal(weight, before.get_parameter(name[:-4] + "weight"))
    assert changed > 0


def test_plot_says_which_runs_are_dominated(trained, pruned, tmp_path):
    worse = tmp_path / "worse"
    worse.mkdir()
    report = json.loads((pruned[0] / "report.json").read_text())
    report["data"]["prune"]["accuracy"] -= 0.01
    (worse / "report.json").write_text(json.dumps(report))
    ok("plot", trained[0], pruned[0], worse, "--out", tmp_path / "plot")
    found = json.loads((tmp_path / "plot" / "report.json").read_text())["data"]["points"]
    points = {point["name"]: point for point in found}
    assert points["r20-80"]["nonzeros"] < points["r20"]["nonzeros"]
    assert points["r20-80"]["front"] and not points["worse"]["front"]
    done = dass_("plot", tmp_path)
    assert done.exit_code == 2 and "has no accuracy and nonzeros" in " ".join(done.output.split())


def test_finetune_needs_a_sparse_network(trained, tmp_path):
    done = dass_("finetune", trained[0], "--run", tmp_path / "x")
    assert done.exit_code == 2 and "has no sparse layers" in done.output


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))\n"
        "def zeros():\n"
        "    model = build()\n"
        "    nn.init.zeros_(model[2].weight).data[:, 0] = 1\n"
        "    return model\n"
        "number = 3\n"
    )
    yield tmp_path
    sys.modules.pop("mynets", None)


def data_of(folder):
    return json.loads((folder / "report.json").read_text())["data"]


def test_training_leaves_a_network_and_a_report(trained):
    folder, output, _ = trained
    assert "test images right" in output
    found = data_of(folder)["train"]
    assert len(found["history"]) == 2
    model = dass.load(folder / "model.safetensors")
    assert model.conv1.weight.shape[0] == 8
    assert not (folder / "checkpoint.pt").exists()


def test_a_finished_training_is_not_done_again(trained, monkeypatch):
    folder, _, command = trained
    before = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(commands, "train", None)
    ok(*command)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_training_that_was_interrupted_goes_on(trained, tmp_path, monkeypatch):
    _, _, command = trained
    command = [*command[:-1], tmp_path / "again"]
    real = commands.train

    def train(*args, on_step, **kwargs):
        def interrupting(progress):
            on_step(progress)
            if progress.step == 1:
                signal.raise_signal(signal.SIGINT)

        return real(*args, on_step=interrupting, **kwargs)

    monkeypatch.setattr(commands, "train", train)
    done = dass_(*command)
    assert done.exit_code == 130
    assert "the same command goes on" in done.output
    monkeypatch.setattr(commands, "train", real)
    assert "from its checkpoint" in ok(*command)
    straight = dass.load(trained[0] / "model.safetensors").state_dict()
    again = dass.load(tmp_path / "again" / "model.safetensors").state_dict()
    assert all(torch.equal(straight[name], value) for name, value in again.items())


def test_pruning_takes_the_data_of_the_run_and_leaves_masks(pruned):
    folder, output = pruned
    assert "after fine-tuning" in output
    found = data_of(folder)
    assert found["settings"]["data"] == "synthetic"
    assert found["prune"]["pruning"]["sparsity"] == pytest.approx(0.8, abs=0.01)
    model = dass.load(folder / "model.safetensors")
    assert model.layer1[0].conv1.density == pytest.approx(0.2, abs=0.01)
    assert not hasattr(model.conv1, "mask")


def test_pruning_needs_no_data(trained, tmp_path):
    file = tmp_path / "net.safetensors"
    file.write_bytes((trained[0] / "model.safetensors").read_bytes())
    ok("prune", file, "--sparsity", 0.5, "--scope", "erk", "--run", tmp_path / "half")
    found = data_of(tmp_path / "half")["prune"]
    assert found["nonzeros"] == pytest.approx(found["weights"] / 2, rel=0.01)
    assert "accuracy" not in found


def test_evaluation_tells_accuracy_size_and_latency(pruned, tmp_path):
    output = ok("evaluate", pruned[0], "--batches", "2", "--out", tmp_path / "e")
    assert "speed-up" in output
    found = data_of(tmp_path / "e")
    assert found["accuracy"] == data_of(pruned[0])["prune"]["accuracy"]
    assert found["nonzeros"] < found["weights"]
    assert found["latency"][0]["input"] == [2, 3, 16, 16]
    assert found["file_bytes"] < found["dense_bytes"]


def test_evaluation_of_a_dense_file_without_data(trained, tmp_path):
    file = tmp_path / "net.safetensors"
    file.write_bytes((trained[0] / "model.safetensors").read_bytes())
    output = ok("evaluate", file, "--no-latency")
    assert "on disk" in output
    assert "right" not in output


def test_a_network_of_the_users_own_goes_through_all_commands(here):
    sys.path.insert(0, str(here))
    import mynets

    sys.path.remove(str(here))
    torch.manual_seed(0)
    dass.save(mynets.build(), here / "mine.safetensors")
    own = ["--model", "mynets:build"]
    ok("prune", "mine.safetensors", "--sparsity", 0.5, "--run", "out", *own)
    output = ok("evaluate", "out", "--input", "3x12x12", "--batches", 1, *own)
    assert "50 % zeros" in output
    done = dass_("evaluate", "out", *own)
    assert done.exit_code == 2
    assert "--input is needed" in done.output


def test_bench_times_a_network_of_the_users_own(here):
    output = ok(
        "bench", "mynets:build", "--input", "3x12x12", "--sparsities", "0.5,0.9",
        "--batches", "1,2", "--seconds", 0, "--exclude", "0",
    )  # fmt: skip
    assert "Layers, batch 2" in output
    found = data_of(here / "runs" / "bench-mynets.build")
    assert set(found["batches"]) == {"1", "2"}
    rows = found["batches"]["1"]["layers"]
    assert [row["names"] for row in rows] == [["2"], ["5"]]
    assert list(rows[0]["sparse"]) == ["50 %", "90 %"]
    assert "<svg" in (here / "runs" / "bench-mynets.build" / "report.html").read_text()


def test_bench_times_a_network_that_has_zeros_as_it_is(here):
    ok("bench", "mynets:zeros", "--input", "3x12x12", "--sparsities", "0.9", "--seconds", 0)
    rows = data_of(here / "runs" / "bench-mynets.zeros")["batches"]["1"]["layers"]
    assert {"as it is", "90 %"} == set(rows[1]["sparse"])
    assert rows[1]["sparse"]["as it is"]["density"] == 1 / 16


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "resnet19"], "unknown network 'resnet19'; known: "),
        (["train", "resnet20", "--epochs", 0], "--epochs must be at least 1, got 0"),
        (["train", "resnet20", "--batch-size", 0], "--batch-size must be at least 1"),
        (["train", "resnet20", "--width", -1], "width must be greater than 0"),
        (["train", "resnet20", "--data", "nowhere"], "--data nowhere: no such path"),
        (["train", "resnet20", "--data", "."], "no images"),
        (["train", "resnet20", "--data", "digits", "--size", 0], "size must be at least 1"),
        (["train", "resnet20", "--threads", 0], "--threads must be at least 1"),
        (["prune", "nowhere"], "nowhere does not exist"),
        (["prune", "."], "has no model.safetensors"),
        (["evaluate", "mynets.py"], "no file of dass.save"),
        (["evaluate", "nowhere.safetensors"], "does not exist"),
        (["bench", "resnet19"], "unknown network 'resnet19'"),
        (["bench", "mynets:build"], "needs --input"),
        (["bench", "mynets:nothing", "--input", "3x8x8"], "no attribute 'nothing'"),
        (["bench", "nothere:build", "--input", "3x8x8"], "No module named 'nothere'"),
        (["bench", "mynets:number", "--input", "3x8x8"], "gives int, not a torch.nn.Module"),
        (["bench", "mynets:build", "--input", "4x8x8"], "does not take an input"),
        (["bench", "mynets:build", "--input", "3xax8"], "--input must be sizes such as"),
        (["bench", "resnet20", "--sparsities", "0.9,1"], "--sparsities must be numbers in (0, 1)"),
        (["bench", "resnet20", "--batches", "0"], "--batches must be whole numbers"),
        (["bench", "resnet20", "--scope", "other"], "unknown scope 'other'"),
        (["bench", "resnet20", "--exclude", "conv9"], "matches no layer"),
        (["demo", "--data", "nowhere"], "--data nowhere: no such path"),
        (["demo", "--run", "."], "no run folder"),
    ],
)
def test_a_users_error_is_one_line(here, words, says):
    done = dass_(*words)
    assert done.exit_code == 2, done.output
    assert done.output.strip().count("\n") == 0, done.output
    assert done.output.startswith("error: ")
    assert says in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sparsity", 1.0], "sparsity must be in [0, 1)"),
        (["--method", "other"], "unknown method 'other'"),
        (["--pattern", "3x3"], "unknown pattern '3x3'"),
        (["--exclude", "layer9*"], "matches no layer"),
        (["--finetune", 1, "--lr", -1], "--lr must be greater than 0"),
        (["--data", "fashion_mnist"], "fashion"),
    ],
)
def test_a_wrong_rule_is_one_line(trained, here, words, says, monkeypatch):
    monkeypatch.setenv("DASS_DATA", str(here))
    done = dass_("prune", trained[0], *words, "--run", "out")
    assert done.exit_code == 2, done.output
    assert done.output.startswith("error: ")
    assert says in done.output
    assert not (here / "out").exists()


def test_another_run_in_the_folder_is_told(trained):
    _, _, command = trained
    done = dass_(*command, "--seed", 1)
    assert done.exit_code == 2
    assert "seed 0, not 1" in done.output


def test_a_class_count_that_does_not_fit_is_told(here):
    torch.manual_seed(0)
    dass.save(dass.zoo.create("resnet20", 3, width=0.5), here / "three.safetensors")
    done = dass_("evaluate", "three.safetensors", "--data", "digits", "--no-latency")
    assert done.exit_code == 2
    assert "the network gives (3,) numbers, digits has 10 classes" in done.output


def test_finetuning_needs_data(here):
    torch.manual_seed(0)
    dass.save(dass.zoo.create("resnet20", width=0.5), here / "net.safetensors")
    done = dass_("prune", "net.safetensors", "--finetune", 1)
    assert done.exit_code == 2
    assert "--finetune needs --data" in done.output


def test_a_fault_of_the_program_is_not_hidden(trained, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(commands, "evaluate", broken)
    done = dass_("prune", trained[0], "--run", trained[0].parent / "bug")
    assert done.exit_code == 1
    assert isinstance(done.exception, ValueError)


@pytest.mark.parametrize("command", ["demo", "train", "prune", "evaluate", "compile", "bench"])
def test_help_teaches_by_an_example(command):
    output = ok(command, "--help")
    assert f"Example: dass {command}" in " ".join(output.split())


def test_the_version():
    assert ok("--version").strip() == f"dass {dass.__version__}"


def test_help_does_not_import_torch():
    """It would take seconds."""
    code = "import sys, dass.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The log of a run: a line and scalars per epoch, none twice, whatever broke a run off."""

import json
import signal

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dass
from dass import cli
from dass.data import load
from dass.logs import RunLog, read_log
from dass.training import TrainConfig, train

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=0.05)
WORDS = ["--data", "synthetic", "--size", "8", "--limit", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def images():
    return load("synthetic", train=True, size=8, limit=48)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    dass.prune(model, 0.75)
    return model


def scalars(folder):
    """tag -> [(step, value)] of an events folder, by step.

    Files of one second are read in the order of their names, where 10 comes before 9.
    """
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=False).Reload()
    return {
        tag: sorted((e.step, e.value) for e in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


def run(folder, images, on_step=None):
    with RunLog(folder, "train") as log:
        path = folder / "checkpoint.pt"
        return train(
            net(), images, CONFIG, test=images, checkpoint=path, on_step=on_step, on_epoch=log
        )


def test_a_line_per_epoch_with_the_numbers_of_the_history(images, tmp_path):
    history = run(tmp_path, images).history
    lines = read_log(tmp_path)
    assert [line.pop("stage") for line in lines] == ["train"] * 3
    assert all(line.pop("time").endswith("Z") for line in lines)
    assert lines == history
    assert {line["nonzeros"] for line in lines} == {54 + 720}


@pytest.mark.parametrize("step", [2, 3, 4, 9])
def test_a_run_that_goes_on_appends_and_repeats_nothing(images, tmp_path, step):
    def on_step(progress):
        if progress.step == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, images, on_step)
    before = read_log(tmp_path)
    assert len(before) == (step - 1) // 3
    history = run(tmp_path, images).history
    lines = read_log(tmp_path)
    assert lines[: len(before)] == before
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    run(tmp_path, images)
    assert read_log(tmp_path) == lines
    found = scalars(tmp_path / "events" / "train")
    for tag, key in (("loss/train", "train_loss"), ("accuracy/test", "test_accuracy")):
        assert found[tag] == [(row["epoch"], pytest.approx(row[key])) for row in history]
    assert found["nonzeros"] == [(n, 774.0) for n in (1, 2, 3)] and len(found["lr"]) == 3


def test_epochs_that_a_kill_left_out_of_the_log_come_later(images, tmp_path):
    history = run(tmp_path, images).history
    log = tmp_path / "log.jsonl"
    first, second, _ = log.read_text().splitlines(keepends=True)
    log.write_text(first + second[:20])
    run(tmp_path, images)
    assert [line["epoch"] for line in read_log(tmp_path)] == [1, 2, 3]
    assert read_log(tmp_path)[2]["train_loss"] == history[2]["train_loss"]


def test_stages_share_a_log_and_what_is_no_number_is_left_out(tmp_path):
    for stage in ("prune", "finetune"):
        with RunLog(tmp_path, stage) as log:
            log([{"epoch": 1, "phase": "x", "val_loss": None, "lr": 0.5, "signs": []}])
    lines = read_log(tmp_path)
    assert [line["stage"] for line in lines] == ["prune", "finetune"]
    assert all(line.keys() == {"time", "stage", "epoch", "lr"} for line in lines)


def test_without_tensorboard_there_is_the_log(images, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    run(tmp_path, images)
    assert len(read_log(tmp_path)) == 3 and not (tmp_path / "events").exists()


def test_only_rank_zero_writes(images, tmp_path, monkeypatch):
    monkeypatch.setattr("dass.logs.rank_and_world", lambda: (1, 2))
    with RunLog(tmp_path / "run", "train") as log:
        log([{"epoch": 1, "lr": 0.1}])
    assert not (tmp_path / "run").exists()


def test_the_commands_leave_a_log_and_fresh_drops_it(tmp_path):
    def dass_(*words):
        done = CliRunner().invoke(cli.app, [str(word) for word in words])
        assert done.exit_code == 0, done.output

    def stages(folder):
        return [(line["stage"], line["epoch"]) for line in read_log(folder)]

    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    command = ["train", "resnet20", *WORDS, "--width", 0.25, "--epochs", 2, "--run", dense]
    dass_(*command)
    assert stages(dense) == [("train", 1), ("train", 2)]
    dass_(*command, "--fresh")
    assert stages(dense) == [("train", 1), ("train", 2)]
    dass_("prune", dense, "--sparsity", 0.8, "--finetune", 1, "--run", sparse, "--threads", 1)
    assert stages(sparse) == [("prune", 1)]
    nonzeros = json.loads((sparse / "report.json").read_text())["data"]["prune"]["nonzeros"]
    assert read_log(sparse)[0]["nonzeros"] == nonzeros
    dass_(
        "sparse", "resnet20", *WORDS, "--width", 0.25, "--method", "hydra", "--recipe", "smoke",
        "--run", tmp_path / "hydra",
    )  # fmt: skip
    lines = read_log(tmp_path / "hydra")
    assert [line["stage"] for line in lines] == ["pretrain", "prune", "finetune"]
    assert lines[0]["nonzeros"] > lines[1]["nonzeros"] == lines[2]["nonzeros"]

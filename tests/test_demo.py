"""The demo: every stage on real (small) images, resuming, refusals, and what its report says."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import dass
from dass import cli, demo, latency
from dass.demo import DemoSettings, run_demo
from dass.demo_report import demo_report
from dass.latency import ResultsDifferError
from dass.report import to_html, to_markdown
from dass.runs import RunFolder, UserError
from dass.sources import count_weights

TINY = DemoSettings(
    data="digits",
    images=200,
    width=0.0625,
    epochs=2,
    finetune_epochs=1,
    batches=(1, 4),
    networks=(("resnet20", (1,)),),
    size=16,
    seconds=0.0,
    layer_seconds=0.0,
    choose_seconds=0.0,
    rounds=2,
    threads=1,
    search={"layers": 1, "limit": 48, "batch_size": 8, "epochs": (1, 1, 1), "size": 8},
)
STAGES = [
    "train",
    "prune to 90 %",
    "prune to 95 %",
    "search",
    "compare results",
    "fine-tuning step",
    "ResNet-18, batch 1",
    "ResNet-18, batch 4",
    "resnet20 at 16, batch 1",
]


def quiet():
    return Console(file=io.StringIO(), width=100)


def run(folder, **more):
    return run_demo(TINY, folder, quiet(), **more)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(the folder, the results, what the command printed) of a run without incident."""
    folder = tmp_path_factory.mktemp("straight") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK", TINY)
        command = ["demo", "--quick", "--data", "digits", "--threads", "1", "--run", str(folder)]
        done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    return folder, run(folder), done.output


def learned(results):
    """What does not depend on the clock."""
    found = {}
    for name in STAGES[:3]:
        stage = dict(results["stages"][name])
        del stage["seconds"]
        stage["history"] = [
            {k: v for k, v in row.items() if k != "seconds"} for row in stage["history"]
        ]
        found[name] = stage
    return found


def weights(folder):
    """The bits of every network; not of the files, whose header has no fixed order."""
    states = {
        name: dass.load(folder / f"{name}.safetensors").state_dict()
        for name in ("dense", "sparse-90", "sparse-95")
    }
    return {
        (name, key): (tuple(value.shape), value.numpy().tobytes())
        for name, state in states.items()
        for key, value in state.items()
    }


def test_the_command_goes_through_all_stages_and_leaves_a_report(straight):
    folder, results, output = straight
    assert list(results["stages"]) == STAGES
    assert "report.html" in output
    for words in ("fine-tuning step", "Accuracy and size", "untrained", "digits", "speed-up"):
        assert words in output
    assert {path.name for path in folder.glob("report.*")} == {
        "report.json",
        "report.md",
        "report.html",
    }
    assert not list(folder.glob("*.pt"))


def test_the_report_holds_every_number_that_was_asked_for(straight):
    folder, _, _ = straight
    data = json.loads((folder / "report.json").read_text())["data"]
    assert set(data) == {"settings", "machine", "stages", "kinds"}
    assert {"cpu", "torch", "torch_threads", "dass_isa"} <= set(data["machine"])
    train, pruned = data["stages"]["train"], data["stages"]["prune to 95 %"]
    for stage in (train, pruned):
        assert 0 <= stage["accuracy"] <= 1
        assert stage["dense_bytes"] > 0
        assert stage["file_bytes"] > 0
    assert train["nonzeros"] == train["weights"]
    assert pruned["pruning"]["sparsity"] == pytest.approx(0.95, abs=0.005)
    for row in data["stages"]["compare results"]["rows"].values():
        assert set(row["accuracy"]) == {"plain", "auto", "always"}
        assert max(row["error"].values()) <= 1e-4
    network = data["stages"]["ResNet-18, batch 4"]["network"]
    assert network["input"] == [4, 3, 32, 32]
    assert list(network["sparse"]) == ["90 %", "95 %"]
    assert data["stages"]["fine-tuning step"]["rows"]["90 %"]["threads"] == 1


def test_the_saved_networks_are_what_the_report_says(straight):
    folder, results, _ = straight
    model = dass.load(folder / "sparse-90.safetensors")
    stage = results["stages"]["prune to 90 %"]
    assert count_weights(model) == {key: stage[key] for key in ("weights", "nonzeros")}
    assert (folder / "sparse-90.safetensors").stat().st_size == stage["file_bytes"]
    masked = [name for name, m in model.named_modules() if hasattr(m, "mask")]
    assert len(masked) == 19  # all but the first convolution and the classifier


def test_the_report_says_plainly_that_these_are_digits_and_what_is_untrained(straight):
    _, results, _ = straight
    text = to_markdown(demo_report(results))
    assert "scikit-learn's 8x8 digits" in text
    assert "## Larger networks, untrained: shapes only" in text
    assert "torch's fastest dense form" in text


def test_the_page_has_its_plots_and_nothing_from_outside(straight):
    _, results, _ = straight
    page = to_html(demo_report(results))
    assert page.count("<svg") >= 6
    assert "http" not in page


def test_a_finished_run_is_not_done_again(straight, monkeypatch):
    folder, results, _ = straight
    monkeypatch.setattr(demo, "train", None)
    monkeypatch.setattr(demo, "compare_networks", None)
    console = quiet()
    again = run_demo(TINY, folder, console)
    assert again["stages"] == results["stages"]
    assert "9 of 9 stages are done" in console.file.getvalue()


@pytest.mark.parametrize(("stage", "step"), [(0, 5), (1, 2), (2, 4)])
def test_after_ctrl_c_in_a_stage_the_run_ends_as_the_straight_one(
    straight, tmp_path, monkeypatch, stage, step
):
    """In dense training; in fine-tuning; at the very end of one."""
    real, calls = demo.train, []

    def train(*args, on_step, **kwargs):
        calls.append(1)

        def interrupting(progress):
            on_step(progress)
            if len(calls) == stage + 1 and progress.step == step:
                signal.raise_signal(signal.SIGINT)

        return real(*args, on_step=interrupting, **kwargs)

    monkeypatch.setattr(demo, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "demo")
    assert len(list((tmp_path / "demo" / "stages").iterdir())) == stage
    monkeypatch.setattr(demo, "train", real)
    skip_measuring(monkeypatch)
    results = run(tmp_path / "demo")
    assert learned(results) == learned(straight[1])
    assert weights(tmp_path / "demo") == weights(straight[0])


def skip_measuring(monkeypatch):
    real = demo._Demo.stages

    def stages(self):
        return {name: stage for name, stage in real(self).items() if not stage.measures}

    monkeypatch.setattr(demo._Demo, "stages", stages)


_KILLED = """
    import sys
    sys.path.insert(0, {tests!r})
    import test_demo as t
    from dass import training
    training._SAVE_EVERY_S = 0.0
    t.torch.set_num_threads(1)
    t.run({folder!r} and t.cli.Path({folder!r}))
"""


@pytest.mark.slow
def test_after_kill_9_the_run_ends_as_the_straight_one(straight, tmp_path, monkeypatch, one_thread):
    folder = tmp_path / "demo"
    script = textwrap.dedent(_KILLED).format(tests=os.path.dirname(__file__), folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", script]) as child:
        while not (folder / "sparse-90.pt").exists():
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    skip_measuring(monkeypatch)
    results = run(folder)
    assert learned(results) == learned(straight[1])
    assert weights(folder) == weights(straight[0])


def test_images_that_have_changed_since_are_told(straight, monkeypatch):
    """CIFAR-10 that could not be had when the run was begun."""
    data = dataclasses.replace(demo.load_data("digits", train=True), name="cifar10")
    monkeypatch.setattr(demo, "load_data", lambda *args, **kwargs: data)
    runs = RunFolder(straight[0], dataclasses.asdict(TINY))
    with pytest.raises(UserError, match="begun on digits, and now there is cifar10"):
        demo._Demo(TINY, runs).train_data  # noqa: B018


def test_other_settings_are_another_run(straight):
    other = dataclasses.replace(TINY, images=100, seed=1)
    with pytest.raises(UserError, match=r"images 200, not 100; seed 0, not 1.*--fresh"):
        run_demo(other, straight[0], quiet())


def test_different_logits_stop_the_demo(straight, tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    RunFolder(folder, dataclasses.asdict(TINY))
    for path in (*straight[0].glob("*.safetensors"), *(straight[0] / "stages").glob("*.json")):
        target = folder / path.relative_to(straight[0])
        target.write_bytes(path.read_bytes())
    (folder / "stages" / "compare-results.json").unlink()
    monkeypatch.setattr(latency, "relative_error", lambda got, want: 2e-4)
    with pytest.raises(ResultsDifferError, match="logits run sparse and dense differ"):
        run(folder)
    assert not (folder / "stages" / "compare-results.json").exists()


def test_few_images_are_trained_on_for_more_epochs(straight, tmp_path):
    sizes = dataclasses.replace(TINY, images=10_000)
    done = demo._Demo(sizes, RunFolder(tmp_path / "demo", {}))
    done.train_data = demo.load_data("digits", train=True)
    assert done.config(5, 0.1).epochs == 20  # four times, at most
    assert straight[1]["stages"]["train"]["epochs"] == TINY.epochs


def test_threads_are_chosen_by_time_and_kept(tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    settings = dataclasses.replace(TINY, threads=None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    runs = RunFolder(folder, dataclasses.asdict(settings))
    made = demo._Demo(settings, runs)
    assert made.count == 4
    assert next(iter(made.stages())) == "threads"
    result = {"threads": 1, "step_ms": {"1": 1.0, "4": 2.0}}
    runs.finish("threads", result, made.facts)
    assert made.count == 1


# Run folders


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="no run folder"):
        RunFolder(tmp_path, {}, fresh=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_fresh_removes_the_run_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    runs = RunFolder(folder, {"a": 1})
    runs.finish("train", {"x": 1})
    for name in ("model.safetensors", "report.html", "checkpoint.pt", "notes.txt", "plot.png"):
        (folder / name).write_text("x")
    again = RunFolder(folder, {"a": 2}, fresh=True)
    assert again.stage("train") is None
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "stages", "notes.txt", "plot.png",
    }  # fmt: skip


def test_a_setting_that_an_older_run_did_not_know_is_off(tmp_path):
    RunFolder(tmp_path / "run", {"a": 1})
    RunFolder(tmp_path / "run", {"a": 1, "new": False})
    with pytest.raises(UserError, match="new False, not True"):
        RunFolder(tmp_path / "run", {"a": 1, "new": True})


def test_times_of_another_machine_are_taken_again(tmp_path):
    runs = RunFolder(tmp_path / "run", {})
    runs.finish("train", {"x": 1})
    runs.finish("times", {"y": 2}, {"cpu": "a"})
    assert runs.stage("train", {"cpu": "b"}) == {"x": 1}
    assert runs.stage("times", {"cpu": "a"}) == {"y": 2}
    assert runs.stage("times", {"cpu": "b"}) is None


def test_a_damaged_result_is_a_clear_error(tmp_path):
    runs = RunFolder(tmp_path / "run", {})
    runs.finish("train", {"x": 1})
    (tmp_path / "run" / "stages" / "train.json").write_text("{")
    with pytest.raises(UserError, match="delete it, or use --fresh"):
        runs.stage("train")


def test_the_tolerance_of_the_demo_is_that_of_the_timings():
    assert demo.TOLERANCE == latency.TOLERANCE == 1e-4

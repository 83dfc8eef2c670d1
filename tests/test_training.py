"""Training: the schedule, learning, resuming bit for bit after any kind of end, refusals."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn

import dass
from dass import data as images
from dass import training
from dass.training import CheckpointError, TrainConfig, TrainingError, evaluate, train

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=0.05, seed=3)
STEPS = 3 * 5  # 80 images


@pytest.fixture(scope="module")
def data():
    return images.load("synthetic", train=True, size=8, limit=80)


@pytest.fixture(scope="module")
def test_data():
    return images.load("synthetic", train=False, size=8, limit=50)


def net(sparsity=0.0):
    """With dropout, so that the random state matters, and BatchNorm, which has buffers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    if sparsity:
        dass.prune(model, sparsity, exclude="first")
    return model


def bits(model):
    return {k: (v.shape, v.numpy().tobytes()) for k, v in model.state_dict().items()}


def rows(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def interrupt_at(step):
    def on_step(progress):
        if progress.step == step:
            signal.raise_signal(signal.SIGINT)

    return on_step


def test_the_rate_rises_to_its_top_and_falls_to_nothing():
    config = TrainConfig(lr=0.4, warmup=0.25)
    rates = [config.lr_at(step, 100) for step in range(100)]
    assert max(rates) == rates[25] == 0.4
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert 0 < rates[0] < 0.02
    assert 0 < rates[-1] < 0.001


def test_without_warmup_the_rate_starts_at_its_top():
    assert TrainConfig(lr=0.4, warmup=0).lr_at(0, 10) == 0.4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("warmup", 1.0),
        ("label_smoothing", 1.0),
    ],
)
def test_a_config_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TrainConfig(**{name: value})


def test_it_learns(test_data):
    data = images.load("synthetic", train=True, size=8)
    model = net()
    before = evaluate(model, test_data)
    result = train(model, data, TrainConfig(epochs=3, batch_size=32), test=test_data)
    after = evaluate(model, test_data)
    assert after.accuracy > 0.5 > before.accuracy
    assert after.loss < before.loss
    assert result.history[-1]["test_accuracy"] == after.accuracy
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert not model.training


def test_the_progress_counts_steps_and_epochs(data):
    seen = []
    train(net(), data, CONFIG, on_step=seen.append)
    assert [p.step for p in seen] == list(range(1, STEPS + 1))
    assert [p.epoch for p in seen] == [1] * 5 + [2] * 5 + [3] * 5
    assert {(p.steps, p.epochs) for p in seen} == {(STEPS, 3)}


def test_the_callers_random_state_is_left_alone(data):
    state = torch.get_rng_state()
    train(net(), data, CONFIG)
    model = net()
    torch.set_rng_state(state)
    train(model, data, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("step", [1, 7, 10, STEPS])
def test_a_run_that_was_interrupted_ends_as_the_straight_run(
    data, test_data, tmp_path, sparsity, step
):
    straight = net(sparsity)
    want = train(straight, data, CONFIG, test=test_data)
    broken, path = net(sparsity), tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(broken, data, CONFIG, test=test_data, checkpoint=path, on_step=interrupt_at(step))
    again = net(sparsity)
    got = train(again, data, CONFIG, test=test_data, checkpoint=path)
    assert got.resumed_at == step
    assert rows(got.history) == rows(want.history)
    assert bits(again) == bits(straight)


def test_ctrl_c_lets_the_step_end_and_gives_the_handlers_back(data, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    seen = []

    def on_step(progress):
        seen.append(progress.step)
        if progress.step == 4:
            signal.raise_signal(signal.SIGTERM)
            seen.append("still here")

    with pytest.raises(KeyboardInterrupt):
        train(net(), data, CONFIG, checkpoint=tmp_path / "c.pt", on_step=on_step)
    assert seen == [1, 2, 3, 4, "still here"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_it_trains_outside_the_main_thread(data):
    results = []
    worker = threading.Thread(target=lambda: results.append(train(net(), data, CONFIG)))
    worker.start()
    worker.join()
    assert results[0].steps == STEPS


_KILLED = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import test_training as t
    from dass import data, training
    training._SAVE_EVERY_S = 0.0
    def on_step(progress):
        print(progress.step, flush=True)
        time.sleep(0.05)
    torch = t.torch
    torch.set_num_threads({threads})
    images = data.load("synthetic", train=True, size=8, limit=80)
    training.train(t.net(0.8), images, t.CONFIG, checkpoint={path!r}, on_step=on_step)
"""


def test_a_run_that_was_killed_ends_as_the_straight_run(data, tmp_path):
    path = tmp_path / "checkpoint.pt"
    script = textwrap.dedent(_KILLED).format(
        tests=os.path.dirname(__file__), path=str(path), threads=torch.get_num_threads()
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        for line in child.stdout:
            if int(line) == 8:
                child.send_signal(signal.SIGKILL)
                break
    assert path.exists()
    straight, again = net(0.8), net(0.8)
    train(straight, data, CONFIG)
    result = train(again, data, CONFIG, checkpoint=path)
    assert 7 <= result.resumed_at <= 9
    assert bits(again) == bits(straight)


def test_a_finished_checkpoint_gives_the_network_back_at_once(data, tmp_path):
    done, path = net(), tmp_path / "checkpoint.pt"
    want = train(done, data, CONFIG, checkpoint=path)
    again, seen = net(), []
    got = train(again, data, CONFIG, checkpoint=path, on_step=seen.append)
    assert not seen
    assert bits(again) == bits(done)
    assert got.history == want.history
    assert got.seconds == want.seconds


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"lr": 0.06}, "lr 0.05, not 0.06"), ({"seed": 4}, "seed 3, not 4")],
)
def test_a_checkpoint_of_another_config_is_refused(data, tmp_path, changes, says):
    path = tmp_path / "checkpoint.pt"
    train(net(), data, CONFIG, checkpoint=path)
    other = TrainConfig(**{**vars(CONFIG), **changes})
    with pytest.raises(CheckpointError, match=says):
        train(net(), data, other, checkpoint=path)


def test_a_checkpoint_of_other_images_or_another_network_is_refused(data, test_data, tmp_path):
    path = tmp_path / "checkpoint.pt"
    train(net(), data, CONFIG, checkpoint=path)
    with pytest.raises(CheckpointError, match="images 80, not 50"):
        train(net(), test_data, CONFIG, checkpoint=path)
    with pytest.raises(CheckpointError, match="another network"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), data, CONFIG, checkpoint=path)


def test_a_checkpoint_from_before_a_setting_goes_on(data, tmp_path):
    path = tmp_path / "checkpoint.pt"
    train(net(), data, CONFIG, checkpoint=path)
    state = torch.load(path, weights_only=True)
    del state["identity"]["resized_crop"]
    torch.save(state, path)
    assert train(net(), data, CONFIG, checkpoint=path).resumed_at == STEPS
    with pytest.raises(CheckpointError, match="resized_crop False, not True"):
        train(net(), data, TrainConfig(**{**vars(CONFIG), "resized_crop": True}), checkpoint=path)


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "text", "other"])
def test_a_damaged_checkpoint_is_a_clear_error(data, tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    train(net(), data, CONFIG, checkpoint=path)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "altered":
        path.write_bytes(b"\0" * 64 + whole[64:-200] + b"\0" * 200)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("no checkpoint")
    else:
        torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="delete it"):
        train(net(), data, CONFIG, checkpoint=path)


class _Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("writer", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, 2))])
def test_code_in_a_checkpoint_is_not_run(data, tmp_path, writer):
    path = tmp_path / "checkpoint.pt"
    writer({"format": 1, "identity": _Bomb()}, path)
    with pytest.raises(CheckpointError):
        train(net(), data, CONFIG, checkpoint=path)


def test_a_full_disk_leaves_the_old_checkpoint(data, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(net(), data, CONFIG, checkpoint=path, on_step=interrupt_at(6))
    whole = path.read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        train(net(), data, CONFIG, checkpoint=path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_time_makes_checkpoints_too(data, tmp_path, monkeypatch):
    path, clock = tmp_path / "checkpoint.pt", iter(range(0, 10_000, 6))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    steps = []

    def on_step(progress):
        if path.exists():
            steps.append((progress.step, torch.load(path, weights_only=True)["step"]))

    train(net(), data, CONFIG, checkpoint=path, on_step=on_step)
    assert steps[0] == (4, 3)  # 15 s are over after the third step


def test_masks_hold_through_training(data):
    model = net(0.8)
    masks = {n: m.mask.clone() for n, m in model.named_modules() if hasattr(m, "mask")}
    assert len(masks) == 2
    train(model, data, CONFIG)
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.mask, mask)
        assert not layer.weight[~mask].any()
        assert layer.weight[mask].all()


def test_a_pruned_network_trains_as_the_masked_dense_one(data):
    """The sparse kernels in all three products, against dense layers and masked gradients."""
    sparse = net(0.8)
    dense = dass.densify(sparse)
    config = TrainConfig(epochs=1, batch_size=16, lr=0.05, channels_last=False)
    for name, layer in sparse.named_modules():
        if hasattr(layer, "mask"):
            weight = dense.get_submodule(name).weight
            weight.register_hook(lambda grad, mask=layer.mask: grad * mask)
    train(sparse, data, config)
    train(dense, data, config)
    for name, want in dense.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], want, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_no_number_ends_the_run(data):
    with pytest.raises(TrainingError, match="learning rate below 1e\\+30"):
        train(net(), data, TrainConfig(epochs=1, lr=1e30, warmup=0))


def test_no_images_are_refused(data):
    with pytest.raises(ValueError, match="no training images"):
        train(net(), data.take(torch.arange(0)), CONFIG)


def test_digits_are_not_mirrored(monkeypatch, data):
    flips = []
    real = images.Augment.crop_flip
    monkeypatch.setattr(
        images.Augment,
        "crop_flip",
        lambda self, x, g: flips.append(self.flip) or real(self, x, g),
    )
    train(net(), data, TrainConfig(epochs=1))
    digits = images.load("digits", train=True, size=8, limit=20)
    train(net(), digits, TrainConfig(epochs=1))
    assert flips == [True, True, False]


def test_evaluation_does_not_depend_on_batches_and_leaves_the_mode(test_data):
    model = net().train()
    whole, parts = evaluate(model, test_data, 50), evaluate(model, test_data, 7)
    assert model.training
    assert whole.correct == parts.correct
    assert whole.loss == pytest.approx(parts.loss)
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(test_data.normalise(test_data.images))
    assert whole.correct == int((logits.argmax(1) == test_data.labels).sum())
    assert whole.images == 50

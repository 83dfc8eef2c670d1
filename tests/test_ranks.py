"""Training by two processes: the same network on both, that of one process, files from one only."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import dass
from dass.data import load
from dass.distributed import on_rank_zero, total
from dass.masks import keep_count
from dass.training import TrainConfig, train

METHODS = ["magnitude", "gradual", "hydra", "snip", "rigl"]

STAGES = """
    import sys, torch
    import torch.distributed as dist
    from dass.data import load
    from dass.distributed import check_equal
    from dass.methods import run_stage, stages_of
    from test_methods import Net, recipe, sparse_layers
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), sys.argv[1]
    images = load("synthetic", train=True, size=12, limit=61)
    for method in sys.argv[2:]:
        torch.manual_seed(rank)  # ranks begin apart: rank 0's word has to hold
        net, histories = Net(), []
        for stage in stages_of(method, recipe(epochs=2, drop_path=0.2), 0.9, seed=rank):
            test = images.take(torch.arange(15))
            histories += run_stage(net, stage, images, test=test).history
        check_equal(net.state_dict().values(), method)
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in histories]
        torch.save([net.state_dict(), rows], f"{folder}/{method}-{rank}.pt")
    dist.destroy_process_group()
"""


def two_ranks(script, *arguments):
    """Runs the script in two processes of one group; -> their outputs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(STAGES, folder, *METHODS)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_both_ranks_end_with_one_network_at_the_exact_count(stages, method):
    (state, rows), (other, other_rows) = (
        torch.load(stages / f"{method}-{rank}.pt") for rank in (0, 1)
    )
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert rows == other_rows and all(0 <= row["test_accuracy"] <= 1 for row in rows)
    masks = {name: mask for name, mask in state.items() if name.endswith("mask")}
    assert len(masks) == 4
    counts = [(int(mask.sum()), mask.numel()) for mask in masks.values()]
    for name, mask in masks.items():
        assert not bool(state[name.replace("mask", "weight")][~mask].any())
    if method in ("snip", "rigl"):
        total_kept = sum(kept for kept, _ in counts)
        assert total_kept == keep_count(sum(n for _, n in counts), 0.1)
    else:
        assert all(kept == keep_count(n, 0.1) for kept, n in counts)


TRAIN = """
    import signal, sys, torch
    import torch.distributed as dist
    from pathlib import Path
    from dass.distributed import on_rank_zero
    from test_ranks import CONFIG, IMAGES, net, train
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, folder, stop = dist.get_rank(), Path(sys.argv[1]), int(sys.argv[2])
    def on_step(progress):
        if progress.step == stop and rank == 1:  # one rank is asked to stop: both do
            signal.raise_signal(signal.SIGTERM)
    path = folder / "checkpoint.pt"
    resumed = -1
    model = net(rank)
    try:
        result = train(model, IMAGES, CONFIG, checkpoint=path, on_step=on_step)
        resumed = result.resumed_at
    except KeyboardInterrupt:
        model = net(5 + rank)
        result = train(model, IMAGES, CONFIG, checkpoint=path)
        resumed = result.resumed_at
    torch.save([model.state_dict(), resumed], folder / f"{rank}.pt")
    try:
        on_rank_zero(lambda: 1 // 0 if rank == 0 else exit(1))
    except ZeroDivisionError as error:
        print("BOTH", error)
    dist.destroy_process_group()
    tasks = Path("/proc/self/task")
    if tasks.exists():
        print("LEFT", [(task / "comm").read_text().strip() for task in tasks.iterdir()])
"""
CONFIG = TrainConfig(epochs=2, batch_size=20, lr=0.05, augment=False, channels_last=False, clip=1.0)
IMAGES = load("synthetic", train=True, size=12, limit=60)


def net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(200, 10),
    )
    dass.prune(model, 0.8, exclude="last")
    return model


def test_two_processes_train_as_one_does(tmp_path, one_thread):
    """The same images in each step, half on each rank; and a run that was stopped goes on."""
    alone = net()
    train(alone, IMAGES, CONFIG)
    outputs = two_ranks(TRAIN, tmp_path, 0)
    assert all("BOTH integer division" in output for output in outputs)
    assert not any("gloo" in output.split("LEFT")[-1] for output in outputs)
    (state, _), (other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in alone.state_dict().items():
        assert torch.equal(state[name], other[name])
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    two_ranks(TRAIN, stopped, 4)
    for rank in (0, 1):
        resumed, at = torch.load(stopped / f"{rank}.pt")
        assert at == 4
        assert all(torch.equal(value, state[name]) for name, value in resumed.items())


COMMAND = """
    import sys
    from dass.cli import main
    main()
"""


def test_the_command_writes_and_speaks_once(tmp_path):
    words = ["sparse", "resnet20", "--width", "0.25", "--method", "magnitude", "--recipe", "smoke"]
    words += ["--data", "synthetic", "--size", "8", "--limit", "64", "--threads", "1"]
    words += ["--run", tmp_path / "run"]
    first, second = two_ranks(COMMAND, *words)
    assert "finetune:" in first and not second.strip()
    found = json.loads((tmp_path / "run" / "report.json").read_text())["data"]
    model = dass.load(tmp_path / "run" / "model.safetensors")
    nonzeros = sum(int(m.weight.count_nonzero()) for m in model.modules() if hasattr(m, "mask"))
    assert nonzeros == found["nonzeros"]
    first, second = two_ranks(COMMAND, *words)
    assert "pretrain, finetune done" in " ".join(first.split()) and not second.strip()


def test_fewer_images_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr("dass.training.rank_and_world", lambda: (0, 80))
    with pytest.raises(ValueError, match="60 training images for 80 processes"):
        train(net(), IMAGES, CONFIG)


def test_one_process_decides_alone():
    assert total([2, 0.5]) == [2, 0.5]
    assert on_rank_zero(lambda: "done") == "done"

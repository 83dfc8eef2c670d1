"""The search from end to end, on noise: exact counts, resuming, guards, ranks."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict, replace

import pytest
import torch

from dass import data
from dass.checkpoints import CheckpointError
from dass.genotype import Genotype
from dass.guards import signs_of_collapse
from dass.masks import keep_count, pattern_fits, pattern_mask
from dass.runs import UserError
from dass.searching import Searcher, search
from dass.space import CONCAT, edge_index
from dass.sparse_supernet import densities_of, sparse_layers
from dass.strategies import PRESETS, STRATEGIES, SearchConfig, phases_of, preset

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = SearchConfig(
    dataset="synthetic",
    size=8,
    limit=32,
    channels=4,
    layers=1,
    batch_size=8,
    epochs=(1, 1, 1),
    density=0.1,
    alpha_lr=0.01,
)


@pytest.fixture(scope="module")
def images():
    return data.load("synthetic", train=True, size=8, limit=32)


def finished(config, images) -> Searcher:
    run = Searcher(config, images, None)
    while run.phase is not None and run.stopped is None:
        run.epoch(None, lambda: False)
    return run


def test_three_phases_train_what_they_should(images):
    run = Searcher(TINY, images, None)
    start = [p.detach().clone() for p in run.architecture.parameters()]
    weights = [p.detach().clone() for p in run.network.parameters()]
    run.epoch(None, lambda: False)

    assert any(
        not torch.equal(a, b) for a, b in zip(start, run.architecture.parameters(), strict=True)
    )
    layers = list(sparse_layers(run.network))
    assert layers and all(layer.scores is not None for layer in layers)
    for layer in layers:  # scaled score init: the first mask is the magnitude mask
        fan_in = math.prod(layer.weight.shape[1:])
        scale = math.sqrt(6 / fan_in) / float(layer.weight.abs().max())
        torch.testing.assert_close(layer.scores, layer.weight * scale, rtol=1e-6, atol=0)
        count = keep_count(layer.weight.numel(), 0.1)
        assert int(layer.current_mask().sum()) == count
    before = [layer.weight.detach().clone() for layer in layers]
    scores = [layer.scores.detach().clone() for layer in layers]
    alphas = [p.detach().clone() for p in run.architecture.parameters()]
    run.epoch(None, lambda: False)

    assert all(layer.scores is None for layer in layers)  # frozen now, and pruned
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, old * layer.mask)
    assert all(
        torch.equal(a, b) for a, b in zip(alphas, run.architecture.parameters(), strict=True)
    )
    assert len(scores) == len(layers) and len(weights) > 0
    masks = [layer.mask.clone() for layer in layers]
    run.epoch(None, lambda: False)

    assert run.phase is None
    for layer, mask in zip(layers, masks, strict=True):
        assert torch.equal(layer.mask, mask) and bool((layer.weight[~mask] == 0).all())
        assert int(mask.sum()) == keep_count(mask.numel(), 0.1)
    assert any(
        not torch.equal(a, b) for a, b in zip(alphas, run.architecture.parameters(), strict=True)
    )


def test_finetuning_on_the_sparse_kernels_is_masked_dense_training(images):
    run = Searcher(replace(TINY, epochs=(0, 1, 1)), images, None)
    run.epoch(None, lambda: False)
    assert run.phase.name == "finetune"
    x, y = next(iter(run.train))
    weights = {cell: w.detach() for cell, w in run.architecture.weights().items()}

    def gradients():
        run.network.zero_grad()
        loss, _ = run._loss(x, y, weights)
        loss.backward()
        found = [(p, p.grad) for p in run.network.parameters()]
        return loss.detach(), [torch.zeros_like(p) if g is None else g.clone() for p, g in found]

    packed = list(sparse_layers(run.network))
    assert all(layer.is_packed for layer in packed)
    assert all(cell.live for cell in run.network.cells)
    loss, found = gradients()
    run.network.skip_dead(False)
    for layer in packed:
        layer.is_packed = False
    expected, dense = gradients()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, dense, strict=True):
        # Sums in another order, through a hundred BatchNorms of batches of 8.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_ends_in_a_genotype(strategy, images):
    config = replace(TINY, strategy=strategy, second_order=strategy == "darts")
    result = search(config, data=images)
    assert isinstance(result.genotype, Genotype) and result.stopped is None
    assert len(result.history) == sum(phase.epochs for phase in phases_of(config))
    assert all(math.isfinite(row["train_loss"]) for row in result.history)
    again = search(config, data=images)
    assert again.genotype == result.genotype
    assert [row["train_loss"] for row in again.history] == [
        row["train_loss"] for row in result.history
    ]


def test_second_order_in_the_sparse_phase(images):
    config = replace(TINY, epochs=(0, 1, 1), second_order=True)
    run = finished(config, images)
    for layer in sparse_layers(run.network):
        assert bool((layer.weight[~layer.mask] == 0).all())
    assert all(math.isfinite(row["train_loss"]) for row in run.history)


def test_a_cubic_schedule_ends_at_the_target(images):
    run = Searcher(replace(TINY, epochs=(0, 4, 1), schedule="cubic"), images, None)
    shares = []
    for _ in range(4):
        run.epoch(None, lambda: False)
        shares.append(run.history[-1]["density"])
    layers = list(sparse_layers(run.network))
    total = sum(layer.weight.numel() for layer in layers)
    exact = sum(keep_count(layer.weight.numel(), 0.1) for layer in layers) / total
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.15
    assert shares[-1] == exact


def test_densities_of_choices_and_exclusion(images):
    config = replace(TINY, densities=(0.5, 0.25), epochs=(0, 1, 1), exclude=("depthwise",))
    run = Searcher(config, images, None)
    densities = densities_of(run.network, config.density)
    assert set(densities.values()) == {0.5, 0.25, 0.1}
    for layer, density in densities.items():
        assert int(layer.current_mask().sum()) == keep_count(layer.weight.numel(), density)
        assert layer.groups == 1 if hasattr(layer, "groups") else True


@pytest.mark.parametrize("pattern", ["2:4", "4x1", "32x2"])
def test_a_search_under_a_pattern(pattern, images):
    """Layers that the pattern fits obey it, the others are unstructured; all keep their number."""
    density = 0.5 if pattern == "2:4" else 0.1
    config = replace(TINY, pattern=pattern, density=density, channels=32, epochs=(0, 1, 1))
    network = finished(config, images).network
    obeying = 0
    for layer in sparse_layers(network):
        groups = getattr(layer, "groups", 1)
        fits = pattern_fits(layer.weight.shape, pattern, groups)
        assert layer.pattern == (pattern if fits else "unstructured")
        again = pattern_mask(layer.mask.double(), density, layer.pattern, groups=groups)
        assert torch.equal(again, layer.mask)
        obeying += fits
    assert obeying > 50


def test_costs_pull_the_architecture(images):
    """With a heavy price on nonzeros the expected number falls by more than without."""
    ends = {}
    for weight in (0.0, 10.0):
        config = replace(TINY, strategy="darts", epochs=(4, 0, 0), alpha_lr=0.05)
        config = replace(config, nonzero_weight=weight)
        ends[weight] = finished(config, images).history[-1]["expected_cost"]["nonzeros"]
    assert ends[10.0] < 0.9 * ends[0.0]


def test_a_limit_of_nonzeros_holds_for_the_genotype(images):
    config = replace(TINY, strategy="darts", epochs=(1, 0, 0))
    free = Searcher(config, images, None)
    with torch.no_grad():  # dear operations are the strongest, by amounts that differ
        costs = free.costs.tables["nonzeros"]
        for cell, alpha in free.architecture.named_parameters():
            alpha.copy_(torch.rand(alpha.shape) + 0.01 * costs[cell])
    state = free.architecture.state_dict()
    spent = free.costs.of("nonzeros", free.genotype(), free.network.choices)
    assert free.genotype() == free.architecture.genotype() and spent > 100
    before, strength = free.genotype(), {}
    for limit in (int(0.9 * spent), int(0.5 * spent), 20):
        run = Searcher(replace(config, nonzero_limit=limit), images, None)
        run.architecture.load_state_dict(state)
        genotype = run.genotype()
        assert run.costs.of("nonzeros", genotype, run.network.choices) <= limit
        assert genotype != before
        before = genotype
        strength[limit] = sum(
            float(run.architecture.weights()[cell][edge_index(node, edge.input), c].detach().log())
            for cell in ("normal", "reduce")
            for node, edges in zip(CONCAT, getattr(genotype, cell), strict=True)
            for edge in edges
            for c in [[choice.op for choice in run.network.choices].index(edge.op)]
        )
    assert list(strength.values()) == sorted(strength.values(), reverse=True)
    result = search(replace(config, nonzero_limit=50), data=images)
    assert Searcher(config, images, None).costs.of(
        "nonzeros", result.genotype, free.network.choices
    ) <= 50  # fmt: skip


def test_a_limit_that_no_network_keeps_is_an_error_at_once(images, monkeypatch):
    run = Searcher(replace(TINY, nonzero_limit=1), images, None)  # pools have no weights
    dear = {cell: table + 1 for cell, table in run.costs.tables["nonzeros"].items()}
    costs = replace(run.costs, tables={"nonzeros": dear})
    with pytest.raises(UserError, match="a limit of 1 nonzeros is below the least, 16"):
        costs.genotype(run.architecture)


def broken_off(config, images, path, after: int) -> None:
    run, calls = Searcher(config, images, path), iter(range(1, 1000))
    while run.phase is not None:
        run.epoch(None, lambda: next(calls) == after)


@pytest.mark.parametrize("strategy", ["dass", "one_loop"])
def test_resume_is_bit_equal(strategy, images, tmp_path):
    config = replace(TINY, strategy=strategy, epochs=(1, 1, 1))
    straight = finished(config, images)
    steps = straight.step
    for stop in range(1, steps, 2):
        path = tmp_path / f"{stop}.pt"
        with pytest.raises(KeyboardInterrupt):
            broken_off(config, images, path, stop)
        result = search(config, data=images, checkpoint=path)
        assert result.resumed_at > 0
        assert result.genotype == straight.architecture.genotype()
        for row, other in zip(result.history, straight.history, strict=True):
            assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_a_checkpoint_of_another_search_is_refused(images, tmp_path):
    path = tmp_path / "c.pt"
    search(replace(TINY, strategy="darts"), data=images, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"density 0\.1, not 0\.2"):
        search(replace(TINY, strategy="darts", density=0.2), data=images, checkpoint=path)


KILLED = """
    import sys, torch
    from dass.searching import search
    from dass.strategies import SearchConfig
    torch.set_num_threads(1)
    from pathlib import Path
    import dass.searching, json
    dass.searching._SAVE_EVERY_S = 0.0
    config = SearchConfig(**json.loads(sys.argv[1]))
    told = lambda p: print(p.step, flush=True)
    result = search(config, checkpoint=Path(sys.argv[2]), on_step=told)
    rows = [{**row, "seconds": 0} for row in result.history]
    print("END", json.dumps([result.genotype.to_json(), rows]))
"""


def test_a_killed_search_goes_on_to_the_same_end(tmp_path):
    settings = json.dumps({**asdict(TINY), "exclude": []})
    code = textwrap.dedent(KILLED)

    def start(path):
        command = [sys.executable, "-c", code, settings, str(path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    straight, _ = start(tmp_path / "a.pt").communicate(timeout=240)
    process = start(tmp_path / "b.pt")
    for line in process.stdout:
        if line.strip() == "3":
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait(timeout=60) == -signal.SIGKILL
    resumed, _ = start(tmp_path / "b.pt").communicate(timeout=240)
    assert "\n1\n" not in f"\n{resumed}" and "END" in resumed
    assert resumed[resumed.index("END") :] == straight[straight.index("END") :]


def test_the_collapse_guard_stops_a_forced_case(images):
    """Alphas pushed to skip connections at the start: the guard sees them after the first epoch."""
    config = replace(TINY, strategy="darts", epochs=(3, 0, 0), guard="stop")
    run = Searcher(config, images, None)
    skip = [c.op for c in run.network.choices].index("skip_connect")
    with torch.no_grad():
        for alpha in run.architecture.parameters():
            alpha[:, skip] += 5.0
    while run.phase is not None and run.stopped is None:
        run.epoch(None, lambda: False)
    assert run.stopped.startswith("skips: 8 of 8") and len(run.history) == 1
    assert any(sign.startswith("parameter_free") for sign in run.history[0]["signs"])


def test_signs_of_collapse():
    healthy = Genotype.random(3)
    growing = [1.0] * 5 + [1.5] * 5
    assert [s.split(":")[0] for s in signs_of_collapse(healthy, growing)][-1:] == ["eigenvalue"]
    assert not any("eigenvalue" in s for s in signs_of_collapse(healthy, [1.0] * 9 + [1.5]))
    assert not any("eigenvalue" in s for s in signs_of_collapse(healthy, growing[:9]))


RANKS = """
    import json, os, sys, torch
    from dataclasses import replace
    import torch.distributed as dist
    torch.set_num_threads(1)
    import dass.searching
    from dass import data
    from dass.distributed import RanksDiffer, check_equal
    from dass.searching import Searcher
    from dass.strategies import SearchConfig
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    config = SearchConfig(**json.loads(sys.argv[1]))
    images = data.load("synthetic", train=True, size=8, limit=32)
    if rank == 1:  # ranks begin apart: rank 0's word has to hold
        config_here = replace(config, seed=99)
        network, architecture = dass.searching.build(config_here, images)
        dass.searching.build = lambda config, data: (network, architecture)
    run = Searcher(config, images, None)
    while run.phase is not None:
        run.epoch(None, lambda: False)
    state = [*run.architecture.parameters(), *run.network.state_dict().values()]
    check_equal(state, "network")
    try:
        check_equal([torch.tensor([rank])], "rank")
    except RanksDiffer as error:
        print("DIFFER", error, flush=True)
    losses = [row["train_loss"] for row in run.history]
    print("RANK", rank, json.dumps([run.architecture.genotype().to_json(), losses]), flush=True)
    dist.destroy_process_group()
"""


def test_two_ranks_hold_the_same_network(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    settings = json.dumps({**asdict(TINY), "batch_size": 4})
    port = str(20000 + os.getpid() % 20000)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, str(script), settings]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**environment, "RANK": str(rank)}
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all("DIFFER rank of rank 1 are not those of rank 0" in out for out in outputs)
    found = [json.loads(out.split("RANK ")[-1].split(" ", 1)[1]) for out in outputs]
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]  # each rank saw other images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "magic"}, "strategy must be one of dass, one_loop, darts, random"),
        ({"density": 0.0}, r"density and densities must be in \(0, 1\]"),
        ({"densities": (0.5, 2)}, r"density and densities must be in \(0, 1\]"),
        ({"epochs": (1, 1)}, "epochs must be three"),
        ({"guard": "maybe"}, "guard must be warn, stop or off"),
        ({"latency_weight": 1.0}, "latency_weight and latency_limit_us need"),
        ({"latency_limit_us": 9.0}, "latency_weight and latency_limit_us need"),
        ({"nonzero_limit": 9, "selection": "guarded"}, "limits hold for selection alpha only"),
        ({"pattern": "3x3"}, "pattern"),
        ({"schedule": "linear"}, "schedule must be jump or cubic"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_presets():
    for name in PRESETS:
        assert isinstance(preset(name, dataset="digits"), SearchConfig)
    with pytest.raises(ValueError, match="unknown preset 'huge'; known: paper"):
        preset("huge")
    assert preset("paper").epochs == (100, 50, 100) and preset("paper").density == 0.01


def test_the_rate_of_a_phase_is_its_own_cosine():
    phase = phases_of(replace(TINY, epochs=(4, 2, 4)))[0]
    rates = [phase.lr_at(epoch, 0.001) for epoch in range(5)]
    assert rates[0] == pytest.approx(0.025) and rates[4] == pytest.approx(0.001)
    assert rates[2] == pytest.approx(0.013)

"""The ways to a sparse network: what each stage changes, exact counts, SNIP, RigL, resuming."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import dass
from dass import cli
from dass.data import Batches
from dass.masks import keep_count
from dass.methods import (
    METHODS,
    RECIPES,
    run_stage,
    snip_scores,
    stages_of,
    still_statistics,
)
from dass.nn import SparseConv2d, SparseLinear
from dass.pruning import prune
from dass.rigl import RigL, dense_gradients, drop_and_grow

pytestmark = pytest.mark.usefixtures("one_thread")

SMOKE = RECIPES["smoke"]


class Net(nn.Module):
    """Two convolutions, BatchNorm, an auxiliary head in training, and a drop-path setting."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 20, 3, stride=2)
        self.head, self.extra = nn.Linear(20, 10), nn.Linear(12, 10)
        self.drop_path_prob, self.seen = 0.0, []

    def forward(self, x):
        self.seen.append(self.drop_path_prob)
        middle = F.relu(self.bn(self.conv1(x)))
        y = self.head(F.relu(self.conv2(middle)).mean((2, 3)))
        return (y, self.extra(middle.mean((2, 3)))) if self.training else y


@pytest.fixture
def images():
    return dass.data.load("synthetic", train=True, size=12, limit=60)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (SparseConv2d, SparseLinear))}


def recipe(epochs=1, **changes):
    change = dict(batch_size=20, **changes)
    return replace(
        SMOKE,
        pretrain=replace(SMOKE.pretrain, epochs=epochs, **change),
        prune=replace(SMOKE.prune, epochs=epochs, **change),
        finetune=replace(SMOKE.finetune, epochs=epochs, **change),
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_the_exact_count(net, images, method):
    for stage in stages_of(method, recipe(), 0.9, scope="uniform"):
        run_stage(net, stage, images)
    layers = sparse_layers(net)
    assert list(layers) == ["conv1", "conv2", "head", "extra"]
    for layer in layers.values():
        n = layer.weight.numel()
        assert int(layer.mask.sum()) == keep_count(n, 0.1) == n - int((1 - 0.1) * n + 1e-9)
        assert bool((layer.weight[~layer.mask] == 0).all()) and layer.scores is None


def test_hydra_learns_masks_with_all_else_fixed(net, images):
    fast = replace(SMOKE.prune, epochs=5, lr=2.0, batch_size=20)
    pretrain, learn, finetune = stages_of("hydra", replace(recipe(), prune=fast), 0.8)
    run_stage(net, pretrain, images)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    magnitude = {n: p.abs() for n, p in before.items() if n.endswith("weight") and "bn" not in n}
    run_stage(net, learn, images)
    layers = sparse_layers(net)
    moved = 0
    for name, p in net.named_parameters():
        layer = layers.get(name.rsplit(".", 1)[0])
        if layer is not None and name.endswith("weight"):
            assert torch.equal(p, before[name] * layer.mask)
            kept = keep_count(p.numel(), 0.2)
            largest = magnitude[name].flatten().topk(kept).indices
            moved += kept - int(layer.mask.flatten()[largest].sum())
        else:
            assert torch.equal(p, before[name]), name
    assert moved > 0  # the scores did learn another mask than the magnitudes'
    masks = {n: layer.mask.clone() for n, layer in layers.items()}
    run_stage(net, finetune, images)
    assert all(torch.equal(layers[n].mask, mask) for n, mask in masks.items())
    assert any(not torch.equal(p, before[n] * 1) for n, p in net.named_parameters())


def test_the_auxiliary_head_and_drop_path(net, images):
    (stage, *_) = stages_of("magnitude", recipe(epochs=4, drop_path=0.2), 0.5)
    head = net.extra.weight.detach().clone()
    run_stage(net, stage, images)
    assert not torch.equal(net.extra.weight, head)
    assert sorted(set(net.seen)) == pytest.approx([0.0, 0.05, 0.1, 0.15])
    alone = Net()
    alone.load_state_dict(net.state_dict())
    frozen = alone.extra.weight.detach().clone()
    (stage, *_) = stages_of("magnitude", recipe(auxiliary=0.0, weight_decay=0.0), 0.5)
    run_stage(alone, stage, images)
    assert torch.equal(alone.extra.weight, frozen)


def test_snip_is_the_gradient_times_the_weight(net, images):
    statistics = net.bn.running_mean.clone()
    scores = snip_scores(net, images, 20)
    assert torch.equal(net.bn.running_mean, statistics) and net.training
    assert all(p.grad is None for p in net.parameters())
    x, y = next(iter(Batches(images, 20)))
    F.cross_entropy(net(x)[0], y).backward()
    for name in ("conv1", "conv2", "head"):
        weight = getattr(net, name).weight
        torch.testing.assert_close(scores[name], (weight.grad * weight).abs().detach())
    assert bool((scores["extra"] == 0).all())


def test_snip_keeps_the_globally_largest(net, images):
    scores = snip_scores(net, images, 20)
    (stage,) = stages_of("snip", recipe(), 0.9)
    stage.before(net, images)
    layers = sparse_layers(net)
    kept = torch.cat([scores[n][layer.mask] for n, layer in layers.items()])
    gone = torch.cat([scores[n][~layer.mask] for n, layer in layers.items()])
    total = kept.numel() + gone.numel()
    assert kept.numel() == keep_count(total, 0.1)
    # extra has no gradient: its floor of one weight is below every other score.
    assert kept.sort().values[1] >= gone.max()


def by_hand(weight, gradient, mask, count):
    """RigL's exchange, index by index."""
    weight, gradient, mask = weight.flatten(), gradient.flatten(), mask.flatten().copy()
    kept = sorted(np.flatnonzero(mask), key=lambda i: (abs(weight[i]), i))
    mask[kept[:count]] = False
    free = sorted(np.flatnonzero(~mask), key=lambda i: (-abs(gradient[i]), i))
    grown = np.zeros_like(mask)
    grown[free[:count]] = True
    return mask | grown, grown


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_drop_and_grow_against_an_independent_reference(count):
    generator = torch.Generator().manual_seed(count)
    weight = torch.randint(-3, 4, (5, 8), generator=generator).float()  # many ties
    gradient = torch.randint(-3, 4, (5, 8), generator=generator).float()
    mask = torch.zeros(40, dtype=torch.bool)
    mask[torch.randperm(40, generator=generator)[:20]] = True
    mask = mask.view(5, 8)
    found = drop_and_grow(weight, gradient, mask, count)
    expected = by_hand(weight.numpy(), gradient.numpy(), mask.numpy(), count)
    for tensor, array in zip(found, expected, strict=True):
        assert torch.equal(tensor.flatten(), torch.from_numpy(array))
    assert int(found[0].sum()) == 20


def test_dense_gradients_are_those_of_the_dense_network(net):
    x, y = torch.randn(4, 3, 12, 12), torch.tensor([1, 2, 3, 4])
    prune(net, 0.8)
    dense = dass.densify(net)
    F.cross_entropy(dense(x)[0], y).backward()
    layers = list(sparse_layers(net).values())
    with dense_gradients(layers):
        F.cross_entropy(net(x)[0], y).backward()
    assert bool((net.conv2.weight.grad[~net.conv2.mask] != 0).any())
    for name, layer in sparse_layers(net).items():
        expected = dense.get_submodule(name).weight.grad
        expected = torch.zeros_like(layer.weight) if expected is None else expected
        got = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
        torch.testing.assert_close(got, expected)
        assert layer.is_packed and int(layer.mask.sum()) < layer.mask.numel()


def test_rigl_exchanges_the_scheduled_share(net):
    prune(net, 0.8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    rigl = RigL(net, optimizer, end=8, every=2, alpha=0.5)
    x, y = torch.randn(8, 3, 12, 12), torch.arange(8)
    changed = []
    for step in range(10):
        optimizer.zero_grad()
        with rigl.forward():
            F.cross_entropy(net(x)[0], y).backward()
        before = {n: layer.mask.clone() for n, layer in sparse_layers(net).items()}
        old = net.conv2.weight.detach().clone()
        if not rigl.replaces_step():
            optimizer.step()
        rigl.step()
        new = net.conv2.mask & ~before["conv2"]
        changed.append(int(new.sum()))
        if changed[-1]:
            assert step in (2, 4, 6)
            share = 0.25 * (1 + np.cos(np.pi * step / 8))
            grown = net.conv2.mask & (net.conv2.weight == 0)  # new, or dropped and back at zero
            assert int(grown.sum()) == int(share * int(net.conv2.mask.sum()))
            assert bool(grown[new].all())
            slot = optimizer.state[net.conv2.weight]["momentum_buffer"]
            assert bool((slot[grown] == 0).all()) and bool((slot[~net.conv2.mask] == 0).all())
            stayed = net.conv2.mask & ~grown
            assert torch.equal(net.conv2.weight[stayed], old[stayed])  # no step of the optimiser
        for name, layer in sparse_layers(net).items():
            assert int(layer.mask.sum()) == int(before[name].sum())
            assert bool((layer.weight[~layer.mask] == 0).all())
    assert sum(changed) > 0


@pytest.mark.parametrize("method", ["gradual", "hydra", "rigl"])
def test_resume_is_bit_equal(images, tmp_path, method):
    def end(interrupt_at=None):
        torch.manual_seed(0)
        model = Net()
        folder = tmp_path / f"{method}-{interrupt_at}"
        for stage in stages_of(method, recipe(epochs=2), 0.9):
            if stage.name == "pretrain":
                continue
            path = folder / f"{stage.name}.pt"
            if interrupt_at is not None:
                broken_off(copy.deepcopy(model), stage, images, path, interrupt_at)
            run_stage(model, stage, images, checkpoint=path)
        return model.state_dict()

    straight, resumed = end(), end(4)
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


def broken_off(model, stage, images, path, step):
    class Stop(Exception):
        pass

    def on_step(progress):
        if progress.step == step:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dass.training._SAVE_EVERY_S", 0.0)
        with pytest.raises(Stop):
            run_stage(model, stage, images, checkpoint=path, on_step=on_step)
    assert path.exists()


def test_a_searched_density_per_edge_reaches_the_masks(images):
    edges = [[("sep_conv_3x3", 0, 0.5), ("skip_connect", 1)]] * 4
    genotype = dass.Genotype(normal=edges, reduce=edges)
    network = dass.build(genotype, channels=4, layers=1, classes=10)
    own = network.edge_densities()
    for stage in stages_of("hydra", recipe(), 0.9, densities=own):
        run_stage(network, stage, images)
    for name, layer in sparse_layers(network).items():
        density = own.get(name, 0.1)
        assert int(layer.mask.sum()) == keep_count(layer.weight.numel(), density), name
    assert len(own) == 4 * 4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_the_densities_of_single_layers(net, images, method):
    own = {"conv1": 0.5, "head": 0.25}
    for stage in stages_of(method, recipe(), 0.9, densities=own):
        run_stage(net, stage, images)
    layers = sparse_layers(net)
    for name, density in own.items():
        weight = layers[name].weight
        assert int(layers[name].mask.sum()) == keep_count(weight.numel(), density), name
    rest = [layer.mask for name, layer in layers.items() if name not in own]
    total = sum(mask.numel() for mask in rest)
    parts = [keep_count(mask.numel(), 0.1) for mask in rest]
    shared = method in ("snip", "rigl")  # global and ERK: the sum is exact, not each layer
    assert sum(int(mask.sum()) for mask in rest) == (
        keep_count(total, 0.1) if shared else sum(parts)
    )


def test_snip_ranks_globally_among_the_others(net, images):
    scores = snip_scores(net, images, 20)
    (stage,) = stages_of("snip", recipe(), 0.9, densities={"conv2": 0.3})
    stage.before(net, images)
    layers = sparse_layers(net)
    own = layers.pop("conv2")
    assert scores["conv2"][own.mask].min() >= scores["conv2"][~own.mask].max()
    kept = torch.cat([scores[n][layer.mask] for n, layer in layers.items()])
    gone = torch.cat([scores[n][~layer.mask] for n, layer in layers.items()])
    assert kept.numel() == keep_count(kept.numel() + gone.numel(), 0.1)
    assert kept.sort().values[1] >= gone.max()  # but for the floor of extra


def test_unknown_words():
    with pytest.raises(ValueError, match="unknown method 'lottery'; known: magnitude"):
        stages_of("lottery", SMOKE, 0.9)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        stages_of("snip", SMOKE, 1)
    with pytest.raises(ValueError, match="no pruned layers"):
        RigL(Net(), None, 10)


def test_the_command(tmp_path):
    folder = tmp_path / "run"
    words = ["sparse", "resnet20", "--width", "0.25", "--method", "hydra", "--sparsity", "0.9"]
    words += ["--recipe", "smoke", "--data", "synthetic", "--size", "16", "--limit", "64"]
    words += ["--threads", "1", "--run", str(folder)]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    found = json.loads((folder / "report.json").read_text())["data"]
    assert list(found["stages"]) == ["pretrain", "prune", "finetune"]
    model = dass.load(folder / "model.safetensors")
    nonzeros = sum(int((m.weight != 0).sum()) for m in sparse_layers(model).values())
    assert nonzeros == found["nonzeros"] == found["stages"]["finetune"]["nonzeros"]
    again = CliRunner().invoke(cli.app, words)
    assert again.exit_code == 0 and "pretrain, prune, finetune done" in again.output
    wrong = CliRunner().invoke(cli.app, [*words[:4], "--method", "luck", "--data", "synthetic"])
    assert wrong.exit_code == 2 and "known: magnitude" in " ".join(wrong.output.split())


def test_still_statistics_restores_even_after_an_error():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    norm = network[1]
    before = norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="stop"), still_statistics(network):
        network(torch.randn(2, 3, 4, 4))
        raise RuntimeError("stop")
    assert torch.equal(norm.running_mean, before) and int(norm.num_batches_tracked) == 0
    network(torch.randn(2, 3, 4, 4))
    assert norm.momentum == 0.1 and int(norm.num_batches_tracked) == 1
    assert not math.isclose(float(norm.running_mean.sum()), float(before.sum()))

"""Pruned weights that stay at zero under every optimiser, and pruning along a schedule."""

import copy
import math

import pytest
import torch
from pruned_net import Net, batch, pruned_weights, sparse_layers, train_step
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dass.masks import keep_count
from dass.pruning import prune
from dass.schedule import GradualPruner, attach_masks, copy_masks, cubic_sparsity, enforce_masks


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_a_schedule_takes_layers_to_densities_of_their_own(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    own = {"stem": 0.5, "block.3": 0.04}
    pruner = GradualPruner(net, optimizer, 0.9, 0, 4, initial_sparsity=0.6, densities=own)
    for step in range(5):
        rows = {row.names[0]: row for row in pruner.step().layers}
        shared = next(name for name in rows if name in ("block.3", "again"))
        assert rows["stem"].kept == keep_count(rows["stem"].weights, 0.5)
        curve = 1 - cubic_sparsity(step, 0, 4, 0.6, 0.96)
        assert rows[shared].kept == keep_count(rows[shared].weights, curve)
        others = [row for name, row in rows.items() if name not in ("stem", shared)]
        curve = 1 - cubic_sparsity(step, 0, 4, 0.6, 0.9)
        assert others and all(row.kept == keep_count(row.weights, curve) for row in others)
    assert rows[shared].kept == keep_count(rows[shared].weights, 0.04)
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="differs from"):
        GradualPruner(net, optimizer, 0.9, 0, 4, initial_sparsity=0.6).load_state_dict(state)
    with pytest.raises(ValueError, match="not pruned: nowhere"):
        GradualPruner(net, optimizer, 0.9, 0, 4, densities={"nowhere": 0.5})


OPTIMIZERS = {
    "sgd": lambda p, **k: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.1, **k),
    "nesterov": lambda p, **k: torch.optim.SGD(p, 0.05, 0.9, nesterov=True, weight_decay=0.1, **k),
    "adam": lambda p, **k: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.1, **k),
    "adamw": lambda p, **k: torch.optim.AdamW(p, 0.01, weight_decay=0.1, **k),
    "adagrad": lambda p, **k: torch.optim.Adagrad(p, 0.01, weight_decay=0.1, **k),
    "rmsprop": lambda p, **k: torch.optim.RMSprop(
        p, 0.01, momentum=0.9, centered=True, weight_decay=0.1, **k
    ),
    "adadelta": lambda p, **k: torch.optim.Adadelta(p, weight_decay=0.1, **k),
    "adamax": lambda p, **k: torch.optim.Adamax(p, weight_decay=0.1, **k),
    "nadam": lambda p, **k: torch.optim.NAdam(p, weight_decay=0.1, **k),
    "radam": lambda p, **k: torch.optim.RAdam(p, weight_decay=0.1, **k),
    "rprop": lambda p, **k: torch.optim.Rprop(p, **k),
    "asgd": lambda p, **k: torch.optim.ASGD(p, t0=1, weight_decay=0.1, **k),
}


CASES = [(name, kind) for name in OPTIMIZERS for kind in ("loop", "foreach")]
CASES += [(name, "fused") for name in ("sgd", "nesterov", "adam", "adamw", "adagrad")]


KINDS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def check_guarded(model, optimizer, steps=3):
    """Prune in the middle of a run: the slots are full by then. Returns how many were checked."""
    for seed in range(3):
        train_step(model, optimizer, seed)
    prune(model, 0.8)
    attach_masks(optimizer, model)
    kept = {m: m.weight.detach().clone() for m in sparse_layers(model)}
    slots = 0
    for seed in range(steps):
        train_step(model, optimizer, seed)
        assert not pruned_weights(model).any()
        for layer in sparse_layers(model):
            for key, slot in optimizer.state.get(layer.weight, {}).items():
                if torch.is_tensor(slot) and slot.shape == layer.mask.shape and key != "step_size":
                    slots += 1
                    assert not slot[~layer.mask].any(), key
    assert all(not torch.equal(m.weight, w) for m, w in kept.items())
    return slots


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_pruned_weights_stay_zero(net, name, kind):
    optimizer = OPTIMIZERS[name](net.parameters(), **KINDS[kind])
    assert check_guarded(net, optimizer) >= 12  # 4 layers, 3 steps, at least one slot


def test_without_the_guard_momentum_brings_them_back(net):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    for seed in range(3):
        train_step(net, optimizer, seed)
    prune(net, 0.8)
    train_step(net, optimizer)
    assert pruned_weights(net).any()
    attach_masks(optimizer, net)
    assert not pruned_weights(net).any()


def test_slots_with_nan_are_cleared_and_step_sizes_are_not(net):
    adam, rprop = OPTIMIZERS["adam"](net.parameters()), OPTIMIZERS["rprop"](net.parameters())
    for optimizer in (adam, rprop):
        train_step(net, optimizer)
    prune(net, 0.8)
    adam.state[net.stem.weight]["exp_avg"].fill_(math.nan)
    enforce_masks(adam, net)
    enforce_masks(rprop, net)
    assert not adam.state[net.stem.weight]["exp_avg"][~net.stem.mask].any()
    assert rprop.state[net.stem.weight]["step_size"].all()


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_drops_a_history_that_reaches_into_pruned_weights(net, search):
    optimizer = torch.optim.LBFGS(
        net.parameters(), lr=0.1, max_iter=3, max_eval=99, history_size=4, line_search_fn=search
    )
    check_guarded(net, optimizer, steps=2)
    state = optimizer.state[net.stem.weight]
    assert state["n_iter"] == 6  # dropped once, when the masks came, and never after
    assert len(state["old_dirs"]) > 1


def test_adafactor_and_muon():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(108, 16, bias=False), nn.Linear(16, 10, bias=False)
    )
    for make in (torch.optim.Adafactor, torch.optim.Muon):
        clone = copy.deepcopy(model)
        check_guarded(clone, make(clone.parameters(), lr=0.01, weight_decay=0.1))


def test_zero_eps_leaves_no_nan(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, eps=0.0)
    check_guarded(net, optimizer)
    assert all(p.isfinite().all() for p in net.parameters())


def test_autocast_and_grad_scaler(net):
    prune(net, 0.8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    attach_masks(optimizer, net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in range(4):
        optimizer.zero_grad()
        x, y = batch(seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x).float(), y)
        scaler.scale(loss if seed != 1 else loss * math.inf).backward()  # one step is skipped
        scaler.step(optimizer)
        scaler.update()
        assert not pruned_weights(net).any()
        assert all(p.isfinite().all() for p in net.parameters())
    assert scaler.get_scale() == 4.0


def test_hook_follows_later_pruning_and_its_handle_ends_it(net):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    handle = attach_masks(optimizer, net)
    train_step(net, optimizer)
    prune(net, 0.8)
    train_step(net, optimizer)
    assert not pruned_weights(net).any()
    prune(net, 0.9)
    train_step(net, optimizer)
    assert not pruned_weights(net).any()
    handle.remove()
    with torch.no_grad():
        net.stem.weight.add_(1)
    train_step(net, optimizer)
    assert pruned_weights(net).any()
    enforce_masks(optimizer, net)
    assert not pruned_weights(net).any()


def test_a_mask_that_is_learned_is_left_alone_until_it_is_frozen(net):
    prune(net, 0.8, exclude="stem")
    prune(net, 0.0, exclude=["block", "fc"])
    net.stem.learn_mask(0.2)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    attach_masks(optimizer, net)
    before = net.stem.weight.detach().clone()
    train_step(net, optimizer)
    assert net.stem.weight[~net.stem.current_mask()].all()
    assert not net.fc.weight[~net.fc.mask].any() and not net.stem.weight.equal(before)
    learned = net.stem.current_mask()
    net.stem.freeze_mask()
    train_step(net, optimizer)
    assert net.stem.mask.equal(learned) and not pruned_weights(net).any()
    net.stem.learn_mask(0.2)
    pruner = GradualPruner(net, optimizer, 0.9, 0, 4, initial_sparsity=0.8)
    assert net.stem.scores is None and int(net.stem.mask.sum()) == 87
    assert pruner.step().layers[0].kept == 87


def test_attach_masks_to_a_foreign_optimizer_raises(net):
    prune(net, 0.8)
    other = torch.optim.SGD(Net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the model's pruned weights"):
        attach_masks(other, net)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_models_keep_the_zeros(net, average):
    prune(net, 0.8)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    attach_masks(optimizer, net)
    arguments = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if average == "ema" else {}
    mean = AveragedModel(net, **arguments)
    for seed in range(3):
        train_step(net, optimizer, seed)
        mean.update_parameters(net)
    assert not pruned_weights(mean).any() and len(sparse_layers(mean)) == 4
    prune(net, 0.9)
    copy_masks(net, mean.module)
    mean.update_parameters(net)
    assert not pruned_weights(mean).any()
    assert mean.module.stem.mask.sum() == 44
    with pytest.raises(ValueError, match="no sparse layer 'stem'"):
        copy_masks(net, Net())


def test_cubic_sparsity():
    values = [cubic_sparsity(t, 10, 50, 0.2, 0.9) for t in range(0, 60)]
    assert values[0] == values[10] == pytest.approx(0.2)
    assert values[50] == values[59] == 0.9
    assert values[20] == pytest.approx(0.9 - 0.7 * 0.75**3)
    assert values == sorted(values)


@pytest.mark.parametrize("scope", ["uniform", "erk", "global", "lamp"])
def test_gradual_pruning_is_monotone_with_exact_counts(net, scope):
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    pruner = GradualPruner(net, optimizer, 0.9, begin=2, end=13, every=4, scope=scope)
    assert all(layer.mask.all() for layer in sparse_layers(net)) and len(sparse_layers(net)) == 4
    old, events = [layer.mask.clone() for layer in sparse_layers(net)], []
    for t in range(16):
        train_step(net, optimizer, t)
        target = pruner.sparsity
        assert target == cubic_sparsity(t, 2, 13, 0.0, 0.9)
        report = pruner.step()
        new = [layer.mask.clone() for layer in sparse_layers(net)]
        if report:
            events.append(t)
            if scope == "uniform":
                wanted = [keep_count(m.numel(), 1 - target) for m in new]
                assert [row.kept for row in report.layers] == wanted
            assert report.requested == target
            assert report.kept == sum(int(m.sum()) for m in new)
            assert scope == "uniform" or report.kept == keep_count(992, 1 - target)
        else:
            assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
        assert not any((b & ~a).any() for a, b in zip(old, new, strict=True))
        assert not pruned_weights(net).any()
        for layer in sparse_layers(net):
            assert not optimizer.state[layer.weight]["exp_avg"][~layer.mask].any()
        old = new
    assert events == [2, 6, 10, 13]


def test_gradual_pruning_of_blocks_and_of_a_sparse_model(net):
    prune(net, 0.5, pattern="4x1")
    start = net.stem.mask.clone()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    pruner = GradualPruner(net, optimizer, 0.9, 0, 4, initial_sparsity=0.3, pattern="4x1")
    for t in range(5):
        train_step(net, optimizer, t)
        report = pruner.step()
        assert not (net.stem.mask & ~start).any()
        assert (net.stem.mask.view(4, 4, 27).sum(1) % 4 == 0).all()
        assert t > 0 or report.layers[0].density == 0.5  # never back above what it found
    assert report.layers[0].kept == 4 * keep_count(108, 0.1)


@pytest.mark.parametrize("scope", ["erk", "global"])
def test_a_common_total_leaves_sparser_layers_as_they_are(net, scope):
    prune(net, 0.9, exclude=["block", "fc"])
    start = net.stem.mask.clone()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    net.stem.weight.data *= 100  # either scope would give the stem more
    pruner = GradualPruner(net, optimizer, 0.6, 0, 2, initial_sparsity=0.5, scope=scope)
    report = pruner.step()
    assert net.stem.mask.equal(start) and report.kept == 992 // 2


def test_weights_return_only_if_not_monotone(net):
    for monotone in (True, False):
        model = copy.deepcopy(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scores = {name: m.weight.detach().clone() for name, m in model.named_modules()
                  if isinstance(m, (nn.Conv2d, nn.Linear))}  # fmt: skip
        pruner = GradualPruner(
            model, optimizer, 0.6, 0, 2, initial_sparsity=0.5, monotone=monotone,
            method=lambda name, m, scores=scores: scores[name],
        )  # fmt: skip
        pruner.step()
        first = model.stem.mask.clone()
        scores["stem"] = 1 / scores["stem"]
        pruner.step()
        assert bool((model.stem.mask & ~first).any()) is not monotone


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resume_is_bit_exact(net, name):
    def build():
        model = Net()
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, optimizer, GradualPruner(model, optimizer, 0.9, 1, 9, 2, scope="global")

    straight = build()
    straight[0].load_state_dict(net.state_dict(), strict=False)
    for t in range(12):
        if t == 6:
            saved = copy.deepcopy([part.state_dict() for part in straight])
        train_step(*straight[:2], t)
        straight[2].step()
    resumed = build()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    for t in range(6, 12):
        train_step(*resumed[:2], t)
        resumed[2].step()
    assert not pruned_weights(resumed[0]).any()
    for key, value in straight[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[key]), key
    ours, theirs = straight[1].state_dict(), resumed[1].state_dict()
    for index, slots in ours["state"].items():
        for key, value in slots.items():
            assert value is None or torch.equal(value, theirs["state"][index][key])


def test_gradual_pruner_rejections(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for arguments in (
        {"begin": 5, "end": 5},
        {"begin": -1},
        {"every": 0},
        {"initial_sparsity": 0.95},
    ):
        with pytest.raises(ValueError, match="need 0 <= begin < end"):
            GradualPruner(net, optimizer, 0.9, **{"begin": 0, "end": 9, **arguments})
    with pytest.raises(ValueError, match="final_sparsity must be in"):
        GradualPruner(net, optimizer, 1.0, 0, 9)
    with pytest.raises(ValueError, match="unknown method 'hydra'"):
        GradualPruner(net, optimizer, 0.9, 0, 9, method="hydra")
    with pytest.raises(ValueError, match=r"pattern '2:4' has initial_sparsity 0\.5, got 0\.0"):
        GradualPruner(net, optimizer, 0.5, 0, 9, pattern="2:4")
    with pytest.raises(TypeError, match="scop"):
        GradualPruner(net, optimizer, 0.9, 0, 9, scop="erk")
    assert not sparse_layers(net)
    pruner = GradualPruner(net, optimizer, 0.9, 0, 9)
    with pytest.raises(ValueError, match=r"differs from .* in \['end'\]"):
        pruner.load_state_dict({**pruner.state_dict(), "end": 10})

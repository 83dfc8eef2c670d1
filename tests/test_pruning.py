"""Pruning of whole models: what is swapped and what survives the swap, exact counts, the schedule,
and pruned weights that stay at zero under every optimiser."""

import copy
import json
import math
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dass.masks import keep_count
from dass.nn import SparseConv2d, SparseLinear
from dass.pruning import prune
from dass.schedule import GradualPruner, attach_masks, copy_masks, cubic_sparsity, enforce_masks


class Net(nn.Module):
    """Stem, depthwise, a module used under two names, BatchNorm, classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block = nn.Sequential(
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.Conv2d(16, 16, 1),
        )
        self.again = self.block[3]
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.again(F.relu(self.block(self.stem(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def batch(seed=0, n=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=generator), torch.arange(n) % 10


def train_step(model, optimizer, seed=0):
    x, y = batch(seed)
    x.requires_grad_()  # the first layer's input gradient is computed too

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


def sparse_layers(model):
    return [m for m in model.modules() if isinstance(m, (SparseConv2d, SparseLinear))]


def pruned_weights(model):
    return torch.cat([m.weight[~m.mask] for m in sparse_layers(model)])


def test_prune_uniform_counts_and_report(net):
    dense = copy.deepcopy(net)
    report = prune(net, 0.9)
    assert [row.names for row in report.layers] == [
        ("stem",), ("block.2",), ("block.3", "again"), ("fc",)]  # fmt: skip
    for row in report.layers:
        layer = net.get_submodule(row.names[0])
        assert row.shape == tuple(layer.weight.shape) and row.weights == layer.weight.numel()
        assert row.kept == keep_count(row.weights, 0.1) == int(layer.mask.sum())
        original = dense.get_submodule(row.names[0]).weight
        assert torch.equal(layer.weight, original * layer.mask)
        assert original[layer.mask].abs().min() >= original[~layer.mask].abs().max()
        assert row.norm_kept == pytest.approx((layer.weight.norm() / original.norm()).item())
    assert report.weights == 432 + 144 + 256 + 160 and report.kept == 44 + 15 + 26 + 16
    assert report.sparsity == 1 - report.kept / report.weights
    assert isinstance(net.stem, SparseConv2d) and isinstance(net.fc, SparseLinear)
    torch.testing.assert_close(net.fc.bias, dense.fc.bias)

    text = str(report)
    assert "block.3 = again" in text and "16x3x3x3" in text and "10.19%" in text
    lines = text.splitlines()
    assert {line.index("unstructured") for line in lines[1:5]} == {lines[0].index("pattern")}
    assert "sparsity 89.8185%, asked for 90.0000%" in lines[-1]
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["layers"][0]["density"] == 44 / 432


def test_forward_is_the_masked_dense_model(net):
    dense = copy.deepcopy(net)
    prune(net, 0.8)
    for name, layer in dense.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data *= net.get_submodule(name).mask
    x, _ = batch()
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(x), dense.train(mode)(x))


def test_parameters_modules_hooks_and_modes_survive(net):
    before = dict(net.named_parameters())
    keys = set(net.state_dict())
    calls = []
    net.stem.eval()
    net.stem.note = "kept"
    net.stem.register_buffer("scale", torch.ones(1))
    handle = net.stem.register_forward_hook(lambda *a: calls.append("forward"))
    net.stem.register_forward_pre_hook(lambda *a, **k: calls.append("pre"), with_kwargs=True)
    net.stem.register_full_backward_hook(lambda *a: calls.append("backward"))
    net.stem.register_load_state_dict_pre_hook(lambda module, *a: calls.append(module))
    dead = weakref.ref(net.stem)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    prune(net, 0.5)
    assert dead() is None
    assert all(net.get_parameter(name) is p for name, p in before.items())
    assert keys <= set(net.state_dict()) and "stem.mask" in net.state_dict()
    assert net.again is net.block[3] and isinstance(net.again, SparseConv2d)
    assert not net.stem.training and net.fc.training and net.stem.note == "kept"
    assert net.stem.scale is net.stem.get_buffer("scale")
    train_step(net, optimizer)
    assert calls == ["pre", "forward", "backward"]
    handle.remove()
    net(batch()[0])
    assert calls[3:] == ["pre"]
    net.load_state_dict(net.state_dict(), strict=False)
    assert calls[4] is net.stem


def test_pruning_again_replaces_the_mask_and_keeps_the_module(net):
    prune(net, 0.5)
    layer, parameter = net.stem, net.stem.weight
    report = prune(net, 0.9, pattern="4x1", exclude="fc")
    assert net.stem is layer and layer.weight is parameter
    assert int(layer.mask.sum()) == report.layers[0].kept == 4 * keep_count(4 * 27, 0.1)
    assert int(net.fc.mask.sum()) == 80
    prune(net, 0.0)
    assert layer.mask.all()


@pytest.mark.parametrize("scope", ["erk", "global", "lamp"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_scopes_reach_the_total_exactly(net, scope, sparsity):
    report = prune(net, sparsity, scope=scope)
    assert (
        report.kept == keep_count(992, 1 - sparsity) == sum(int(row.kept) for row in report.layers)
    )
    assert all(row.kept == int(net.get_submodule(row.names[0]).mask.sum()) for row in report.layers)
    assert len({round(row.density, 2) for row in report.layers}) > 1


def test_floor_saves_the_depthwise_layer(net):
    net.block[2].weight.data *= 1e-3
    starved = prune(copy.deepcopy(net), 0.9, scope="global").layers[1].kept
    report = prune(net, 0.9, scope="global", floor=0.05)
    assert starved == 1 and report.layers[1].kept == 8 and report.kept == 100
    with pytest.raises(ValueError, match=r"floor=0\.5 keeps"):
        prune(net, 0.9, scope="global", floor=0.5)


def test_patterns_fall_back_where_the_shape_cannot_hold_them(net):
    report = prune(net, 0.5, pattern="2:4")
    assert [r.pattern for r in report.layers] == ["unstructured", "unstructured", "2:4", "2:4"]
    assert [r.kept * 2 for r in report.layers] == [r.weights for r in report.layers]
    assert (net.again.mask.view(16, 4, 4).sum(-1) == 2).all()
    report = prune(net, 0.75, pattern="8x1")
    assert [r.pattern for r in report.layers] == ["8x1", "unstructured", "8x1", "8x1"]
    assert (net.stem.mask.view(2, 8, 27).sum(1) % 8 == 0).all()
    assert net.fc.mask[8].equal(net.fc.mask[9])  # ten outputs: the last block has two
    with pytest.raises(ValueError, match=r"pattern '2:4' has sparsity 0\.5, got 0\.9"):
        prune(net, 0.9, pattern="2:4")
    with pytest.raises(ValueError, match="scope must be 'uniform'"):
        prune(net, 0.5, pattern="2:4", scope="erk")


def test_nm_takes_the_density_from_the_pattern_not_from_a_rounded_sparsity():
    model = nn.Sequential(nn.Conv2d(60, 50, 1), nn.Conv2d(50, 30, 1))
    report = prune(model, 0.833333, pattern="1:6")
    assert [row.kept for row in report.layers] == [500, 250]


def test_methods(net):
    one, two, three = (copy.deepcopy(net) for _ in range(3))
    prune(one, 0.5, method="random", seed=1)
    prune(two, 0.5, method="random", seed=1)
    prune(three, 0.5, method="random", seed=2)
    assert one.stem.mask.equal(two.stem.mask) and not one.stem.mask.equal(three.stem.mask)
    smallest = prune(net, 0.5, method=lambda name, module: 1 / module.weight)
    assert smallest.layers[0].norm_kept < 0.5 and smallest.method == "<lambda>"
    with pytest.raises(ValueError, match=r"scores of stem must be a tensor \(16, 3, 3, 3\), got"):
        prune(net, 0.5, method=lambda name, module: module.weight[0])


def test_layers_may_have_densities_of_their_own(net):
    report = prune(net, 0.9, densities={"stem": 0.5, "block.3": 0.25})
    kept = {row.names[0]: (row.kept, row.weights) for row in report.layers}
    assert kept["stem"] == (keep_count(kept["stem"][1], 0.5), kept["stem"][1])
    shared = next(name for name in kept if name in ("block.3", "again"))
    assert kept[shared][0] == keep_count(kept[shared][1], 0.25)
    others = [pair for name, pair in kept.items() if name not in ("stem", shared)]
    assert others and all(k == keep_count(n, 0.1) for k, n in others)
    for densities, message in (
        ({"nowhere": 0.5}, "densities of layers that are not pruned: nowhere"),
        ({"stem": 1.5}, "densities must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(net, 0.9, densities=densities)
    with pytest.raises(ValueError, match="pattern '2:4' fixes every density"):
        prune(net, 0.5, pattern="2:4", densities={"stem": 0.5})


@pytest.mark.parametrize("scope", ["erk", "global", "lamp"])
def test_the_scope_shares_among_the_layers_without_a_density(net, scope):
    alone = prune(copy.deepcopy(net), 0.9, scope=scope, exclude="stem")
    report = prune(net, 0.9, scope=scope, densities={"stem": 0.5})
    kept = {row.names: row.kept for row in report.layers}
    stem = kept.pop(("stem",))
    assert stem == keep_count(net.stem.weight.numel(), 0.5)
    assert kept == {row.names: row.kept for row in alone.layers}
    every = {row.names[0]: 0.3 for row in report.layers}
    again = prune(net, 0.9, scope=scope, densities=every)
    assert all(row.kept == keep_count(row.weights, 0.3) for row in again.layers)


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


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("stem", {"stem"}),
        (["block", "fc"], {"block.2", "block.3"} | {"fc"}),
        ("again", {"block.3"}),
        ("*.2", {"block.2"}),
        ("depthwise", {"block.2"}),
        (("first", "last"), {"stem", "fc"}),
        ((), set()),
    ],
)
def test_exclude(net, exclude, left):
    report = prune(net, 0.5, exclude=exclude)
    assert {name for name, _ in report.skipped} == left
    for name, module in net.named_modules():
        if name in left:
            assert type(module) in (nn.Conv2d, nn.Linear)
    assert all(f"left dense: {name} (excluded by" in str(report) for name in left)


def test_words_may_match_nothing_but_globs_may_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for glob in ("stm", "1"):
        with pytest.raises(ValueError, match=f"exclude '{glob}' matches no layer.*closest: 0"):
            prune(model, 0.5, exclude=glob)
    assert not prune(model, 0.5, exclude="depthwise").skipped


def test_errors_leave_the_model_alone(net):
    cases = [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, "sparsity must be in"),
        ({"sparsity": math.nan}, "sparsity must be in"),
        ({"method": "hydra"}, "unknown method 'hydra'; known: magnitude, random"),
        ({"scope": "layer"}, "unknown scope 'layer'; known: uniform, erk, global, lamp"),
        ({"pattern": "3x3"}, "unknown pattern '3x3'; known: unstructured, 4x1"),
        ({"exclude": "*"}, "no layer to prune in Net"),
        ({"floor": 0}, "floor must be"),
    ]
    state = copy.deepcopy(net.state_dict())
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            prune(net, **{"sparsity": 0.5, **arguments})
    assert not sparse_layers(net)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    with pytest.raises(ValueError, match="no layer to prune in Sequential"):
        prune(nn.Sequential(nn.ReLU()), 0.5)
    with pytest.raises(ValueError, match="a bare Linear cannot be swapped in place"):
        prune(nn.Linear(4, 4), 0.5)
    assert prune(SparseLinear(4, 4), 0.5).kept == 8


def test_what_cannot_be_swapped_is_left_dense_and_says_why():
    class Own(nn.Conv2d):
        pass

    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(3)
        normed = torch.nn.utils.weight_norm(nn.Linear(4, 4))
        empty = nn.Linear(0, 4)
    parts = {
        "own": (Own(4, 4, 1), "Own is a subclass"),
        "conv1d": (nn.Conv1d(4, 4, 1), "no sparse Conv1d"),
        "transposed": (nn.ConvTranspose2d(4, 4, 1), "no sparse ConvTranspose2d"),
        "lazy": (lazy, "lazy"),
        "normed": (normed, "its weight is computed"),
        "parametrized": (torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "computed"),
        "patched": (patched, "its forward has been replaced"),
        "empty": (empty, "empty"),
        "complex": (nn.Linear(4, 4, dtype=torch.complex64), "complex64"),
        "attention": (nn.MultiheadAttention(4, 1), "NonDynamicallyQuantizableLinear"),
    }
    model = nn.ModuleDict({key: module for key, (module, _) in parts.items()})
    model["ok"] = nn.Linear(4, 4)
    report = prune(model, 0.5)
    assert [row.names for row in report.layers] == [("ok",)]
    reasons = {name.split(".")[0]: reason for name, reason in report.skipped}
    for name, (_, reason) in parts.items():
        assert reason in reasons[name]


def test_tied_layers_stay_tied_and_count_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    report = prune(model, 0.75)
    assert model[2].weight is model[0].weight and model[2].bias is not model[0].bias
    assert model[2].mask.equal(model[0].mask)
    assert report.weights == 64 and report.kept == 16
    assert report.layers[0].names == ("0", "2")
    assert torch.count_nonzero(model[0].weight) == 16


def test_a_weight_tied_to_what_is_not_pruned_raises():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False), nn.Linear(10, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"weight of 1 is also 0\.weight"):
        prune(model, 0.5)
    assert prune(model, 0.5, exclude="1").layers[0].names == ("2",)
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pair[1].weight = pair[0].weight
    with pytest.raises(ValueError, match=r"weight of 0 is also 1\.weight"):
        prune(pair, 0.5, exclude="1")


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

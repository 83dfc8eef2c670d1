"""Pruning of whole models: what is swapped and what survives the swap, exact counts."""

import copy
import json
import math
import warnings
import weakref

import pytest
import torch
from pruned_net import Net, batch, sparse_layers, train_step
from torch import nn

from dass.masks import keep_count
from dass.nn import SparseConv2d, SparseLinear
from dass.pruning import prune


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


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
    names = [row.names[0] for row in report.layers]
    after, before = (
        torch.cat([model.get_submodule(name).weight.flatten() for name in names]).norm()
        for model in (net, dense)
    )
    assert report.norm_kept == pytest.approx((after / before).item())
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

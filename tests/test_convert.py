"""sparsify and densify: what is chosen and why, what the network computes afterwards, and that
nothing else of it changes. Times are made up here, but for the last tests; none is asserted."""

import copy
import json
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.testing import assert_close

from dass import convert
from dass.convert import densify, sparsify
from dass.nn import SparseConv2d, SparseLinear
from dass.pruning import prune
from dass.timing import Sample, dense_variants, machine_facts, measure, speedup, threads


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """A stem, a module used twice, one that is called with two shapes, one that is never called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, groups=4), nn.ReLU())
        self.again = self.block[0]
        self.scales = nn.Conv2d(16, 16, 1)
        self.unused = nn.Linear(16, 4)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.block(self.bn(self.stem(x)).relu())
        x = self.scales(x).relu() + self.scales(x[..., :2, :2]).mean()
        x = self.again(x).relu()
        return self.fc(input=x.mean((2, 3)))


X = torch.randn(2, 3, 8, 8)


def net(sparsity=0.8):
    """Zeros in plain dense layers, as another tool would leave them."""
    model = Net()
    prune(model, sparsity)
    return densify(model.eval())


def sparse_names(model):
    return {n for n, m in model.named_modules() if isinstance(m, (SparseConv2d, SparseLinear))}


def fake_times(monkeypatch, layers, network=None):
    """layers: name -> its sparse time, where its dense time is 100 a call. The network's time falls
    by 100 with each sparse layer, or is 1000 plus `network` of their number."""
    passes = []

    def time_layer(layer, key, x, seconds):
        times = layers[layer.names[0]]
        passes.append(layer.names[0])
        sparse = times[passes.count(layer.names[0]) - 1] if isinstance(times, tuple) else times
        layer.costs[key] = {"dense": 100.0, "sparse": float(sparse)}

    def measure(functions, *, setup, **_):
        samples = {}
        for name, run in functions.items():
            setup[name]()
            run()
            sparse = sparse_names(run.__self__.model)
            time = 1000 + (network(len(sparse)) if network else -100 * len(sparse))
            samples[name] = Sample((float(time),) * 3, 1)
        return samples

    monkeypatch.setattr(convert, "_time_layer", time_layer)
    monkeypatch.setattr(convert, "measure", measure)
    return passes


def rows(report):
    return {row.names[0]: row for row in report.layers}


def test_only_what_is_twice_faster_by_the_margin_becomes_sparse(monkeypatch):
    model = net()
    dense = copy.deepcopy(model)
    times = {"stem": 40, "block.0": 97, "scales": (80, 99, 130, 130), "fc": (50, 120)}
    passes = fake_times(monkeypatch, times)
    converted, report = sparsify(model, X, margin=0.05)
    assert passes == ["stem", "block.0", "scales", "scales", "block.0", "fc",
                      "stem", "scales", "scales", "fc"]  # fmt: skip
    assert sparse_names(model) == set() and sparse_names(converted) == {"stem"}
    found = rows(report)
    assert {name: row.chosen for name, row in found.items()} == {
        "stem": "sparse", "block.0": "dense", "scales": "dense", "unused": "dense", "fc": "dense"
    }  # fmt: skip
    assert found["stem"].reason == "2.50x"
    assert found["block.0"].reason == "1.03x: not 5% faster"
    assert found["block.0"].names == ("block.0", "again")
    assert found["block.0"].inputs == ((2, 16, 8, 8), (2, 16, 4, 4))
    assert found["scales"].calls == 2 and found["scales"].dense_us == 200
    assert found["scales"].reason == "0.77x: not 5% faster"  # the second pass counts
    assert found["fc"].reason == "0.83x: not 5% faster"
    assert found["unused"].reason == "never called on the example inputs"
    assert found["unused"].dense_us is None and found["unused"].calls == 0
    assert (report.dense_us, report.sparse_us) == (1000, 900)
    assert report.speedup == pytest.approx(1000 / 900)
    with torch.no_grad():
        assert_close(converted(X), dense(X))
        assert torch.equal(model(X), dense(X))

    text = str(report)
    assert "block.0 = again" in text and "conv 3x3 /2 g4" in text and "16x4x3x3" in text
    assert "1 of 5 layers sparse (policy 'auto')" in text
    assert "whole network: dense 1,000 us, now 900 us: 1.11x" in text
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_the_half_that_gains_least_goes_back_until_the_network_is_not_slower(monkeypatch):
    times = {"stem": 10, "block.0": 30, "scales": 20, "fc": 90}
    for most in (4, 3, 1, 0):
        fake_times(monkeypatch, times, lambda n, most=most: 1 if n > most else -n)
        converted, report = sparsify(net(), X)
        # Gains of a pass: fc 10, stem 90, block.0 2 x 70, scales 2 x 80.
        kept = {4: {"stem", "block.0", "scales", "fc"}, 3: {"block.0", "scales"}, 1: {"scales"}}
        assert sparse_names(converted) == kept.get(most, set()) | (
            {"again"} & sparse_names(converted)
        )
        assert report.sparse_us <= report.dense_us
        for name, row in rows(report).items():
            if row.chosen == "dense" and name != "unused":
                assert row.reason.endswith("x, but the whole network was no faster with it")


def test_always_takes_every_layer_with_a_zero(monkeypatch):
    model = net()
    with torch.no_grad():
        model.fc.weight.fill_(1)
    converted, report = sparsify(model, None, policy="always")
    assert sparse_names(converted) == {"stem", "block.0", "scales", "unused"}
    assert rows(report)["fc"].reason == "no zeros in its weight"
    assert report.speedup is None and "whole network" not in str(report)
    with torch.no_grad():
        assert_close(converted(X), model(X))
    again, report = sparsify(converted, X, policy="always", seconds=0)
    assert sparse_names(again) == sparse_names(converted) and report.speedup > 0


def test_policies_and_examples_are_checked():
    with pytest.raises(ValueError, match="unknown policy 'fast'; known: auto, always"):
        sparsify(net(), X, policy="fast")
    with pytest.raises(ValueError, match="needs example_inputs"):
        sparsify(net(), None)


def test_a_sparse_layer_that_does_not_pay_becomes_dense_with_exact_zeros(monkeypatch):
    model = Net().eval()
    prune(model, 0.9)
    masks = {name: model.get_submodule(name).mask for name in sparse_names(model)}
    fake_times(monkeypatch, {"stem": 10, "block.0": 200, "scales": 200, "fc": 10})
    converted, report = sparsify(model, X)
    assert sparse_names(converted) == {"stem", "fc"}
    for name, mask in masks.items():
        assert not converted.get_submodule(name).weight[~mask].any()
    assert rows(report)["unused"].chosen == "dense"
    assert set(converted.state_dict()) == set(Net().state_dict()) | {"stem.mask", "fc.mask"}
    with torch.no_grad():
        assert_close(converted(X), model(X))


class Odd(nn.Conv2d):
    pass


def test_every_layer_that_stays_dense_has_a_reason(monkeypatch):
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.Conv2d(3, 3, 1),
        Odd(3, 3, 1),
        SparseConv2d(3, 3, 1).learn_mask(0.5),
        nn.Conv2d(3, 3, 1),
        nn.ConvTranspose2d(3, 3, 1),
        nn.Conv2d(3, 3, 1),
        nn.Flatten(1, 2),
        nn.Conv1d(24, 3, 1),
        nn.LazyLinear(2),
        nn.Conv2d(8, 3, 1, device="meta"),
        nn.utils.weight_norm(nn.Linear(3, 3)),
    ).eval()
    for i, zeros in ((1, 1), (2, 9), (4, 9), (6, 9)):
        model[i].weight.data.view(-1)[:zeros] = 0
    model[4].train()
    model[6].forward = lambda x: x
    model.forward = nn.Sequential(*model[:9]).forward  # the last ones are not called
    fake_times(monkeypatch, {})
    _, report = sparsify(model, X)
    reasons = {name: row.reason for name, row in rows(report).items()}
    assert reasons == {
        "0": "no zeros in its weight",
        "1": "only 11.1% zeros",
        "2": "Odd is a subclass that may run code of its own",
        "3": "its mask is being learned: freeze_mask() first",
        "4": "in training mode: call model.eval() first",
        "5": "no sparse ConvTranspose2d",
        "6": "its forward has been replaced",
        "8": "no sparse Conv1d",
        "9": "LazyLinear is a subclass that may run code of its own",
        "10": "its weight has no data",
        "11": "its weight is computed, not a Parameter, or not yet initialised",
    }
    assert rows(report)["3"].chosen == "sparse"
    assert str(report)


def test_other_devices_are_left_alone(monkeypatch):
    monkeypatch.setattr("dass.sparse_layer._has_kernels", lambda device: False)
    converted, report = sparsify(net(), X)
    assert sparse_names(converted) == set()
    assert rows(report)["stem"].reason == "on cpu: no sparse kernels there"


def test_a_layer_whose_outputs_differ_is_not_trusted(monkeypatch):
    monkeypatch.setattr(
        SparseLinear, "forward", lambda self, x: nn.functional.linear(x, self.weight) + 1
    )
    converted, report = sparsify(net(), X, seconds=0)
    row = rows(report)["fc"]
    assert row.chosen == "dense" and row.reason.startswith("outputs differ by")
    assert not isinstance(converted.fc, SparseLinear)


def test_masks_of_torch_prune_and_parametrizations_become_permanent(monkeypatch):
    class Half(nn.Module):
        def forward(self, weight):
            return weight * (torch.arange(weight.numel()).view_as(weight) % 2)

    model = Net().eval()
    torch_prune.l1_unstructured(model.stem, "weight", 0.5)
    torch_prune.l1_unstructured(model.stem, "weight", 0.8)  # a container of two methods
    torch_prune.random_unstructured(model.fc, "bias", 0.5)
    parametrize.register_parametrization(model.scales, "weight", Half())
    keys = set(model.state_dict())
    with torch.no_grad():
        want = model(X)
    fake_times(monkeypatch, {"stem": 10, "scales": 10})
    converted, report = sparsify(model, X)
    assert sparse_names(converted) == {"stem", "scales"}
    assert set(converted.state_dict()) == {*Net().state_dict(), "stem.mask", "scales.mask"}
    assert rows(report)["stem"].density == pytest.approx(0.1, abs=0.01)
    assert rows(report)["scales"].density == 0.5
    with torch.no_grad():
        assert_close(converted(X), want)
        assert set(model.state_dict()) == keys and torch.equal(model(X), want)
    assert model.stem._forward_pre_hooks and not converted.stem._forward_pre_hooks
    model.stem.weight_orig.data.mul_(2)  # the user's model still computes its weights
    with torch.no_grad():
        assert not torch.equal(model(X), want)


def test_hooks_attributes_and_modes_survive_and_nothing_is_learned_from_the_example(monkeypatch):
    model = net()
    calls = []
    model.stem.note = "kept"
    model.stem.register_buffer("extra", torch.ones(1))
    handle = model.stem.register_forward_hook(lambda *a: calls.append("forward"))
    model.stem.register_load_state_dict_pre_hook(lambda module, *a: calls.append(module))
    model.bn.train()
    model.block[1].train()
    statistics = model.bn.running_mean.clone()
    fake_times(monkeypatch, dict.fromkeys(("stem", "block.0", "scales", "fc"), 10))
    converted, _ = sparsify(model, X, inplace=True)
    assert converted is model and len(sparse_names(model)) == 4
    assert model.again is model.block[0] and isinstance(model.again, SparseConv2d)
    assert torch.equal(model.bn.running_mean, statistics)
    assert model.bn.training and model.block[1].training and not model.stem.training
    assert model.stem.note == "kept" and model.stem.get_buffer("extra") is model.stem.extra
    calls.clear()
    with torch.no_grad():
        model(X)
        handle.remove()
        model(X)
    model.load_state_dict(model.state_dict())
    assert calls == ["forward", model.stem]
    calls.clear()
    dead = weakref.ref(model.stem)
    back = densify(model, inplace=True)
    assert back is model and dead() is None and type(model.stem) is nn.Conv2d
    assert model.stem.note == "kept" and not hasattr(model.stem, "mask")
    calls.clear()
    model.load_state_dict(model.state_dict())
    assert calls == [model.stem]


def test_an_error_of_the_model_comes_through_and_leaves_it_as_it_was():
    model = net()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError):
        sparsify(model, torch.randn(2, 4, 8, 8), inplace=True)
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_pre_hooks for m in model.modules())
    model.train()
    with pytest.raises(RuntimeError):
        sparsify(model, torch.randn(2, 4, 8, 8), inplace=True)
    assert all(m.training for m in model.modules())


def test_bare_layers_and_other_ways_to_pass_the_example(monkeypatch):
    layer = nn.Linear(16, 4)
    layer.weight.data[:, 2:] = 0
    layer.eval()
    x = torch.randn(3, 16)
    fake_times(monkeypatch, {"": 10})
    for example in (x, (x,), [x], {"input": x}):
        converted, report = sparsify(layer, example, inplace=True)
        assert isinstance(converted, SparseLinear) and converted.weight is layer.weight
        assert "(model)" in str(report)
    with torch.no_grad():
        assert_close(converted(x), layer(x))
    assert type(densify(converted)) is nn.Linear


@pytest.mark.parametrize("learn", [False, True])
def test_densify_gives_plain_layers_that_compute_the_same(learn):
    model = Net().eval()
    prune(model, 0.7, pattern="4x1")
    if learn:
        for name in sparse_names(model):
            model.get_submodule(name).learn_mask(0.2)
    with torch.no_grad():
        want = model(X)
    dense = densify(model)
    assert sparse_names(dense) == set() and sparse_names(model) != set()
    assert set(dense.state_dict()) == set(Net().state_dict())
    assert dense.again is dense.block[0]
    with torch.no_grad():
        assert_close(dense(X), want)
        assert torch.equal(model(X), want)
    for name in sparse_names(model):
        zeros = dense.get_submodule(name).weight == 0
        assert torch.equal(zeros, ~model.get_submodule(name).current_mask())
    parameters = list(model.parameters())
    for name in sparse_names(model) if learn else ():
        assert model.get_submodule(name).scores is not None
    densify(model, inplace=True)
    assert all(any(p is q for q in parameters) for p in model.parameters())


@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "double", "bfloat16", "autocast"]
)
def test_real_measurements_leave_the_network_as_it_computes(layout):
    model, x = net(0.9), X
    if layout == "channels_last":
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout in ("double", "bfloat16"):
        dtype = getattr(torch, layout)
        model, x = model.to(dtype), x.to(dtype)
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if layout in ("bfloat16", "autocast") else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=layout == "autocast"):
        converted, report = sparsify(model, x, seconds=0.001, num_threads=1)
        with torch.no_grad():
            assert_close(converted(x), model(x), **tolerance)
    found = rows(report)
    for name in ("stem", "block.0", "scales", "fc"):
        assert found[name].dense_us > 0 and found[name].sparse_us > 0
        assert (found[name].chosen == "sparse") == (name in sparse_names(converted))
    assert report.speedup > 0 and report.machine["torch_threads"] == 1


def test_measure_takes_turns_and_restores_the_threads():
    order = []
    before = torch.get_num_threads()

    def log(name):
        order.append((name, torch.is_inference_mode_enabled(), torch.get_num_threads()))

    samples = measure(
        {"a": lambda: log("a"), "b": lambda: log("b")},
        seconds=0,
        rounds=4,
        num_threads=1,
        setup={"b": lambda: log("setup")},
    )
    assert torch.get_num_threads() == before
    assert {entry[1:] for entry in order} == {(True, 1)}
    names = [name for name, *_ in order]
    turns = names[names.index("setup", names.index("setup") + 1) - 2 :]
    assert turns == [*"aa", "setup", *"bb", "setup", *"bb", *"aaaa", "setup", *"bb", "setup", *"bb",
                     *"aa"]  # fmt: skip
    assert len(samples["a"].times_us) == 4 and samples["a"].calls == 1
    assert samples["a"].median_us > 0 and samples["a"].spread >= 0
    with pytest.raises(ZeroDivisionError):
        measure({"a": lambda: 1 / 0})
    for wrong in ({"functions": {}}, {"functions": {"a": log}, "rounds": 0}):
        with pytest.raises(ValueError, match="rounds"):
            measure(**wrong)
    with pytest.raises(ValueError, match="at least 1"), threads(0):
        pass


def test_samples():
    slow, fast = Sample((10.0, 30.0, 20.0), 1), Sample((5.0, 10.0, 20.0), 1)
    assert (slow.median_us, slow.spread, speedup(slow, fast)) == (20, 0.5, 2)
    assert str(slow) == "20.0 us +- 50%" and Sample((3.0,), 1).spread == 0
    assert slow.to_dict() == {"median_us": 20, "spread": 0.5, "rounds": 3}


@pytest.mark.parametrize(
    "module, x",
    [(nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)), (nn.Linear(4, 3), torch.randn(2, 4))],
    ids=str,
)
def test_every_dense_variant_computes_the_layer(module, x):
    variants = dense_variants(module, x)
    assert {"nchw", "frozen"} <= set(variants)
    assert ("channels_last" in variants) == (x.dim() == 4)
    for function in variants.values():
        with torch.no_grad():
            y = function()
        assert_close(y.to_dense() if y.is_mkldnn else y, module(x), rtol=1e-4, atol=1e-5)
    half = dense_variants(nn.Conv2d(4, 6, 3).half(), torch.randn(2, 4, 5, 5).half())
    assert "nchw" in half and all(function() is not None for function in half.values())


def test_machine_facts_are_plain():
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cores"] >= 1 and facts["dass_isa"] and facts["torch"] == torch.__version__

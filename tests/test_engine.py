"""The engine computes what the model does: every network of the zoo, batches, threads, layouts."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_nets import check, compiled, images, pruned, small_net
from torch import nn

import dass
from dass.engine import graph as g
from dass.engine import tuning
from dass.engine.depth_first import Fusion
from dass.engine.interpret import run
from dass.engine.programs import Decisions, Maker


@pytest.mark.parametrize("name", dass.zoo.list())
def test_every_network_of_the_zoo(name):
    model, shape = pruned(name)
    engine = compiled(model, shape)
    for side_by_side in (False, True):
        engine._side_by_side = side_by_side
        for batch in (1, 17):
            check(engine, model, images(batch, *shape))


@pytest.mark.parametrize("example", [1, 16])
def test_any_batch(example):
    model = small_net()
    engine = compiled(model, (3, 10, 9), example)
    for side_by_side in (False, True):
        engine._side_by_side = side_by_side
        for batch in range(1, 34):
            check(engine, model, images(batch, 3, 10, 9, seed=batch))
        assert engine(torch.zeros(0, 3, 10, 9)).shape == (0, 7)


def test_a_result_is_the_callers_own():
    engine = compiled(small_net(), (3, 8, 8))
    x = images(2, 3, 8, 8)
    first = engine(x)
    kept = first.clone()
    engine(-x)
    assert torch.equal(first, kept)
    same = compiled(nn.Flatten().eval(), (3, 8, 8))
    assert same(x).data_ptr() != x.data_ptr() and torch.equal(same(x), x.flatten(1))


@pytest.mark.parametrize("torch_node", [False, True])
def test_a_result_has_no_gradient(torch_node):
    model = nn.Sequential(*small_net(), nn.LogSoftmax(1)).eval() if torch_node else small_net()
    x = images(2, 3, 8, 8).requires_grad_()
    engine = compiled(model, (3, 8, 8))
    assert any(segment.torch is not None for segment in engine.segments) == torch_node
    for each in (engine, compiled(nn.Flatten().eval(), (3, 8, 8))):
        result = each(x)
        assert not result.requires_grad and not result.is_inference()


@pytest.mark.parametrize("batch", [1, 5, 40])
def test_two_threads_give_the_bits_of_one(batch, one_thread):
    model, shape = pruned("mobilenet_v2", exclude="depthwise")
    engine = compiled(model, shape)
    x = images(batch, *shape)
    for side_by_side in (False, True):
        engine._side_by_side = side_by_side
        torch.set_num_threads(1)
        want = engine(x)
        torch.set_num_threads(2)
        assert all(torch.equal(engine(x), want) for _ in range(5))


def test_calls_from_several_threads_at_a_time():
    """The first calls build the programs; then a result must not depend on the others."""
    model, shape = pruned("resnet20")
    batches = [images(1 + i % 19, *shape, seed=i) for i in range(8)]
    want = [compiled(model, shape)(x) for x in batches]
    engine = dass.compile(model, torch.zeros(1, *shape), tune=False, cache=None)
    engine._built.clear()
    engines = [engine, engine, engine.clone(), engine.clone()]

    def calls(which):
        order = [(which + i) % len(batches) for i in range(3 * len(batches))]
        return all(torch.equal(engines[which](batches[i]), want[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calls, range(4)))
    assert len(engine._built) == 1


def test_operations_of_torch_take_their_place():
    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.b(torch.roll(self.a(x).relu(), 1, 3))

    model = Rolled().eval()
    engine = compiled(model, (3, 9, 9))
    assert sum(segment.torch is not None for segment in engine.segments) == 1
    for batch in (1, 17):
        check(engine, model, images(batch, 3, 9, 9))
    assert engine(torch.zeros(0, 3, 9, 9)).shape == (0, 4, 7, 7)


def test_what_does_not_fit_is_refused():
    engine = compiled(small_net(), (3, 8, 8))
    for x, says in (
        (torch.zeros(1, 3, 8, 9), r"\[B, 3, 8, 8\], got \(1, 3, 8, 9\)"),
        (torch.zeros(3, 8, 8), "got"),
        (torch.zeros(1, 3, 8, 8).double(), "float32"),
        ([1.0], "got list"),
    ):
        with pytest.raises(ValueError, match=says):
            engine(x)
    with pytest.raises(ValueError, match="precision must be one of fp32, got 'int3'"):
        dass.compile(small_net(), torch.zeros(1, 3, 8, 8), "int3")
    with pytest.raises(ValueError, match="training mode"):
        dass.compile(small_net().train(), torch.zeros(1, 3, 8, 8))


class Bound(nn.Module):
    """Its code fixes the batch."""

    def forward(self, x):
        return x.flatten(1) + torch.arange(2.0)[:, None]


def test_a_model_bound_to_its_batch_takes_no_other():
    engine = compiled(Bound().eval(), (3, 4, 4), batch=2)
    x = images(2, 3, 4, 4)
    assert torch.equal(engine(x), Bound()(x))
    with pytest.raises(ValueError, match="bound to batches of 2, got 3"):
        engine(images(3, 3, 4, 4))


def test_tuned_engines_are_right_and_measurements_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "RUNS", 1)
    model, shape = pruned("mobilenet_v2", exclude="depthwise", side=12)
    cache = tmp_path / "kernels.json"
    engine = dass.compile(model, torch.zeros(16, *shape), cache=cache)
    for batch in (1, 16, 17):
        check(engine, model, images(batch, *shape))
    assert tuning.machine_key() in cache.read_text()


def inverted_residual(side, stride, residual, expand, project, kernel=3):
    draw = torch.Generator().manual_seed(side)
    nodes = [g.Input("x", [], (8, side, side))]

    def conv(name, inputs, weight, size, activation, **fields):
        weight = weight * (torch.rand(weight.shape, generator=draw) < fields.pop("density"))
        shape, bias = (len(weight), size, size), torch.randn(len(weight), generator=draw)
        nodes.append(g.Conv(name, inputs, shape, weight, bias, activation=activation, **fields))
        return name

    def random(*shape):
        return torch.randn(shape, generator=draw)

    start = last = conv("a", ["x"], random(8, 8, 1, 1), side, "relu", density=0.5)
    if expand:
        last = conv("e", [last], random(40, 8, 1, 1), side, "relu6", density=0.3)
    width, out = (40 if expand else 8), -(-side // stride)
    fields = {"stride": (stride,) * 2, "padding": (kernel // 2,) * 4, "groups": width, "density": 1}
    last = conv("d", [last], random(width, 1, kernel, kernel), out, "relu6", **fields)
    if project:
        inputs = [last, start] if residual else [last]
        last = conv("p", inputs, random(8, width, 1, 1), out, None, density=0.3)
    return g.Graph(nodes, [last])


@pytest.mark.parametrize("side", [7, 16, 31, 32, 33])
@pytest.mark.parametrize(("expand", "project"), [("e", "p"), ("e", None), (None, "p")])
def test_groups_depth_first(side, expand, project):
    for stride, kernel, strip in ((1, 3, 16), (2, 3, 16), (1, 5, 16), (2, 5, 32)):
        graph = inverted_residual(side, stride, stride == 1, expand, project, kernel)
        maker = Maker(graph, 1)
        fusion = Fusion("d", expand, project, strip)
        products = len(tuning.products(maker.plan([fusion])))
        for chosen in tuning.TEMPLATES[1], tuning.default_kernel():
            built = maker.as_decided(Decisions([fusion], [chosen] * products))
            for seed in range(2):  # the second finds in the scratch what the first one left there
                x = images(2, 8, side, side, seed=seed)
                want = run(graph, x.double())
                got = torch.full(want.shape, float("nan"))
                built.program.run([x, got])
                error = (got - want).abs().max().item()
                assert error <= 1e-5 * want.abs().max().item()


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    cache, x = tmp_path / "kernels.json", torch.zeros(1, 3, 16, 16)
    model = dass.zoo.create("mobilenet_v2", width=0.25).eval()
    monkeypatch.setattr(tuning, "RUNS", 1)
    first = dass.compile(model, x, cache=cache)
    assert any(key.startswith("group: ") for key in first.built(0, False).decisions.measured)
    monkeypatch.setattr(tuning, "_profiles", lambda *_: pytest.fail("measured again"))
    again = dass.compile(model, x, cache=cache)
    assert again.built(0, False).decisions == first.built(0, False).decisions

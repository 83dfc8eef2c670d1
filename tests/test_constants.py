"""Constant channels are folded into biases: the same numbers, and every trap."""

import pytest
import torch
from graph_sketch import Sketch, change, check, ops, same, shrunk

from dass.engine.interpret import run
from dass.engine.passes import (
    Report,
    fold_constants,
    simplify,
)


def _dead_then(word, second, size=6):
    """A conv with two rows without weights, activated by ``word``, then ``second(net, name)``."""
    net = Sketch(3, size, size)
    first = net.conv("x", 5, 3, 1, empty=(1, 3), activation=word)
    return net.graph(second(net, first)), first


def test_a_constant_goes_into_the_bias_of_a_1x1_conv():
    graph, first = _dead_then("sigmoid", lambda net, x: net.conv(x, 4))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert changed[first].shape[0] == 3
    assert report.channels == {first: 2}


def test_a_constant_under_padding_stays_unless_it_is_zero():
    graph, first = _dead_then("sigmoid", lambda net, x: net.conv(x, 4, 3, 1))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert changed[first].shape[0] == 5
    assert report.channels == {}
    # Relu of a negative bias is 0, and the padding is as well.
    graph, first = _dead_then("relu", lambda net, x: net.conv(x, 4, 3, 1))
    graph = change(graph, first, bias=-graph[first].bias.abs())
    changed, _ = shrunk(graph)
    same(graph, changed)
    assert changed[first].shape[0] == 3


def test_a_constant_that_meets_no_padding_is_folded_though_the_conv_pads():
    graph, first = _dead_then("sigmoid", lambda net, x: net.conv(x, 4, 3, 1))
    name = graph.outputs[0]
    weight = graph[name].weight.clone()
    centre = weight[:, 1, 1, 1].clone()
    weight[:, 1] = 0
    weight[:, 1, 1, 1] = centre  # channel 1 by the tap in the middle alone
    graph = change(graph, name, weight=weight)
    changed, _ = shrunk(graph)
    same(graph, changed)
    assert changed[first].shape[0] == 4


def test_padding_that_no_window_reaches_is_none():
    second = {"kernel": 2, "padding": (0, 1, 0, 1), "stride": (2, 2)}
    graph, first = _dead_then("sigmoid", lambda net, x: net.conv(x, 4, **second))
    changed, _ = shrunk(graph)
    same(graph, changed)
    assert changed[first].shape[0] == 3


def test_weights_on_padding_alone_go():
    net = Sketch(4, 2, 2)
    graph = net.graph(net.conv("x", 4, 5, 4, dilation=(2, 2)))
    changed = fold_constants(graph)
    same(graph, changed)
    assert (changed.nodes[1].weight == 0).any()


def test_a_crop_is_no_padding():
    graph, first = _dead_then("sigmoid", lambda net, x: net.conv(x, 4, 3, (-1, -1, -1, -1)))
    changed, _ = shrunk(graph)
    same(graph, changed)
    assert changed[first].shape[0] == 3


def test_constants_pass_through_a_depthwise_conv():
    net = Sketch(3, 6, 6)
    first = net.conv("x", 5, empty=(1,), activation="relu")
    deep = net.depthwise(first, empty=(2,), activation="sigmoid")
    graph = net.graph(net.conv(deep, 4))
    graph = change(graph, first, bias=-graph[first].bias.abs())
    changed, report = shrunk(graph)
    same(graph, changed)
    assert report.channels == {first: 2, deep: 2}
    assert changed[deep].groups == 3 and changed[deep].is_depthwise
    # A constant that is not 0 differs at the border after a depthwise conv: only row 2 goes.
    graph = change(graph, first, bias=graph[first].bias.abs() + 1)
    changed, report = shrunk(graph)
    same(graph, changed)
    assert report.channels == {first: 1, deep: 1}


@pytest.mark.parametrize(
    ("name", "then"),
    [
        ("max pool", lambda net, x: net.pool(x, "max", padding=1)),
        ("avg of what is there", lambda net, x: net.pool(x, "avg", padding=1, count_padding=False)),
        ("avg without padding", lambda net, x: net.pool(x, "avg")),
        ("act", lambda net, x: net.act(x, "silu")),
        ("affine", lambda net, x: net.affine(x)),
        ("sum with itself", lambda net, x: net.sum(x, x)),
        ("product with itself", lambda net, x: net.mul(x, x)),
    ],
)
def test_constants_pass_through(name, then):
    graph, first = _dead_then("sigmoid", lambda net, x: net.conv(then(net, x), 4))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert changed[first].shape[0] == 3
    assert len(report.channels) == 2


def test_a_mean_over_padding_is_not_constant():
    then = lambda net, x: net.conv(net.pool(x, "avg", padding=1), 4)  # noqa: E731
    graph, first = _dead_then("sigmoid", then)
    changed, _ = shrunk(graph)
    same(graph, changed)
    assert changed[first].shape[0] == 5


def test_an_affine_by_zero_is_constant():
    net = Sketch(3, 4, 4)
    first = net.conv("x", 4)
    affine = net.affine(net.act(first))
    graph = net.graph(net.conv(affine, 2))
    scale = graph[affine].scale.clone()
    scale[1] = 0
    graph = change(graph, affine, scale=scale)
    changed, report = shrunk(graph)
    same(graph, changed)
    assert report.channels[first] == report.channels[affine] == 1


def test_constants_reach_a_classifier_through_mean_flatten_and_concat():
    net = Sketch(3, 4, 4)
    first = net.conv("x", 4, empty=(0,), activation="silu")
    second = net.conv("x", 3, empty=(2,))
    joined = net.concat(first, second)
    graph = net.graph(net.linear(net.concat(net.mean(joined), net.flatten(joined)), 5))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert report.channels[first] == report.channels[second] == 1
    assert changed[joined].shape == (5, 4, 4)
    check(changed)


def test_a_sum_with_a_constant_side_keeps_both_sides_alike():
    net = Sketch(3, 4, 4)
    a, b = net.conv("x", 4, empty=(1, 2)), net.conv("x", 4, empty=(2,), activation="sigmoid")
    graph = net.graph(net.conv(net.sum(a, b), 3))
    changed, report = shrunk(graph)
    same(graph, changed)
    # Channel 2 is constant on both sides, channel 1 on one: it stays as a row without weights.
    assert changed[a].shape[0] == changed[b].shape[0] == 3
    assert not changed[a].weight[1].any()
    assert set(report.channels.values()) == {1}


def test_a_residual_keeps_its_conv_from_being_constant():
    net = Sketch(4, 4, 4)
    conv = net.conv("x", 4, empty=(1,), residual="x", activation="relu")
    graph = net.graph(net.conv(conv, 3))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert not report.channels


def test_a_residual_that_is_constant_too_makes_a_constant():
    net = Sketch(3, 4, 4)
    first = net.conv("x", 4, empty=(1,), activation="sigmoid")
    conv = net.conv("x", 4, empty=(1,), residual=first, activation="relu")
    graph = net.graph(net.conv(conv, 3))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert report.channels == {first: 1, conv: 1}


def test_a_conv_without_weights_but_with_a_residual_is_an_affine():
    net = Sketch(4, 4, 4)
    conv = net.conv("x", 4, empty=range(4), residual="x", activation="relu")
    graph = net.graph(conv)
    changed, _ = shrunk(graph)
    same(graph, changed)
    assert ops(changed) == ["input", "affine"]


def test_a_residual_that_is_constant_throughout_becomes_bias():
    net = Sketch(3, 4, 4)
    first = net.conv("x", 4, empty=range(4), activation="sigmoid")
    graph = net.graph(net.conv("x", 4, 3, 1, residual=first))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert ops(changed) == ["input", "conv"]
    assert report.nodes == [first]


@pytest.mark.parametrize("op", ["sum", "mul"])
def test_a_side_that_is_constant_throughout_makes_an_affine(op):
    net = Sketch(3, 4, 4)
    dead = net.conv("x", 3, empty=range(3), activation="sigmoid")
    graph = net.graph(getattr(net, op)(dead, net.act("x")))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert ops(changed) == ["input", "act", "affine"]
    assert report.nodes == [dead]


def test_a_factor_per_channel_that_is_constant_makes_an_affine():
    net = Sketch(3, 4, 4)
    factor = net.linear(net.mean("x"), 3, activation="sigmoid")
    graph = net.graph(net.mul(net.act("x"), factor))
    same(graph, shrunk(graph)[0])
    graph = change(graph, factor, weight=torch.zeros(3, 3).double())
    changed, _ = shrunk(graph)
    same(graph, changed)
    assert ops(changed) == ["input", "act", "affine"]


@pytest.mark.parametrize("vector", [False, True])
def test_an_output_that_is_constant_reads_the_input_alone(vector):
    net = Sketch(3, 4, 4)
    first = net.pool(net.conv("x", 4, 3, 1), "max", stride=2, padding=1)
    dead = net.conv(first, 5, empty=range(5))
    graph = net.graph(net.linear(net.mean(dead), 6, activation="relu") if vector else dead)
    changed, _ = simplify(graph, torch.float64)
    check(changed)
    x = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(run(changed, x), run(graph, x))
    assert ops(changed) == (["input", "mean", "linear"] if vector else ["input", "conv"])


def test_an_output_keeps_its_constant_rows():
    net = Sketch(3, 4, 4)
    graph = net.graph(net.conv("x", 4, empty=(1, 2), activation="silu"))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert changed.nodes[-1].shape == (4, 4, 4)
    assert report == Report()

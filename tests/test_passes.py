"""Each pass on graphs of its own: the same numbers, fewer nodes and channels, and every trap."""

import pytest
import torch
from graph_sketch import Sketch, change, check, ops, same

from dass.engine.graph import ACTIVATIONS, Affine, Conv, Graph, Linear
from dass.engine.interpret import activate, run
from dass.engine.passes import (
    Report,
    fold_affine,
    fold_constants,
    fuse_activations,
    fuse_residuals,
    merge,
    remove_dead,
    rounded,
    simplify,
    ungroup,
)


def shrunk(graph: Graph) -> tuple[Graph, Report]:
    return remove_dead(fold_constants(graph))


@pytest.mark.parametrize("kind", ["conv", "linear", "max", "avg", "affine"])
def test_an_affine_goes_into_what_is_before_it(kind):
    net = Sketch(3, 6, 6)
    first = {
        "conv": lambda: net.conv("x", 4, 3, 1),
        "linear": lambda: net.linear(net.mean("x"), 4),
        "max": lambda: net.pool("x", "max"),
        "avg": lambda: net.pool("x", "avg", padding=1, count_padding=False),
        "affine": lambda: net.affine("x"),
    }[kind]()
    graph = net.graph(net.affine(net.affine(first), "relu6"))
    folded = fold_affine(graph)
    same(graph, folded)
    assert "affine" not in ops(folded)[:-1]
    assert folded[folded.outputs[0]].activation == "relu6"
    assert graph.nodes[-1].op == "affine", "the graph that came is left as it was"


def test_an_affine_stays_where_another_reads_what_it_scales():
    net = Sketch(3, 4, 4)
    conv = net.conv("x", 4)
    graph = net.graph(net.sum(net.affine(conv), conv))
    folded = fold_affine(graph)
    same(graph, folded)
    assert ops(folded) == ops(graph)


def test_an_affine_stays_behind_an_activation_and_behind_an_output():
    net = Sketch(3, 4, 4)
    graph = net.graph(net.affine(net.conv("x", 4, activation="relu")))
    same(graph, fold_affine(graph))
    assert ops(fold_affine(graph)) == ops(graph)
    net = Sketch(3, 4, 4)
    conv = net.conv("x", 4)
    net.affine(conv)
    assert fold_affine(net.graph(conv)).nodes[1].weight is net.nodes[1].weight


def test_a_residual_is_not_scaled():
    net = Sketch(4, 4, 4)
    affine = net.affine(net.conv("x", 4, residual="x"))
    graph = net.graph(affine)
    same(graph, fold_affine(graph))
    assert "affine" in ops(fold_affine(graph))
    shifted = change(graph, affine, scale=torch.ones(4).double())
    same(shifted, fold_affine(shifted))
    assert "affine" not in ops(fold_affine(shifted))


def test_an_affine_by_one_and_zero_is_its_activation_or_nothing():
    net = Sketch(4, 4, 4)
    affine = net.affine("x", "silu")
    graph = change(
        net.graph(affine), affine, scale=torch.ones(4).double(), bias=torch.zeros(4).double()
    )
    assert ops(fold_affine(graph)) == ["input", "act"]
    same(graph, fold_affine(graph))
    assert fold_affine(change(graph, affine, activation=None)).outputs == ["x"]


@pytest.mark.parametrize("kind", ["conv", "linear", "pool", "affine", "add"])
def test_an_activation_goes_into_what_is_before_it(kind):
    net = Sketch(3, 6, 6)
    first = {
        "conv": lambda: net.conv("x", 4, 3, 1),
        "linear": lambda: net.linear(net.mean("x"), 4),
        "pool": lambda: net.pool("x", "max"),
        "affine": lambda: net.affine("x"),
        "add": lambda: net.sum("x", "x"),
    }[kind]()
    graph = net.graph(net.act(first, "hardswish"))
    fused = fuse_activations(graph)
    same(graph, fused)
    assert "act" not in ops(fused)


def test_an_activation_stays_where_another_reads_its_input():
    net = Sketch(3, 4, 4)
    conv = net.conv("x", 4)
    graph = net.graph(net.sum(net.act(conv), conv))
    same(graph, fuse_activations(graph))
    assert ops(fuse_activations(graph)) == ops(graph)


def test_equal_activations_of_several_readers_become_one():
    net = Sketch(3, 4, 4)
    conv = net.conv("x", 4)
    graph = net.graph(net.sum(net.conv(net.act(conv), 5), net.conv(net.act(conv), 5)))
    fused = fuse_activations(graph)
    same(graph, fused)
    assert ops(fused) == ["input", "conv", "conv", "conv", "add"]


def test_different_activations_of_one_tensor_both_stay():
    net = Sketch(3, 4, 4)
    conv = net.conv("x", 4)
    graph = net.graph(net.sum(net.act(conv), net.act(conv, "silu")))
    same(graph, fuse_activations(graph))
    assert ops(fuse_activations(graph)).count("act") == 2


def test_two_activations_in_a_row_are_not_one():
    net = Sketch(3, 4, 4)
    graph = net.graph(net.act(net.act(net.conv("x", 4), "silu"), "relu"))
    same(graph, fuse_activations(graph))
    assert ops(fuse_activations(graph)) == ["input", "conv", "act"]


def test_the_activation_of_a_concat_is_done_to_its_parts():
    net = Sketch(3, 4, 4)
    joined = net.concat(net.conv("x", 2), net.conv("x", 4))
    graph = net.graph(net.conv(net.act(joined), 3))
    fused = fuse_activations(graph)
    same(graph, fused)
    assert ops(fused).count("act") == 0


def test_the_activation_of_a_concat_stays_where_its_parts_have_other_readers():
    net = Sketch(3, 4, 4)
    shared = net.conv("x", 4)
    joined = net.concat(net.conv("x", 2), shared)
    graph = net.graph(net.sum(net.conv(net.act(joined), 3), net.conv(net.act(shared), 3)))
    fused = fuse_activations(graph)
    same(graph, fused)
    assert ops(fused).count("act") == 2


def test_a_sum_becomes_the_residual_of_the_later_conv():
    net = Sketch(4, 4, 4)
    early = net.conv("x", 4)
    late = net.conv("x", 4, 3, 1)
    graph = net.graph(net.sum(late, early, "relu"))
    fused = fuse_residuals(graph)
    same(graph, fused)
    assert ops(fused) == ["input", "conv", "conv"]
    assert fused[late].inputs == ["x", early]
    assert fused[late].activation == "relu"


def test_a_conv_waits_for_a_residual_that_comes_after_it():
    net = Sketch(4, 4, 4)
    conv = net.conv("x", 4)
    graph = net.graph(net.sum(conv, net.pool("x", "max", padding=1)))
    fused = fuse_residuals(graph)
    same(graph, fused)
    assert ops(fused) == ["input", "pool", "conv"]


def test_a_conv_with_activation_or_residual_or_reader_takes_no_other():
    net = Sketch(4, 4, 4)
    active = net.conv("x", 4, activation="relu")
    graph = net.graph(net.sum(active, "x"))
    same(graph, fuse_residuals(graph))
    assert ops(fuse_residuals(graph)) == ops(graph)

    net = Sketch(4, 4, 4)
    taken = net.conv("x", 4, residual="x")
    graph = net.graph(net.sum(taken, "x"))
    same(graph, fuse_residuals(graph))
    assert ops(fuse_residuals(graph)) == ops(graph)

    net = Sketch(4, 4, 4)
    read = net.conv("x", 4)
    graph = net.graph(net.mul(net.sum(read, "x"), read))
    same(graph, fuse_residuals(graph))
    assert ops(fuse_residuals(graph)) == ops(graph)


def test_a_conv_is_not_its_own_residual():
    net = Sketch(4, 4, 4)
    conv = net.conv("x", 4)
    graph = net.graph(net.sum(conv, conv))
    same(graph, fuse_residuals(graph))
    assert ops(fuse_residuals(graph)) == ops(graph)


@pytest.mark.parametrize("word", [None, *ACTIVATIONS])
def test_an_unknown_value_stays_unknown_through_any_activation(word):
    assert activate(torch.tensor([float("nan")]).double(), word).isnan().all()


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


def test_unread_channels_go_back_through_depthwise_and_pool():
    net = Sketch(3, 8, 8)
    first = net.conv("x", 6)
    deep = net.depthwise(first)
    pool = net.pool(net.act(deep), "max")
    last = net.conv(pool, 4)
    graph = net.graph(last)
    weight = graph[last].weight.clone()
    weight[:, [0, 4]] = 0
    graph = change(graph, last, weight=weight)
    changed, report = remove_dead(graph)
    same(graph, changed)
    assert {name: report.channels[name] for name in (first, deep, pool)} == {
        first: 2, deep: 2, pool: 2,
    }  # fmt: skip


def test_a_channel_with_a_second_reader_stays():
    net = Sketch(3, 4, 4)
    first = net.conv("x", 4)
    last, other = net.conv(first, 2), net.conv(first, 2)
    graph = net.graph(net.sum(last, other))
    for name, unread in ((last, [0, 1]), (other, [1, 2])):
        weight = graph[name].weight.clone()
        weight[:, unread] = 0
        graph = change(graph, name, weight=weight)
    changed, report = remove_dead(graph)
    same(graph, changed)
    assert report.channels == {first: 1}


def test_whole_groups_go_or_stay():
    net = Sketch(3, 4, 4)
    first = net.conv("x", 6)
    grouped = net.conv(first, 9, 3, 1, groups=3)
    last = net.conv(grouped, 2)
    graph = net.graph(last)
    weight = graph[last].weight.clone()
    weight[:, :4] = 0  # all outputs of the first group, one of the second
    graph = change(graph, last, weight=weight)
    changed, report = remove_dead(graph)
    same(graph, changed)
    assert report.channels == {first: 2, grouped: 3}
    assert changed[grouped].groups == 2


@pytest.mark.parametrize("rows", [1, 2])
def test_a_pruned_depthwise_layer_no_longer_ties_channels(rows):
    """`rows` outputs of a group: 6 and 12 outputs of 6 inputs, two of which have weights."""
    net = Sketch(3, 6, 6)
    wide = net.conv("x", 6)
    empty = [r for r in range(6 * rows) if r // rows not in (1, 4)]
    graph = net.graph(net.conv(net.conv(wide, 6 * rows, 3, 1, empty, groups=6), 4))
    loose = ungroup(graph)
    same(graph, loose)
    assert loose.nodes[2].groups == 1 and loose.nodes[2].weight.shape == (6 * rows, 6, 3, 3)
    assert graph.nodes[2].groups == 6, "the graph that came is left as it was"
    assert [node.shape[0] for node in shrunk(loose)[0]] == [3, 2, 2 * rows, 4]


def test_a_depthwise_layer_with_most_of_its_weights_stays_one():
    net = Sketch(6, 6, 6)
    graph = net.graph(net.depthwise("x", empty=[0, 1]))
    assert ungroup(graph).nodes[1].groups == 6


def test_a_part_of_a_concat_goes_and_one_part_is_no_concat():
    net = Sketch(3, 4, 4)
    a, b = net.conv("x", 4), net.conv("x", 3)
    joined = net.concat(a, b)
    last = net.conv(joined, 2)
    graph = net.graph(last)
    weight = graph[last].weight.clone()
    weight[:, :4] = 0
    graph = change(graph, last, weight=weight)
    changed, report = remove_dead(graph)
    same(graph, changed)
    assert ops(changed) == ["input", "conv", "conv"]
    assert report.nodes == [a]


def test_a_tensor_that_a_concat_has_twice():
    net = Sketch(3, 4, 4)
    a = net.conv("x", 4)
    last = net.conv(net.concat(a, a), 2)
    graph = net.graph(last)
    weight = graph[last].weight.clone()
    weight[:, [0, 1, 4]] = 0
    changed, report = remove_dead(change(graph, last, weight=weight))
    same(change(graph, last, weight=weight), changed)
    assert report.channels[a] == 1


def test_a_torch_node_keeps_what_it_reads():
    net = Sketch(3, 4, 4)
    first = net.conv("x", 4, empty=(1,))
    graph = net.graph(net.conv(net.roll(first), 2))
    changed, report = shrunk(graph)
    same(graph, changed)
    assert report == Report()


def test_nodes_that_lead_nowhere_go():
    net = Sketch(3, 4, 4)
    net.roll(net.conv("x", 4))
    last = net.conv("x", 2)
    for nowhere in (net.act(last), net.mean(last), net.flatten(last), net.depthwise(last)):
        net.concat(nowhere, nowhere)
    graph = net.graph(last)
    changed, report = remove_dead(graph)
    same(graph, changed)
    assert ops(changed) == ["input", "conv"]
    assert len(report.nodes) == 10


def test_a_conv_that_needs_nothing_of_its_input_still_has_one():
    net = Sketch(3, 4, 4)
    first = net.conv("x", 4)
    graph = net.graph(net.conv(first, 2, empty=(0, 1)))
    changed, report = remove_dead(graph)
    check(changed)
    assert report.channels == {first: 3}


def test_reports_add_up():
    both = Report({"a": 1, "b": 2}, ["c"]) + Report({"a": 3}, ["b"])
    assert both == Report({"a": 4}, ["c", "b"])


def test_what_is_computed_twice_is_computed_once():
    net = Sketch(3, 4, 4)
    twins = [net.conv("x", 4, 3, 1) for _ in range(2)]
    pools = [net.pool(name, "max") for name in twins]
    graph = net.graph(net.sum(*pools))
    assert ops(merge(graph)) == ops(graph)
    graph = change(graph, twins[1], weight=graph[twins[0]].weight, bias=graph[twins[0]].bias)
    merged = merge(graph)
    same(graph, merged)
    assert ops(merged) == ["input", "conv", "pool", "add"]
    stride = change(graph, pools[1], kind="avg")
    assert ops(merge(stride)) == ["input", "conv", "pool", "pool", "add"]


def test_simplify_rounds_once_and_leaves_the_graph():
    net = Sketch(3, 6, 6)
    x = net.act(net.affine(net.conv("x", 6, 3, 1, empty=(2,))))
    x = net.sum(net.affine(net.conv(x, 6, 3, 1)), x)
    graph = net.graph(net.linear(net.mean(net.act(x)), 4))
    changed, report = simplify(graph)
    assert ops(changed) == ["input", "conv", "conv", "mean", "linear"]
    assert all(node.weight.dtype == torch.float32 for node in changed if hasattr(node, "weight"))
    assert all(n.weight.dtype == torch.float64 for n in graph if isinstance(n, (Conv, Linear)))
    again, nothing = simplify(rounded(changed, torch.float64), torch.float32)
    assert ops(again) == ops(changed) and nothing == Report()
    same(graph, simplify(graph, torch.float64)[0])
    assert isinstance(report, Report)


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs_keep_their_meaning(seed):
    graph = _random_graph(seed)
    changed, _ = simplify(graph, torch.float64)
    check(changed)
    x = torch.randn(3, *graph.nodes[0].shape, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        run(changed, x.double()), run(graph, x.double()), rtol=1e-10, atol=1e-10
    )


def _random_graph(seed: int) -> Graph:
    """A dozen nodes of all kinds, with rows without weights and shared readers."""
    net, draw = Sketch(3, 6, 6, seed=seed), torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=draw))]

    def empty(rows=4):
        return (torch.rand(rows, generator=draw) < 0.5).nonzero()[:, 0].tolist()

    names = [net.conv("x", 4, 3, 1, empty=empty()), net.conv("x", 4)]
    words = [None, None, *ACTIVATIONS]
    steps = [
        lambda: net.conv(pick(names), 4, empty=empty(), activation=pick(words)),
        lambda: net.conv(pick(names), 4, 3, 1, empty=empty(), activation=pick(words)),
        lambda: net.conv(pick(names), 4, empty=empty(), residual=pick(names)),
        lambda: net.depthwise(pick(names), empty=empty(), activation=pick(words)),
        lambda: net.conv(net.concat(pick(names), pick(names)), 4, empty=empty()),
        lambda: net.pool(pick(names), pick(["max", "avg"]), padding=1, count_padding=pick([0, 1])),
        lambda: net.act(pick(names), pick(ACTIVATIONS)),
        lambda: net.affine(pick(names)),
        lambda: net.sum(pick(names), pick(names), pick(words)),
        lambda: net.mul(pick(names), net.linear(net.mean(pick(names)), 4, activation="sigmoid")),
    ]
    for _ in range(12):
        names.append(pick(steps)())
    last = net.concat(*names[-3:])
    graph = net.graph(net.linear(pick([net.mean, net.flatten])(last), 3))
    for node in graph:
        if isinstance(node, (Conv, Linear)):
            node.weight[:, empty(node.weight.shape[1])] = 0
        elif isinstance(node, Affine):
            node.scale[empty()] = 0
    return graph

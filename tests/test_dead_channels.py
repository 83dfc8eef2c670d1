"""What nobody reads is taken out: channels, groups, nodes."""

import pytest
from graph_sketch import Sketch, change, check, ops, same, shrunk

from dass.engine.passes import (
    Report,
    remove_dead,
    ungroup,
)


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

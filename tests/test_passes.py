"""Each pass on graphs of its own: the same numbers, fewer nodes and channels, and every trap."""

import pytest
import torch
from graph_sketch import Sketch, change, check, ops, same

from dass.engine.graph import ACTIVATIONS, Affine, Conv, Graph, Linear
from dass.engine.interpret import activate, run
from dass.engine.passes import (
    Report,
    fold_affine,
    fuse_activations,
    fuse_residuals,
    merge,
    rounded,
    simplify,
)


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

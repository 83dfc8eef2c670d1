"""ReLUs and sums that the steps which read or end them do on the way, and blocks in stages."""

from __future__ import annotations

import pytest
from program_checks import Net, check, check_layouts, emits, kernel, layouts

from dass.engine import ahead, tuning
from dass.engine import graph as g
from dass.engine.depth_first import Fusion
from dass.engine.plan import make_plan

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


def kinds(graph: g.Graph) -> list[str]:
    return [step.kind for step in make_plan(graph, 1, emitted=True).steps]


def readers_of_a_relu(net: Net) -> list[str]:
    """A ReLU of a sum, and everything that can read through it."""
    whole = net.sum(net.conv("x", 6, 3, 1), net.conv("x", 6))
    relu = net.act(whole)
    return [
        whole,
        net.conv(relu, 5, density=0.4),
        net.conv(relu, 5, 3, 1, density=0.4),
        net.conv(relu, 5, 3, 1, density=0.4, stride=(2, 2)),
        net.depthwise(relu, 3, 1),
        net.depthwise(relu, 5, 4, dilation=(2, 2)),
        net.depthwise(relu, 3, 1, stride=(2, 2)),
        net.window(relu, "avg", (3, 3), (1, 1), (1, 1, 1, 1), count_padding=False),
        net.window(relu, "max", (3, 3), (2, 2), (1, 1, 1, 1)),
    ]


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 33, 17), (2, 1, 5), (4, 32, 32)])
def test_relus_are_read_through(isa, shape):
    net = Net(*shape)
    graph = net.graph(*readers_of_a_relu(net))
    check_layouts(graph)
    if emits():
        relus = ahead.relus_read_through(graph, graph.readers())
        assert len(relus) == 1


@pytest.mark.skipif(not emits(), reason="no code is emitted here")
def test_a_relu_with_another_reader_is_a_step():
    net = Net(3, 9, 9)
    relu = net.act(net.sum(net.conv("x", 6), net.conv("x", 6)))
    graph = net.graph(net.conv(relu, 5), net.sum(relu, net.conv("x", 6)))
    assert not ahead.relus_read_through(graph, graph.readers())
    check(graph)


@pytest.mark.parametrize("word", [None, "relu", "relu6", "silu"])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_sums_of_pools(isa, word, kind):
    net = Net(5, 19, 18)
    pool = net.window(net.conv("x", 5), kind, (3, 3), (1, 1), (1, 1, 1, 1), count_padding=False)
    total = net.add(g.Add, [pool, net.conv("x", 5)], (5, 19, 18), activation=word)
    graph = net.graph(total, net.conv(total, 3, 3, 1))
    check_layouts(graph)
    if emits():
        assert ("map" in kinds(net.graph(total))[1:-1]) == (word == "silu")


@pytest.mark.parametrize("kernel", [(1, 16), (2, 17), (28, 28), (17, 2)])
def test_wide_windows(isa, kernel):
    net = Net(2, 30, 61)
    relu = net.act(net.sum(net.conv("x", 2), net.conv("x", 2)))
    pools = [net.window(relu, kind, kernel, (1, 2)) for kind in ("avg", "max")]
    graph = net.graph(*pools, net.sum(net.window(relu, "avg", kernel, (1, 2)), pools[0]))
    check(graph)


def test_a_pool_that_others_read_is_not_part_of_a_sum():
    net = Net(5, 9, 8)
    pool = net.window("x", "avg", (3, 3), (1, 1), (1, 1, 1, 1))
    graph = net.graph(net.sum(pool, net.conv("x", 5)), pool)
    assert not ahead.sums_of_pools(graph, graph.readers(), ())
    check(graph)


def test_a_relu_in_front_of_a_group(isa):
    net = Net(4, 33, 20)
    relu = net.act(net.sum(net.conv("x", 6), net.conv("x", 6)))
    a = net.conv(relu, 9, density=0.5, activation="relu6")
    b = net.depthwise(a, 3, 1, activation="relu6")
    c = net.conv(b, 7, density=0.5)
    d = net.depthwise(relu, 3, 1)
    e = net.conv(d, 4, density=0.5)
    graph = net.graph(c, e)
    check(graph, fusions=[Fusion(b, a, c, 16), Fusion(d, None, e, 16)])


@pytest.mark.parametrize("shape", [(70, 4, 4), (66, 8, 8), (65, 16, 16), (64, 7, 9), (64, 3, 40)])
def test_products_in_stages_and_in_blocks_of_rows(isa, shape):
    net = Net(*shape)
    first = net.conv("x", 37, 3, 1, density=0.1, activation="relu")
    graph = net.graph(net.conv(first, 33, 1, density=0.2, residual=net.conv("x", 33, density=0.1)))
    options = [*tuning.DEEP, *(k for k in tuning.TEMPLATES if k.depth)]
    options += tuning.STAGED if emits() else ()
    for each in dict.fromkeys(options):
        for pixel, batch in (layouts()[0], layouts()[4]):
            check(graph, pixel, batch, choose=kernel(**vars(each)))

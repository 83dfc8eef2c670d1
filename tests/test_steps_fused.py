"""[1x1 ->] depthwise [-> 1x1] depth first, in strips of rows."""

from __future__ import annotations

import random
from itertools import product

import pytest
from program_checks import SIMPLE, Net, check, emits, kernel

from dass.engine.depth_first import Fusion, groups
from dass.engine.steps import suits_depthwise

pytestmark = pytest.mark.usefixtures("isa", "one_thread")

MEMBERS = {"all": (True, True), "expand": (True, False), "project": (False, True)}


def block(net, taps=3, stride=(1, 1), dilation=(1, 1), residual=False, words=("relu6",) * 3, **kw):
    """An inverted residual block; its layers' names."""
    channels, hidden = net.shape("x")[0], kw.get("hidden", 10)
    density = kw.get("density", 0.5)
    x = net.conv("x", channels, 1, density=0.7, activation="relu") if kw.get("before") else "x"
    a = net.conv(x, hidden, 1, density=density, activation=words[0])
    pads = [d * (taps // 2) for d in dilation]
    padding = kw.get("padding", (pads[0], pads[0], pads[1], pads[1]))
    b = net.depthwise(a, taps, padding, stride=stride, dilation=dilation, activation=words[1])
    other = x if residual else None
    outputs = channels if residual else 7
    c = net.conv(b, outputs, 1, density=density, residual=other, activation=words[2])
    return a, b, c


def fusion(names, members: str, strip: int) -> Fusion:
    a, b, c = names
    expand, project = MEMBERS[members]
    return Fusion(b, a if expand else None, c if project else None, strip)


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("strip", [16, 32, 64])
@pytest.mark.parametrize("shape", [(4, 32, 32), (3, 33, 15), (3, 47, 31), (2, 18, 16), (3, 1, 1)])
def test_every_group_in_strips(isa, members, strip, shape):
    for stride, residual in (((1, 1), True), ((1, 1), False), ((2, 2), False)):
        net = Net(*shape, seed=strip)
        names = block(net, stride=stride, residual=residual)
        ran = check(net.graph(names[2]), fusions=[fusion(names, members, strip)])
        assert any("strips" in name for name in ran)


@pytest.mark.parametrize("taps", [3, 5, 7])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2), (2, 1), (3, 1)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (4, 1)])
def test_every_depthwise_geometry(isa, taps, stride, dilation):
    net = Net(3, 37, 29, seed=taps)
    names = block(net, taps, stride, dilation, words=("relu", None, None))
    for members in MEMBERS:
        check(net.graph(names[2]), fusions=[fusion(names, members, 16)])


@pytest.mark.parametrize("words", [*product(SIMPLE, repeat=2)])
def test_activations(isa, words):
    net = Net(4, 19, 17)
    names = block(net, words=(words[0], words[1], words[0]), residual=True)
    for members in MEMBERS:
        check(net.graph(names[2]), fusions=[fusion(names, members, 16)])


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 2, 0), (2, 2, 0, 3)])
def test_other_paddings(isa, padding):
    for stride in ((1, 1), (2, 2)):
        net = Net(3, 35, 22)
        names = block(net, 5, stride, padding=padding)
        for members in MEMBERS:
            check(net.graph(names[2]), fusions=[fusion(names, members, 16)])


@pytest.mark.parametrize("width", range(1, 36))
def test_every_width(isa, width):
    """In one of these each strip's last row ends with a register."""
    net = Net(3, 36, width, seed=width)
    names = block(net, residual=True, before=True, density=0.8)
    later = net.conv(names[2], 4, 3, 1, density=0.5)
    for members in MEMBERS:
        check(net.graph(later), fusions=[fusion(names, members, 16)])


@pytest.mark.parametrize("dilation", [2, 5, 9, 20])
def test_the_zeros_that_the_next_layer_needs(isa, dilation):
    """Right of a strip's last row they can be more than a register holds."""
    for width in (7, 16):
        net = Net(3, 35, width, seed=dilation)
        names = block(net, residual=True)
        later = net.conv(names[2], 2, 5, 2 * dilation, dilation=(dilation, dilation))
        for members in MEMBERS:
            check(net.graph(later), fusions=[fusion(names, members, 16)])


@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 7, 8, 14, 16])
@pytest.mark.parametrize("emitted", [False, True])
def test_every_tile(isa, vectors, emitted):
    if emitted and not emits():
        pytest.skip("no emitted code here")
    for shape in ((3, 33, 16), (2, 40, 5), (2, 5, 3), (2, 17, 1)):
        net = Net(*shape, seed=vectors)
        names = block(net, residual=True, hidden=33)
        for members in MEMBERS:
            choose = kernel(emitted, max(1, 28 // vectors), vectors)
            check(net.graph(names[2]), fusions=[fusion(names, members, 16)], choose=choose)


def test_strips_that_are_no_whole_lines(isa):
    """Without a product behind them they need not be: 7 rows of any pitch."""
    net = Net(3, 24, 13)
    names = block(net)
    for strip in (1, 2, 7):
        check(net.graph(names[2]), fusions=[fusion(names, "expand", strip)])
    with pytest.raises(ValueError, match="whole lines"):
        check(net.graph(names[2]), fusions=[fusion(names, "all", 7)])


def test_a_batch_and_the_groups_of_a_network(isa):
    net = Net(4, 36, 20)
    first = block(net, residual=True, before=True)
    again = net.conv(first[2], 12, 1, density=0.5, activation="hardswish")
    depthwise = net.depthwise(again, 5, 2, stride=(2, 2), activation="relu6")
    last = net.conv(depthwise, 6, 1, density=0.5)
    graph = net.graph(net.mean(last), first[2])
    found = groups(graph, lambda node: suits_depthwise(node, 1))
    assert len(found) == 2
    ran = check(graph, batch=3, fusions=found)
    assert sum("strips" in name for name in ran) == 2


@pytest.mark.parametrize("seed", range(30))
def test_random_blocks(isa, seed):
    pick = random.Random(seed)
    net = Net(pick.randint(2, 5), pick.randint(1, 50), pick.randint(1, 40), seed=seed)
    taps, dilation = pick.choice((3, 5, 7)), pick.choice((1, 1, 2, 3))
    stride = pick.choice((1, 1, 2))
    names = block(
        net, taps, (stride, stride), (dilation, dilation), stride == 1 and pick.random() < 0.6,
        [pick.choice(SIMPLE) for _ in range(3)], hidden=pick.randint(2, 40),
        density=pick.choice((0.1, 0.5, 1.0)), before=pick.random() < 0.5,
    )  # fmt: skip
    later = net.depthwise(names[2], 3, 1)
    chosen = fusion(names, pick.choice(list(MEMBERS)), pick.choice((16, 32)))
    choose = kernel(emits() and seed % 3 > 0, 4, pick.randint(1, 7))
    check(net.graph(later, names[2]), fusions=[chosen], choose=choose)

"""Convolutions as steps of programs: sparse rows by templates and emitted code, and depthwise."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from program_checks import (
    ACTIVATIONS,
    SIMPLE,
    Net,
    check,
    check_layouts,
    emits,
    kernel,
    layouts,
    numbers,
    program_of,
    run_fenced,
)

from dass.engine.geometry import count
from dass.engine.interpret import activate
from dass.engine.plan import make_plan

pytestmark = pytest.mark.usefixtures("isa", "one_thread")


@pytest.mark.parametrize("width", [*range(1, 41), 49, 112])
def test_every_width(isa, width):
    net = Net(3, 1 + width % 5, width, seed=width)
    net.conv("x", 5, 3, 1, density=0.4, activation="relu6")
    net.conv("x", 4, (1, 5), (0, 0, 2, 2), density=0.4)
    net.conv("x", 4, 1, density=0.6, activation="relu")
    net.conv("x", 3, 3, 1, stride=(2, 2), density=0.6)
    net.depthwise("x", 3, 1, activation="relu6")
    net.depthwise("x", 5, 2, stride=(2, 2))
    names = [node.name for node in net.nodes[1:]]
    for pixel, batch in (layouts()[0], layouts()[4]):
        check(net.graph(*names), pixel, batch)


# (input, kernel, fields of the convolution)
SHAPES = {
    "one pixel": ((3, 1, 1), 1, {}),
    "one pixel in 3x3": ((3, 1, 1), 3, {"padding": 1}),
    "one row": ((3, 1, 9), 3, {"padding": 1}),
    "one column": ((3, 9, 1), 3, {"padding": 1}),
    "even kernel": ((4, 7, 6), 2, {}),
    "tall kernel": ((4, 9, 7), (7, 1), {"padding": (3, 3, 0, 0)}),
    "wide kernel": ((4, 5, 13), (1, 7), {"padding": (0, 0, 3, 3)}),
    "whole picture": ((4, 6, 5), (6, 5), {}),
    "larger than its picture": ((2, 3, 3), 7, {"padding": 3}),
    "asymmetric": ((3, 8, 9), 3, {"padding": (0, 2, 1, 3)}),
    "cropping": ((3, 9, 10), 3, {"padding": (-1, 0, -2, 1)}),
    "cropping with a stride": ((3, 12, 13), 3, {"padding": (-1, -2, 1, -1), "stride": (2, 2)}),
    "cropping 1x1": ((3, 9, 10), 1, {"padding": (-1, -1, -1, -1)}),
    "padding past the kernel": ((3, 5, 6), 3, {"padding": 5}),
    "1x1 with padding": ((3, 5, 6), 1, {"padding": 1}),
    "stride 2": ((3, 11, 14), 3, {"padding": 1, "stride": (2, 2)}),
    "stride 2 of 1x1": ((5, 7, 8), 1, {"stride": (2, 2)}),
    "stride 2 of 7x7": ((3, 33, 30), 7, {"padding": 3, "stride": (2, 2)}),
    "stride 3": ((3, 11, 14), 5, {"padding": 2, "stride": (3, 3)}),
    "strides that differ": ((3, 11, 14), 3, {"padding": 1, "stride": (3, 1)}),
    "stride past the kernel": ((3, 13, 14), 2, {"stride": (4, 5)}),
    "stride and large padding": ((3, 4, 5), 3, {"padding": 6, "stride": (2, 2)}),
    "dilation": ((3, 12, 11), 3, {"padding": 2, "dilation": (2, 2)}),
    "dilations that differ": ((3, 12, 11), 3, {"padding": (4, 4, 3, 3), "dilation": (4, 3)}),
    "dilation and stride": ((3, 14, 15), 3, {"padding": 2, "dilation": (2, 3), "stride": (2, 2)}),
    "groups": ((6, 8, 9), 3, {"padding": 1, "groups": 3}),
    "groups of one with two outputs": ((4, 8, 9), 3, {"padding": 1, "groups": 4}),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_every_geometry(isa, name, density):
    shape, taps, fields = SHAPES[name]
    net = Net(*shape, seed=len(name))
    outputs = 8 if name == "groups of one with two outputs" else 6
    y = net.conv("x", outputs, taps, density=density, activation="relu", **fields)
    check_layouts(net.graph(y))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_residuals_and_activations(isa, activation, stride):
    net = Net(4, 9, 10)
    other = net.conv("x", 7, 1, stride=(stride, stride))
    y = net.conv(
        "x", 7, 3, 1, density=0.5, residual=other, activation=activation, stride=(stride, stride)
    )
    z = net.conv(y, 7, 1, density=0.5, residual=y)
    check_layouts(net.graph(y, z))


@pytest.mark.parametrize("density", [0.0, 0.02])
def test_outputs_without_weights_are_their_bias(isa, density):
    net = Net(5, 6, 7)
    y = net.conv("x", 37, 3, 1, density=density, activation="relu6")
    check_layouts(net.graph(y))


def _tiles():
    """(emitted, height, vectors): every width of both kinds, some heights, some that do not fit."""
    yield from ((False, 1, vectors) for vectors in range(1, 17))
    for vectors in range(1, 8):
        tallest = (32 - 3) // vectors
        yield from ((True, height, vectors) for height in sorted({1, 2, tallest - 1, tallest}))
    yield from ((True, 28, 2), (True, 30, 1), (True, 3, 8), (True, 0, 1))


@pytest.mark.parametrize(("emitted", "height", "vectors"), list(_tiles()))
def test_every_tile(isa, emitted, height, vectors):
    if emitted and not emits():
        pytest.skip("no emitted code here")
    net = Net(6, 17, 18, seed=vectors)
    a = net.conv("x", 31, 3, 1, density=0.3, activation="relu6")
    b = net.conv(a, 31, 1, density=0.3, residual=a, activation="relu")
    c = net.conv(b, 3, 3, 1, density=0.5, stride=(2, 2), activation="hardswish")
    for pixel, batch in (layouts()[0], layouts()[4]):
        for chunk in (0, 1, 3):
            ran = check(
                net.graph(a, b, c), pixel, batch, choose=kernel(emitted, height, vectors, chunk)
            )
    fits = emitted and 0 < height * vectors <= 29 and vectors < 8
    assert any(name.startswith("emitted") for name in ran) == fits


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 3, 5), (2, 1, 33)])
@pytest.mark.parametrize("vectors", [1, 3, 7, 14])
def test_tiles_wider_than_the_picture(isa, shape, vectors):
    net = Net(*shape)
    y = net.conv("x", 9, 3, 1, activation="relu")
    for emitted in {False, emits()}:
        check_layouts(net.graph(y), choose=kernel(emitted, 2, vectors))


@pytest.mark.parametrize("taps", [3, 5, 7])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (1, 2), (2, 1)])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_depthwise(isa, taps, stride, dilation):
    pad = dilation * (taps // 2)
    activation = SIMPLE[(taps + stride[0] + dilation) % 4]
    for shape in ((3, 15, 15), (2, 8, 33), (3, 1, 1), (2, 30, 16), (2, 13, 40)):
        if min(count(n, taps, stride[0], pad, pad, dilation) for n in shape[1:]) < 1:
            continue
        net = Net(*shape, seed=taps)
        names = [
            net.depthwise(
                "x", taps, pad, stride=stride, dilation=(dilation, dilation), activation=word,
                density=density,
            )
            for word, density in ((activation, 1.0), (None, 0.6), ("relu6", 0.1))
        ]  # fmt: skip
        for pixel, batch in (layouts()[0], layouts()[4]):
            check(net.graph(*names), pixel, batch)


@pytest.mark.parametrize("taps", [3, 5, 7])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 0, 0, 2), (0, 3, 2, 0), (-1, 1, 1, -1)])
def test_depthwise_with_other_paddings(isa, taps, padding):
    net = Net(3, 12, 19, seed=taps)
    names = [net.depthwise("x", taps, padding, stride=(s, s), activation="relu") for s in (1, 2)]
    check_layouts(net.graph(*names))


@pytest.mark.parametrize("rows", range(1, 18))
def test_depthwise_of_so_many_rows(isa, rows):
    net = Net(2, rows, 17)
    names = [
        net.depthwise("x", taps, taps // 2, stride=(s, s)) for taps in (3, 5, 7) for s in (1, 2)
    ]
    check(net.graph(*names))


def test_depthwise_leaves_the_zeros_that_the_next_layer_needs(isa):
    """More of them than registers hold behind a row."""
    for width in (16, 17, 31):
        net = Net(2, 7, width)
        a = net.depthwise("x", 3, 1, activation="relu")
        b = net.conv(a, 3, 3, 20, dilation=(20, 20))
        c = net.depthwise(net.conv("x", 2, 3, 1), 5, 36, dilation=(18, 18))
        check_layouts(net.graph(b, c))


def test_depthwise_of_very_wide_pictures(isa):
    net = Net(2, 5, 2100)
    names = [net.depthwise("x", 7, 3, stride=(s, s)) for s in (1, 2)]
    check(net.graph(*names))


def test_depthwise_says_what_it_runs_on(isa):
    net = Net(4, 9, 9)
    a, b = net.depthwise("x", 3, 1), net.depthwise("x", 3, 1, activation="hardswish")
    ran = check(net.graph(a, b))
    assert ("emitted depthwise 3" in ran) == emits() and "depthwise 3" in ran


def _random_conv(seed: int) -> Net:
    """A convolution of any geometry that has an output, of up to 40 x 40 pixels."""
    pick = random.Random(seed)
    while True:
        groups = pick.choice((1, 1, 1, 2, 4))
        channels, outputs = groups * pick.randint(1, 5), groups * pick.randint(1, 9)
        size = (pick.randint(1, 20), pick.randint(1, 40))
        taps = (pick.randint(1, 5), pick.randint(1, 5))
        stride = (pick.randint(1, 3), pick.randint(1, 3)) if seed % 2 else (1, 1)
        dilation = (pick.choice((1, 1, 2, 3)), pick.choice((1, 1, 2, 3)))
        padding = tuple(pick.randint(-1, 4) for _ in range(4))
        if all(
            count(size[i], taps[i], stride[i], *padding[2 * i : 2 * i + 2], dilation[i]) > 0
            and size[i] + min(padding[2 * i], 0) + min(padding[2 * i + 1], 0) > 0
            for i in (0, 1)
        ):
            break
    net = Net(channels, *size, seed=seed)
    net.conv(
        "x", outputs, taps, padding, density=pick.choice((0.1, 0.5, 1.0)), groups=groups,
        stride=stride, dilation=dilation, activation=pick.choice(ACTIVATIONS),
    )  # fmt: skip
    return net


@pytest.mark.parametrize("block", range(8))
def test_random_geometries(isa, block):
    for seed in range(25 * block, 25 * block + 25):
        net = _random_conv(seed)
        graph = net.graph(net.nodes[-1].name)
        pixel, batch = layouts()[seed % len(layouts())]
        check(graph, pixel, batch)
        check(graph, choose=kernel(emits() and seed % 3 > 0, 1 + seed % 4, 1 + seed % 7, seed % 3))


def test_what_is_not_a_number_passes_on_and_pruned_weights_do_not_spread_it(isa):
    for word in SIMPLE:
        net = Net(6, 7, 19, seed=3)
        names = [
            net.conv("x", 9, 3, 1, density=0.2, activation=word),
            net.conv("x", 9, 1, density=0.3, stride=(2, 2), activation=word),
            net.depthwise("x", 3, 1, activation=word),
        ]
        graph = net.graph(*names)
        for special in (torch.nan, torch.inf, -torch.inf):
            for pixel, batch in (layouts()[0], layouts()[3]):
                x = numbers(batch, (6, 7, 19))
                x[:, 2, 3, 5] = x[:, 4, 0, 18] = special
                program = program_of(make_plan(graph, pixel), kernel(emits(), 4, 3))
                shapes = [(batch, *net.shape(name)) for name in names]
                for name, y in zip(names, run_fenced(program, [x], shapes, True), strict=True):
                    want = _specials(graph[name], x)
                    assert torch.equal(y.isnan(), want.isnan()), (name, word, special)
                    assert torch.equal(y.isinf(), want.isinf()), (name, word, special)


def _specials(node, x):
    """Which outputs are NaN or infinite: each sums over the weights that are there."""

    def conv(x, weight):
        return F.conv2d(
            x.double(), weight.double(), None, node.stride, node.padding[0], node.dilation,
            node.groups,
        )  # fmt: skip

    there = (node.weight != 0).double()
    nan = conv(x.isnan(), there) > 0
    up = conv((x == torch.inf), (node.weight > 0).double()) + conv(
        (x == -torch.inf), (node.weight < 0).double()
    )
    down = conv((x == torch.inf), (node.weight < 0).double()) + conv(
        (x == -torch.inf), (node.weight > 0).double()
    )
    y = torch.zeros_like(up)
    y[up > 0] = torch.inf
    y[down > 0] = -torch.inf
    y[nan | ((up > 0) & (down > 0))] = torch.nan
    return activate(y, node.activation)


def test_a_strided_layer_splits_only_what_it_reads():
    """Few weights read few planes; layers that read nearly all share all of them."""
    net = Net(12, 9, 9, seed=3)
    few = net.conv("x", 4, 1, density=0.1, stride=(2, 2))
    net.conv("x", 5, 1, density=0.9, stride=(2, 2))
    net.conv("x", 6, 1, density=0.9, stride=(2, 2))
    net.conv("x", 3, 3, 1, density=0.03, stride=(2, 2), groups=3)
    net.conv("x", 2, 3, 1, density=0.0, stride=(2, 2))
    names = [node.name for node in net.nodes[1:]]
    check_layouts(net.graph(*names))
    plan = make_plan(net.graph(*names), 1)
    splits = [step.writes for step in plan.steps if "split" in step.writes]
    weight = net.nodes[1].weight
    read = int((weight != 0).any(0).sum())
    sizes = [plan.places[name].channels for name in splits]
    assert len(splits) == 4 and sizes[:2] == [read, 12] and sizes[3] == 1
    assert 0 < read < 9 and few == names[0]

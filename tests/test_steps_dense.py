"""Pools, sums, concatenations, means, linear layers: the dense steps of programs."""

from __future__ import annotations

import random

import pytest
import torch
from program_checks import (
    ACTIVATIONS,
    SIMPLE,
    Net,
    check,
    check_layouts,
    layouts,
    numbers,
    program_of,
    run_fenced,
)

from dass.engine import graph as g
from dass.engine.geometry import count
from dass.engine.interpret import run
from dass.engine.plan import make_plan

pytestmark = pytest.mark.usefixtures("isa", "one_thread")

# kernel, stride, padding, dilation
WINDOWS = {
    "3x3": ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "3x3 stride 2": ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "2x2": ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
    "stride 3": ((3, 2), (3, 3), (1, 0, 1, 1), (1, 1)),
    "strides that differ": ((2, 5), (1, 4), (0, 1, 2, 2), (1, 1)),
    "stride past the kernel": ((1, 1), (2, 5), (0, 0, 0, 0), (1, 1)),
    "as of ceil_mode": ((3, 3), (2, 2), (0, 1, 0, 1), (1, 1)),
    "much ceil_mode": ((5, 5), (5, 5), (0, 3, 0, 4), (1, 1)),
    "bottom and right": ((4, 3), (1, 1), (0, 3, 0, 2), (1, 1)),
    "top and left": ((4, 3), (1, 2), (3, 0, 2, 0), (1, 1)),
    "dilation": ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    "dilation and stride": ((2, 3), (2, 2), (1, 1, 1, 3), (3, 2)),
}
SIZES = [(7, 9), (12, 17), (6, 33), (9, 16)]


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("size", SIZES)
def test_max_pools(isa, name, size):
    window = WINDOWS[name]
    net = Net(3, *size)
    down = net.affine("x")
    low = net.add(g.Affine, [down], net.shape(down), torch.ones(3), torch.full((3,), -9.0))
    names = [
        net.window(low, "max", *window),
        net.window("x", "max", *window, activation="relu6"),
        net.window(
            "x", "max", *window, scale=net.normal(3), bias=net.normal(3), activation="hardswish"
        ),
    ]
    check_layouts(net.graph(*names))


@pytest.mark.parametrize("name", [n for n in WINDOWS if "dilation" not in n])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("counted", [True, False])
def test_mean_pools(isa, name, size, counted):
    window = WINDOWS[name][:3]
    net = Net(3, *size)
    names = [
        net.window("x", "avg", *window, count_padding=counted, activation=word, **scaled)
        for word, scaled in (
            (None, {}),
            ("relu", {"scale": net.normal(3), "bias": net.normal(3)}),
            ("silu", {"scale": net.normal(3)}),
        )
    ]
    check_layouts(net.graph(*names))


@pytest.mark.parametrize("width", [*range(1, 41), 112])
def test_pools_of_every_width(isa, width):
    net = Net(2, 5, width)
    a = net.window("x", "max", (3, 3), (1, 1), (1, 1, 1, 1))
    b = net.window("x", "avg", (3, 3), (2, 2), (1, 1, 1, 1), count_padding=False)
    c = net.conv(a, 3, 3, 1)
    for pixel, batch in (layouts()[0], layouts()[4]):
        check(net.graph(b, c), pixel, batch)


def test_the_whole_picture_and_one_pixel(isa):
    net = Net(4, 7, 6)
    a = net.window("x", "avg", (7, 6), (7, 6))
    b = net.window(a, "max", (3, 3), (1, 1), (1, 1, 1, 1))
    c = net.window(b, "avg", (3, 3), (2, 2), (1, 1, 1, 1), count_padding=False)
    check_layouts(net.graph(a, b, c))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_passes_through(isa, special):
    net = Net(3, 9, 21)
    a = net.window("x", "max", (3, 3), (1, 1), (1, 1, 1, 1))
    b = net.window("x", "avg", (3, 3), (2, 2), (1, 1, 1, 1))
    c = net.window("x", "max", (2, 2), (2, 2))
    names = [a, b, c, *(net.act("x", word) for word in g.ACTIVATIONS), net.mean("x")]
    names += [net.sum("x", net.affine("x"), "relu"), net.mul("x", "x"), net.mul("x", names[-1])]
    names.append(net.linear(names[9], 5, activation="relu6"))
    names.append(net.linear(names[9], 5))
    graph = net.graph(*names)
    for pixel, batch in (layouts()[0], layouts()[3]):
        x = numbers(batch, (3, 9, 21))
        x[:, 1, 4, 7] = x[:, 2, 0, 20] = special
        program = program_of(make_plan(graph, pixel))
        shapes = [(batch, *net.shape(name)) for name in names]
        got = run_fenced(program, [x], shapes, True)
        for name, y in zip(names, got, strict=True):
            want = run(g.Graph(graph.nodes, [name]), x.double())
            assert torch.equal(y.isnan(), want.isnan()), (name, special)
            assert torch.equal(y.isinf(), want.isinf()), (name, special)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 1), (3, 4, 16), (2, 3, 33), (37,)])
def test_element_by_element(isa, activation, shape):
    net = Net(*(shape if len(shape) == 3 else (*shape, 1, 1)))
    x = "x" if len(shape) == 3 else net.mean("x")
    a = net.affine(x, activation)
    b = net.sum(x, a, activation)
    c = net.mul(a, b)
    d = net.add(g.Act, [x], net.shape(x), activation)
    names = [a, b, c, d, net.sum(x, x), net.mul(d, d)]
    if len(shape) == 3:
        factor = net.mean(a)
        names += [
            net.mul(a, factor),
            net.mul(x, net.linear(factor, shape[0], activation="sigmoid")),
        ]
    later = [net.conv(name, 2, 3, 1) for name in names if len(shape) == 3]
    check_layouts(net.graph(*names, *later))


def test_values_far_from_zero(isa):
    """Exponentials overflow to what their limits are."""
    net = Net(2, 3, 5)
    big = net.add(g.Affine, ["x"], (2, 3, 5), torch.tensor([200.0, -200.0]), torch.zeros(2))
    names = [net.act(big, word) for word in g.ACTIVATIONS]
    check_layouts(net.graph(*names))


def test_concatenations(isa):
    net = Net(3, 6, 9)
    a, b = net.conv("x", 4, 3, 1), net.window("x", "max", (3, 3), (1, 1), (1, 1, 1, 1))
    c = net.depthwise("x", 3, 1)
    names = [
        net.concat(a, b, c),  # written in place
        net.concat("x", a),  # a part of two, the network's input
        net.concat(b, b, b),
        net.concat("x", "x"),
    ]
    nested = net.concat(names[0], net.act(names[1]), names[2])
    later = [net.conv(name, 3, 3, 3, dilation=(3, 3)) for name in (*names, nested)]
    parts = [net.conv(name, 2, 3, 1) for name in (a, b, c)]
    check_layouts(net.graph(*names, nested, *later, *parts))


def test_concatenations_of_steps_of_every_kind_in_place(isa):
    for size in ((6, 9), (5, 16), (1, 1), (19, 31)):
        net = Net(4, *size)
        factor = net.linear(net.mean("x"), 4, activation="hardsigmoid")
        parts = [
            net.conv("x", 5, 1, activation="silu"), net.mul("x", factor),
            net.depthwise("x", 5, 2), net.window("x", "avg", (3, 3), (1, 1), (1, 1, 1, 1)),
            net.affine("x", "relu"), net.conv("x", 3, 3, 1, activation="relu"),
        ]  # fmt: skip
        whole = net.concat(*parts)
        y = net.depthwise(whole, 7, 3)
        check_layouts(net.graph(net.conv(y, 5, 3, 1), whole))


def test_concatenations_of_vectors(isa):
    net = Net(5, 3, 4)
    a, b = net.mean("x"), net.flatten("x")
    c = net.linear(b, 7, activation="relu")
    whole = net.concat(a, c, b, a)
    check_layouts(net.graph(net.linear(whole, 6), whole))


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (5, 1, 1), (4, 7, 7), (2, 3, 33)])
def test_flattening_and_means(isa, shape):
    net = Net(*shape)
    padded = net.conv("x", 4, 3, 1)
    a, b = net.flatten("x"), net.flatten(padded)
    net.conv(padded, 3, 3, 1)
    names = [a, b, net.mean("x"), net.mean(padded), net.linear(a, 9), net.linear(b, 9)]
    check_layouts(net.graph(*names, net.nodes[-3].name))


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 31, 33, 100, 257])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.45, 0.6, 1.0])
def test_linear_layers(isa, columns, density):
    net = Net(columns, 2, 3)
    x = net.mean("x")
    names = [
        net.linear(x, outputs, density=density, activation=word)
        for outputs, word in zip((1, 2, 3, 4, 5, 9, 37), ACTIVATIONS, strict=True)
    ]
    ran = {name for pixel, batch in layouts() for name in check(net.graph(*names), pixel, batch)}
    if density in (0.0, 1.0):
        assert ("gemv bits" in ran) == (isa == "avx512" and density < 0.5)
    assert "gemv dense" in ran  # of activations that no sparse kernel knows


def test_convolutions_of_one_pixel_feed_linear_layers(isa):
    net = Net(6, 5, 5)
    a = net.conv("x", 9, 5, activation="relu")
    b = net.flatten(a)
    c = net.linear(b, 4, density=0.5, activation="hardswish")
    check_layouts(net.graph(net.linear(c, 3), a))


def test_an_output_that_is_an_input_and_one_that_is_read_again(isa):
    net = Net(3, 4, 5)
    a = net.conv("x", 3, 3, 1, activation="relu")
    b = net.conv(a, 3, 3, 1)
    check_layouts(net.graph("x", a, b, a))


@pytest.mark.parametrize("seed", range(60))
def test_random_pools(isa, seed):
    pick = random.Random(seed)
    while True:
        size = (pick.randint(1, 20), pick.randint(1, 40))
        taps, stride = (
            (pick.randint(1, 5), pick.randint(1, 5)),
            (pick.randint(1, 4), pick.randint(1, 4)),
        )
        kind = pick.choice(("max", "avg"))
        dilation = (pick.randint(1, 3), pick.randint(1, 3)) if kind == "max" else (1, 1)
        padding = tuple(pick.randint(0, taps[i // 2] - 1) for i in range(4))
        sides = [
            count(size[i], taps[i], stride[i], padding[2 * i], padding[2 * i + 1], dilation[i])
            for i in (0, 1)
        ]
        if min(sides) > 0 and all(
            _meet(size[i], taps[i], stride[i], padding[2 * i], dilation[i], sides[i])
            for i in (0, 1)
        ):
            break
    net = Net(pick.randint(1, 4), *size, seed=seed)
    channels = net.shape("x")[0]
    scaled = {"scale": net.normal(channels), "bias": net.normal(channels)} if seed % 3 == 0 else {}
    y = net.window(
        "x", kind, taps, stride, padding, dilation, count_padding=pick.random() < 0.5,
        activation=pick.choice(SIMPLE), **scaled,
    )  # fmt: skip
    pixel, batch = layouts()[seed % len(layouts())]
    check(net.graph(y), pixel, batch)


def _meet(size, taps, stride, before, dilation, windows) -> bool:
    """Whether each window has a pixel."""
    return all(
        any(0 <= w * stride - before + t * dilation < size for t in range(taps))
        for w in range(windows)
    )

"""Shapes that nodes give, against torch's; what does not fit is refused."""

import itertools
import subprocess
import sys

import pytest
import torch
from engine_nets import compiled, pruned, small_net

from dass.engine import graph as g
from dass.engine.capture import capture
from dass.engine.interpret import run_node
from dass.engine.passes import simplify
from dass.engine.saving import check_graph
from dass.engine.shapes import output_shape


@pytest.mark.parametrize("name", ["efficientnet_v2_s", "resnet18", "dass_small"])
def test_every_node_of_a_network_gives_its_shape(name):
    model, shape = pruned(name)
    captured = capture(model, torch.zeros(1, *shape))
    for graph in (captured, simplify(captured)[0]):
        shapes = {}
        for node in graph:
            shapes[node.name] = node.shape
            if not isinstance(node, (g.Input, g.Torch)):
                assert output_shape(node, [shapes[i] for i in node.inputs]) == node.shape


def conv(weight, **fields):
    return g.Conv("y", ["x"], (), torch.zeros(weight), torch.zeros(weight[0]), **fields)


def test_windows_are_torchs():
    sizes = itertools.product(
        ((1, 1), (3, 2), (5, 1)), ((1, 1), (2, 1), (3, 4)), ((0,) * 4, (1, 2, 0, 3), (-1, 0, 2, 1)),
        ((1, 1), (2, 3)),
    )  # fmt: skip
    seen = 0
    for kernel, stride, padding, dilation in sizes:
        how = {"stride": stride, "padding": padding, "dilation": dilation}
        nodes = [
            conv((6, 2, *kernel), groups=2, **how),
            g.Pool("y", ["x"], (), "max", kernel, **how),
        ]
        if dilation == (1, 1):
            nodes.append(g.Pool("y", ["x"], (), "avg", kernel, **how))
        for node, size in itertools.product(nodes, ((4, 7, 9), (4, 2, 3), (4, 1, 1))):
            try:
                want = tuple(run_node(node, torch.zeros(1, *size)).shape[1:])
            except RuntimeError:
                with pytest.raises(ValueError, match=r"y \("):
                    output_shape(node, [size])
                continue
            assert output_shape(node, [size]) == want
            seen += 1
    assert seen > 150


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        (conv((6, 4, 1, 1)), [(3, 5, 5)]),
        (conv((6, 4, 1, 1)), [(4,)]),
        (conv((6, 4, 1, 1)), []),
        (conv((6, 4, 1, 1)), [(4, 5, 5), (6, 5, 4)]),
        (conv((6, 4, 1, 1)), [(4, 5, 5)] * 3),
        (conv((6, 2, 1, 1), groups=4), [(8, 5, 5)]),
        (conv((6, 0, 1, 1)), [(0, 5, 5)]),
        (conv((6, 4, 1)), [(4, 5, 5)]),
        (conv((6, 4, 1, 1), stride=(0, 1)), [(4, 5, 5)]),
        (conv((6, 4, 1, 1), padding=(-3, -3, 0, 0)), [(4, 5, 5)]),
        (conv((6, 4, 6, 1)), [(4, 5, 5)]),
        (g.Pool("y", ["x"], (), "avg", (2, 2), (1, 1), dilation=(2, 2)), [(4, 5, 5)]),
        (g.Linear("y", ["x"], (), torch.zeros(3, 4), torch.zeros(3)), [(5,)]),
        (g.Linear("y", ["x"], (), torch.zeros(3, 4), torch.zeros(3)), [(4, 1, 4)]),
        (g.Mean("y", ["x"], ()), [(4,)]),
        (g.Add("y", ["a", "b"], ()), [(4, 5, 5), (4, 1, 1)]),
        (g.Mul("y", ["a", "b"], ()), [(4, 5, 5), (5,)]),
        (g.Concat("y", ["a", "b"], ()), [(4, 5, 5), (4, 5, 4)]),
        (g.Concat("y", [], ()), []),
        (g.Flatten("y", ["a", "b"], ()), [(4,), (4,)]),
    ],
)
def test_what_does_not_fit_is_refused(node, inputs):
    with pytest.raises(ValueError, match=rf"^y \({node.op}\) of "):
        output_shape(node, inputs)


@pytest.mark.parametrize("far", [2, 2**40])
def test_a_file_cannot_ask_for_endless_padding(far):
    y = conv((6, 3, 1, 1), padding=(far,) * 4, stride=(far, far))
    y.shape = output_shape(y, [(3, 4, 4)])
    graph = g.Graph([g.Input("x", [], (3, 4, 4)), y], ["y"])
    if far == 2:
        check_graph(graph)
        return
    with pytest.raises(ValueError, match="y with padding"):
        check_graph(graph)


def test_reading_an_engine_does_not_load_torchs_compilers(tmp_path):
    compiled(small_net(), (3, 8, 8)).save(tmp_path / "net.engine")
    code = (
        "import sys, torch, dass\n"
        f"engine = dass.load_engine({str(tmp_path / 'net.engine')!r}, tune=False, cache=None)\n"
        "engine(torch.zeros(1, 3, 8, 8))\n"
        "print(sorted({'sympy', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"

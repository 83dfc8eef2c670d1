"""Small graphs for the tests of the passes, with random float64 weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from dass.engine.geometry import output_size
from dass.engine.graph import (
    Act,
    Add,
    Affine,
    Concat,
    Conv,
    Flatten,
    Graph,
    Input,
    Linear,
    Mean,
    Mul,
    Pool,
    Torch,
)
from dass.engine.interpret import run
from dass.engine.passes import Report, fold_constants, remove_dead


class Sketch:
    """Adds nodes one by one; each method returns the new node's name. The input is "x"."""

    def __init__(self, *shape: int, seed: int = 0):
        self.random = torch.Generator().manual_seed(seed)
        self.nodes = [Input("x", [], shape)]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def shape(self, name: str) -> tuple[int, ...]:
        return next(node.shape for node in self.nodes if node.name == name)

    def add(self, kind, inputs, shape, *args, **fields) -> str:
        name = f"{kind.__name__.lower()}{len(self.nodes)}"
        self.nodes.append(kind(name, list(inputs), tuple(shape), *args, **fields))
        return name

    def conv(self, x: str, out: int, kernel=1, padding=0, empty=(), residual=None, **fields) -> str:
        """empty: rows without weights."""
        cin, *size = self.shape(x)
        weight = self.normal(out, cin // fields.get("groups", 1), kernel, kernel)
        weight[list(empty)] = 0
        four = padding if isinstance(padding, tuple) else (padding,) * 4
        stride = fields.get("stride", (1, 1))
        dilation = fields.get("dilation", (1, 1))
        shape = (out, *output_size(size, (kernel, kernel), stride, four, dilation))
        inputs = [x] if residual is None else [x, residual]
        return self.add(Conv, inputs, shape, weight, self.normal(out), padding=four, **fields)

    def depthwise(self, x: str, kernel=3, padding=1, empty=(), **fields) -> str:
        channels = self.shape(x)[0]
        return self.conv(x, channels, kernel, padding, empty, groups=channels, **fields)

    def linear(self, x: str, out: int, **fields) -> str:
        weight = self.normal(out, *self.shape(x))
        return self.add(Linear, [x], (out,), weight, self.normal(out), **fields)

    def pool(self, x: str, kind: str, kernel=3, stride=1, padding=0, **fields) -> str:
        channels, *size = self.shape(x)
        kernel, stride, four = (kernel, kernel), (stride, stride), (padding,) * 4
        shape = (channels, *output_size(size, kernel, stride, four))
        return self.add(Pool, [x], shape, kind, kernel, stride, four, **fields)

    def affine(self, x: str, activation=None) -> str:
        shape = self.shape(x)
        return self.add(
            Affine, [x], shape, self.normal(shape[0]), self.normal(shape[0]), activation
        )

    def act(self, x: str, word: str = "relu") -> str:
        return self.add(Act, [x], self.shape(x), word)

    def sum(self, a: str, b: str, activation=None) -> str:
        return self.add(Add, [a, b], self.shape(a), activation)

    def mul(self, a: str, b: str) -> str:
        return self.add(Mul, [a, b], self.shape(a))

    def concat(self, *names: str) -> str:
        channels = sum(self.shape(name)[0] for name in names)
        return self.add(Concat, names, (channels, *self.shape(names[0])[1:]))

    def mean(self, x: str) -> str:
        return self.add(Mean, [x], self.shape(x)[:1])

    def flatten(self, x: str) -> str:
        channels, height, width = self.shape(x)
        return self.add(Flatten, [x], (channels * height * width,))

    def roll(self, x: str) -> str:
        arguments = [{"input": 0}, [1], [1]]
        return self.add(Torch, [x], self.shape(x), "aten.roll.default", arguments, {})

    def graph(self, *outputs: str) -> Graph:
        return Graph(list(self.nodes), list(outputs))


def change(graph: Graph, name: str, **fields) -> Graph:
    """The graph with some fields of one node replaced."""
    nodes = [replace(node, **fields) if node.name == name else node for node in graph]
    return Graph(nodes, graph.outputs, graph.batch)


def check(graph: Graph) -> None:
    """Names and order hold together, and every node gives the shape that it names."""
    shapes = {}
    for node in graph:
        assert node.name not in shapes
        assert all(name in shapes for name in node.inputs), node.name
        shapes[node.name] = node.shape
    assert isinstance(graph.nodes[0], Input)
    assert all(name in shapes for name in graph.outputs)
    x = torch.randn(2, *graph.nodes[0].shape, dtype=torch.float64)
    for node in graph:
        assert run(Graph(graph.nodes, [node.name]), x).shape[1:] == node.shape, node


def same(graph: Graph, changed: Graph, tolerance: float = 1e-12) -> None:
    """Both compute the same, on numbers of either sign."""
    check(changed)
    x = torch.randn(
        3, *graph.nodes[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    want = run(graph, x)
    assert want.std(0).max() > 0 or want.numel() == 0
    torch.testing.assert_close(run(changed, x), want, rtol=tolerance, atol=tolerance)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph]


def shrunk(graph: Graph) -> tuple[Graph, Report]:
    """Without constants and what nobody reads then."""
    return remove_dead(fold_constants(graph))

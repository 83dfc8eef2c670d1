"""Pass: channels that have the same value at every pixel for every input, folded into biases."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dass.engine.editing import rebuilt
from dass.engine.geometry import taps_inside
from dass.engine.graph import (
    Act,
    Add,
    Affine,
    Concat,
    Conv,
    Flatten,
    Graph,
    Linear,
    Mean,
    Mul,
    Node,
    Pool,
)
from dass.engine.interpret import activate


def fold_constants(graph: Graph) -> Graph:
    """Weights on constant channels become bias; nodes of constants alone no longer read anything.

    A channel is constant if it is the same at every pixel for every input: the row of a Conv
    without weights, act(bias), and what is made of it. A weight on a channel of constant v adds
    v * weight to the bias, unless it meets padding somewhere and v is not 0: then the sum differs
    at the border, and it stays. Weights that meet nothing but padding go. All shapes stay as they
    are: `remove_dead` then removes what nobody reads. A weight of 0 is taken as absent: infinities
    do not pass through it.
    """
    found: dict[str, Tensor] = {}
    nodes: dict[str, Node] = {}
    for node in graph:
        folded = _fold_weights(node, nodes, found)
        found[node.name] = _constant(folded, nodes, found)
        nodes[node.name] = _without_constants(folded, found, nodes)
    source = _Source(graph)
    for name, node in nodes.items():
        if not found[name].isnan().any():
            nodes[name] = source.node(node, found[name])
    return rebuilt(graph, source.inserted([*nodes.values()]))


def _unknown(node: Node) -> Tensor:
    return torch.full((node.shape[0] if node.shape else 1,), torch.nan, dtype=torch.float64)


def _fold_weights(node: Node, nodes: dict[str, Node], found: dict[str, Tensor]) -> Node:
    """The Conv or Linear with the weights on constant channels in its bias."""
    if not isinstance(node, (Conv, Linear)):
        return node
    values, weight = found[node.inputs[0]], node.weight
    known = ~values.isnan()
    if isinstance(node, Linear):
        if not known.any():
            return node
        bias = node.bias + weight.to(values) @ values.nan_to_num(0)
        return replace(node, weight=weight * ~known, bias=bias.to(weight))
    inside = taps_inside(node, nodes[node.inputs[0]].shape[1:]).flatten(0, 1)
    always, never = inside.all(0), ~inside.any(0)
    if not known.any() and not never.any():
        return node
    outputs, inputs = weight.shape[:2]
    # One row of values for all outputs, or with groups one for each output.
    per_row = values.view(node.groups, inputs)
    if node.groups > 1:
        per_row = per_row.repeat_interleave(outputs // node.groups, 0)
    per_row = per_row[:, :, None, None]
    constant = ~per_row.isnan() & ((per_row == 0) | always) & ~never
    bias = node.bias + (weight * torch.where(constant, per_row, 0)).sum((1, 2, 3))
    kept = torch.where(constant | never, 0, weight)
    return replace(node, weight=kept.to(weight), bias=bias.to(weight))


def _constant(node: Node, nodes: dict[str, Node], found: dict[str, Tensor]) -> Tensor:
    """float64 [C]: the value of each channel, NaN where it is not constant."""
    rule = _RULES.get(type(node))
    if rule is None or len(node.shape) not in (1, 3):
        return _unknown(node)
    inputs = [found[name] for name in node.inputs]
    return rule(node, nodes[node.inputs[0]].shape, *inputs).double()


def _rows(node: Conv | Linear, shape, x: Tensor, residual: Tensor | None = None) -> Tensor:
    values = node.bias.double() if residual is None else node.bias.double() + residual
    empty = (node.weight == 0).flatten(1).all(1)
    return torch.where(empty, activate(values, node.activation), torch.nan)


def _affine(node: Affine, shape, x: Tensor) -> Tensor:
    x = torch.where(node.scale == 0, 0.0, x)
    return activate(node.scale.double() * x + node.bias.double(), node.activation)


def _pool(node: Pool, shape, x: Tensor) -> Tensor:
    inside = taps_inside(node, shape[1:]).flatten(2)
    if node.kind == "avg" and node.count_padding and not inside.all():
        x = torch.where(x == 0, x, torch.nan)
    if not inside.any(2).all():  # a window of padding alone
        x = torch.full_like(x, torch.nan)
    if node.scale is not None:
        x = torch.where(node.scale == 0, 0.0, x) * node.scale
    return activate(x if node.bias is None else x + node.bias, node.activation)


def _mul(node: Mul, shape, a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


_RULES = {
    Conv: _rows,
    Linear: _rows,
    Affine: _affine,
    Pool: _pool,
    Mul: _mul,
    Act: lambda node, shape, x: activate(x, node.activation),
    Add: lambda node, shape, a, b: activate(a + b, node.activation),
    Mean: lambda node, shape, x: x,
    Concat: lambda node, shape, *inputs: torch.cat(inputs),
    Flatten: lambda node, shape, x: x.repeat_interleave(shape[1] * shape[2]),
}


def _without_constants(node: Node, found: dict[str, Tensor], nodes: dict[str, Node]) -> Node:
    """The node without an input that is constant throughout; an Affine in place of a sum or product
    with one, and of a Conv without weights that has a residual."""
    if isinstance(node, Conv) and len(node.inputs) == 2:
        constant = found[node.inputs[1]]
        if not constant.isnan().any():
            return replace(node, inputs=node.inputs[:1], bias=node.bias + constant.to(node.bias))
        if not node.weight.any():
            scale = torch.ones_like(node.bias)
            return _affine_of(node, node.inputs[1], scale, node.bias, node.activation)
    if not isinstance(node, (Add, Mul)):
        return node
    for constant, other in (node.inputs, node.inputs[::-1]):
        value = found[constant]
        if value.isnan().any() or nodes[other].shape != node.shape:
            continue
        if isinstance(node, Add):
            return _affine_of(node, other, torch.ones_like(value), value, node.activation)
        return _affine_of(node, other, value, torch.zeros_like(value), None)
    return node


def _affine_of(node: Node, name: str, scale, bias, activation) -> Affine:
    return Affine(node.name, [name], node.shape, scale, bias, activation, source=node.source)


class _Source:
    """Nodes that are constant throughout: convolutions of the network's input without weights.

    They say of which size the batch is and read nothing; vectors are such layers of its mean.
    """

    def __init__(self, graph: Graph):
        self.input = graph.nodes[0]
        self.mean = Mean(f"{self.input.name}.mean", [self.input.name], self.input.shape[:1])
        self.used = False
        self.names = {node.name for node in graph}

    def node(self, node: Node, value: Tensor) -> Node:
        own = [self.input.name] if len(node.shape) == 3 else [self.mean.name]
        if isinstance(node, (Conv, Linear)) and node.inputs == own:
            return node
        channels = self.input.shape[0]
        if len(node.shape) == 1:
            self.used = True
            weight = value.new_zeros(len(value), channels)
            return Linear(node.name, own, node.shape, weight, value, source=node.source)
        more = [ours - its for ours, its in zip(node.shape[1:], self.input.shape[1:], strict=True)]
        weight = value.new_zeros(len(value), channels, 1, 1)
        return Conv(
            node.name, own, node.shape, weight, value, padding=(0, more[0], 0, more[1]),
            source=node.source,
        )  # fmt: skip

    def inserted(self, nodes: list[Node]) -> list[Node]:
        if not self.used or self.mean.name in self.names:
            return nodes
        return [nodes[0], self.mean, *nodes[1:]]

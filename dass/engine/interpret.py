"""What each node of the graph means, in torch: slow and plain, what tests compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    Node,
    Pool,
    Torch,
)

_ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
}


def activate(x: Tensor, activation: str | None) -> Tensor:
    """An activation by its word in `dass.engine.graph`; None gives x itself."""
    return _ACTIVATIONS[activation](x)


@torch.no_grad()
def run(graph: Graph, x: Tensor) -> Tensor:
    """The network's output for x, [B, C, H, W], computed in the dtype of x.

    Raises:
        ValueError: x has another shape than the graph's input.
    """
    want = graph.nodes[0].shape
    if tuple(x.shape[1:]) != want:
        raise ValueError(f"x must be [B, {', '.join(map(str, want))}], got {list(x.shape)}")
    values: dict[str, Tensor] = {}
    for node in graph:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = x if isinstance(node, Input) else run_node(node, *inputs)
    return values[graph.outputs[0]]


def run_node(node: Node, *inputs: Tensor) -> Tensor:
    """One node's output, [B, ...], in the dtype and on the device of its inputs."""
    return _RUN[type(node)](node, *inputs)


def _conv(node: Conv, x: Tensor, residual: Tensor | None = None) -> Tensor:
    y = F.conv2d(
        _pad(x, node.padding, 0.0), node.weight.to(x), node.bias.to(x), node.stride,
        dilation=node.dilation, groups=node.groups,
    )  # fmt: skip
    return activate(y if residual is None else y + residual, node.activation)


def _linear(node: Linear, x: Tensor) -> Tensor:
    return activate(F.linear(x, node.weight.to(x), node.bias.to(x)), node.activation)


def _pool(node: Pool, x: Tensor) -> Tensor:
    if node.kind == "max":
        padded = _pad(x, node.padding, float("-inf"))
        y = F.max_pool2d(padded, node.kernel, node.stride, dilation=node.dilation)
    else:
        y = F.avg_pool2d(_pad(x, node.padding, 0.0), node.kernel, node.stride)
        if not node.count_padding:
            inside = _pad(torch.ones_like(x[:1, :1]), node.padding, 0.0)
            y = y / F.avg_pool2d(inside, node.kernel, node.stride)
    return activate(_scaled(y, node.scale, node.bias), node.activation)


def _affine(node: Affine, x: Tensor) -> Tensor:
    return activate(_scaled(x, node.scale, node.bias), node.activation)


def _mul(node: Mul, a: Tensor, b: Tensor) -> Tensor:
    return a * (b if b.dim() == a.dim() else _per_channel(b, a.dim()))


def run_torch(node: Torch, *inputs: Tensor) -> Tensor:
    """The node's op on its inputs."""

    def decode(value):
        if isinstance(value, list):
            return [decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((kind, what),) = value.items()
        if kind == "input":
            return inputs[what]
        if kind == "constant":
            constant = node.constants[what]
            return constant.to(inputs[0].dtype) if constant.is_floating_point() else constant
        return len(inputs[0]) if kind == "batch" else getattr(torch, what)

    space, name, overload = node.target.split(".")
    if space != "aten":
        raise ValueError(f"{node.target} is no operation of torch.ops.aten")
    function = getattr(getattr(torch.ops.aten, name), overload)
    options = {key: decode(value) for key, value in node.options.items()}
    return function(*decode(node.arguments), **options)


_RUN = {
    Conv: _conv,
    Linear: _linear,
    Pool: _pool,
    Affine: _affine,
    Mul: _mul,
    Torch: run_torch,
    Mean: lambda node, x: x.mean((2, 3)),
    Add: lambda node, a, b: activate(a + b, node.activation),
    Act: lambda node, x: activate(x, node.activation),
    Concat: lambda node, *inputs: torch.cat(inputs, 1),
    Flatten: lambda node, x: x.flatten(1),
}


def _pad(x: Tensor, padding: tuple[int, int, int, int], value: float) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom), value=value) if any(padding) else x


def _scaled(x: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is not None:
        x = x * _per_channel(scale.to(x)[None], x.dim())
    return x if bias is None else x + _per_channel(bias.to(x)[None], x.dim())


def _per_channel(values: Tensor, dims: int) -> Tensor:
    """[B, C] as what broadcasts over the pixels of [B, C, ...]."""
    return values.reshape(*values.shape, *[1] * (dims - 2))

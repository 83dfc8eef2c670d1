"""What shape a node gives, worked out from the node and its inputs alone.

torch knows it, too, on tensors without data, but loads its compilers for that: 70 MiB and seconds
where an engine is read from a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dass.engine import graph as g
from dass.engine.geometry import output_size

Shape = tuple[int, ...]


def output_shape(node: g.Node, inputs: Sequence[Shape]) -> Shape:
    """The shape of the node's output, without the batch, by the node's fields but its `shape`.

    Args:
        node: any but Input and Torch, whose shapes are their own.
        inputs: the shapes of what it reads: (C, H, W) or (K,).

    Raises:
        ValueError: a number or shape of inputs that the node does not take, or weights that do not
            fit to them.
    """
    try:
        return _SHAPES[type(node)](node, *inputs)
    except (ValueError, TypeError) as error:  # other inputs than the function has parameters for
        raise ValueError(f"{node.name} ({node.op}) of {list(inputs)}: {error}") from None


def _conv(node: g.Conv, x: Shape, residual: Shape | None = None) -> Shape:
    channels, *size = _picture(x)
    weight = tuple(node.weight.shape)
    if len(weight) != 4 or min(weight) < 1:
        raise ValueError(f"a weight of {weight}")
    if weight[0] % node.groups or weight[1] * node.groups != channels:
        raise ValueError(f"a weight of {weight} in {node.groups} groups")
    shape = (weight[0], *_windows(node, size, weight[2:]))
    if residual is not None and residual != shape:
        raise ValueError(f"{residual} is added to {shape}")
    return shape


def _linear(node: g.Linear, x: Shape) -> Shape:
    if tuple(node.weight.shape[1:]) != x or len(x) != 1:
        raise ValueError(f"a weight of {tuple(node.weight.shape)}")
    return (node.weight.shape[0],)


def _pool(node: g.Pool, x: Shape) -> Shape:
    channels, *size = _picture(x)
    if node.kind == "avg" and node.dilation != (1, 1):
        raise ValueError(f"a mean of windows with dilation {node.dilation}")
    return (channels, *_windows(node, size, node.kernel))


def _windows(node: g.Conv | g.Pool, size: Sequence[int], kernel: Sequence[int]) -> Shape:
    """Height and width of the output."""
    if min(*kernel, *node.stride, *node.dilation) < 1:
        raise ValueError(f"kernel {kernel}, stride {node.stride}, dilation {node.dilation}")
    top, bottom, left, right = node.padding
    for length, pads in zip(size, ((top, bottom), (left, right)), strict=True):
        if length + sum(min(pad, 0) for pad in pads) < 1:
            raise ValueError(f"nothing is left with padding {node.padding}")
    found = output_size(tuple(size), tuple(kernel), node.stride, node.padding, node.dilation)
    if min(found) < 1:
        raise ValueError(f"no window of {tuple(kernel)} fits")
    return found


def _mean(node: g.Mean, x: Shape) -> Shape:
    return _picture(x)[:1]


def _add(node: g.Add, a: Shape, b: Shape) -> Shape:
    if a != b:
        raise ValueError("shapes differ")
    return a


def _mul(node: g.Mul, a: Shape, b: Shape) -> Shape:
    if b not in (a, a[:1]):
        raise ValueError("neither the same shape nor a factor per channel")
    return a


def _same(node: g.Node, x: Shape) -> Shape:
    return x


def _concat(node: g.Concat, first: Shape, *others: Shape) -> Shape:
    if any(other[1:] != first[1:] for other in others):
        raise ValueError("sizes differ")
    return (first[0] + sum(other[0] for other in others), *first[1:])


def _flatten(node: g.Flatten, x: Shape) -> Shape:
    return (math.prod(x),)


def _picture(x: Shape) -> Shape:
    if len(x) != 3:
        raise ValueError("(channels, height, width) is needed")
    return x


_SHAPES: dict[type[g.Node], Callable[..., Shape]] = {
    g.Conv: _conv,
    g.Linear: _linear,
    g.Pool: _pool,
    g.Mean: _mean,
    g.Add: _add,
    g.Mul: _mul,
    g.Affine: _same,
    g.Act: _same,
    g.Concat: _concat,
    g.Flatten: _flatten,
}

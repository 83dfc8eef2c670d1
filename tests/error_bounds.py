"""What a graph's nodes are in float64, and how far a computation in float32 may be from that."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dass.engine import graph as g
from dass.engine import interpret
from dass_kernels.testing import tolerance

# Lipschitz constants of the activations, and the roundings that each does itself.
SLOPES = {"hardswish": 1.5, "silu": 1.1, "sigmoid": 0.25, "hardsigmoid": 1 / 6}
ROUNDINGS = {"hardswish": 2, "silu": 6, "sigmoid": 6, "hardsigmoid": 2}

Bounded = tuple[Tensor, Tensor]  # a value, and the largest error of what was computed


def bounded(graph: g.Graph, x: Tensor) -> dict[str, Bounded]:
    """Each node by name. Weights are taken as they are in float32, and x.

    A sum of n products may be off by tolerance(n) times the sum of their absolute values
    (`dass_kernels.testing.tolerance`), plus what the errors of its inputs come to.
    """
    found: dict[str, Bounded] = {}
    for node in graph:
        if isinstance(node, g.Input):
            found[node.name] = (x.double(), torch.zeros_like(x, dtype=torch.float64))
        else:
            found[node.name] = _node(node, [found[name] for name in node.inputs])
    return found


def _node(node: g.Node, inputs: list[Bounded]) -> Bounded:
    values, errors = zip(*inputs, strict=True)
    word = getattr(node, "activation", None)
    plain = replace(node, activation=None) if word else node
    value = _run(plain, values)
    return _activated(value, _error(plain, inputs, errors), word)


def _run(node: g.Node, values: tuple[Tensor, ...]) -> Tensor:
    return interpret._RUN[type(node)](node, *values)


def _error(node: g.Node, inputs: list[Bounded], errors: tuple[Tensor, ...]) -> Tensor:
    sizes = tuple(value.abs() + error for value, error in inputs)
    if isinstance(node, g.Act):
        return errors[0]
    if isinstance(node, g.Concat | g.Flatten):
        return _run(node, errors)
    if isinstance(node, g.Mul):
        carried = _run(node, sizes) - _run(node, tuple(value.abs() for value, _ in inputs))
        return carried + tolerance(torch.float32, 1) * _run(node, sizes)
    weights = {k: v.abs() for k, v in vars(node).items() if isinstance(v, Tensor)}
    bias = {"bias": torch.zeros_like(weights["bias"])} if "bias" in weights else {}
    carried = _run(replace(node, **{**weights, **bias}), errors)
    return carried + tolerance(torch.float32, _length(node, inputs)) * _run(
        replace(node, **weights), sizes
    )


def _length(node: g.Node, inputs: list[Bounded]) -> int:
    """Products in a sum, or roundings that come to the same."""
    if isinstance(node, g.Conv | g.Linear):
        return int((node.weight != 0).flatten(1).sum(1).max())
    if isinstance(node, g.Pool):
        return node.kernel[0] * node.kernel[1] + 4  # one over the pixels of its rows and columns
    if isinstance(node, g.Mean):
        return inputs[0][0][0, 0].numel() + 2
    return 2


def _activated(before: Tensor, error: Tensor, word: str | None) -> Bounded:
    value = interpret.activate(before, word)
    if word not in SLOPES:
        return value, error
    size = torch.ones_like(before) if "sigmoid" in word else before.abs() + error
    own = tolerance(torch.float32, ROUNDINGS[word]) * size
    return value, SLOPES[word] * error + own

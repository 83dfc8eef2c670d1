"""The same thing computed twice is computed once."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from dass.engine.editing import rebuilt, tensors
from dass.engine.graph import Act, Affine, Conv, Flatten, Graph, Linear, Mean, Node, Pool

_KINDS = (Act, Affine, Conv, Flatten, Linear, Mean, Pool)


def merge(graph: Graph, kinds: tuple[type[Node], ...] = _KINDS) -> Graph:
    """Nodes of these kinds with equal inputs, weights and settings become the first of them."""
    seen: dict[tuple, list[Node]] = {}
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    for node in graph:
        inputs = [renamed.get(name, name) for name in node.inputs]
        node = replace(node, inputs=inputs)
        if isinstance(node, kinds):
            alike = seen.setdefault(_key(node), [])
            twin = next((other for other in alike if _same_weights(other, node)), None)
            if twin is not None:
                renamed[node.name] = twin.name
                continue
            alike.append(node)
        nodes.append(node)
    return rebuilt(graph, nodes, renamed)


def _key(node: Node) -> tuple:
    settings = (getattr(node, each.name) for each in fields(node))
    plain = tuple(
        tuple(value) if isinstance(value, list) else value
        for value, each in zip(settings, fields(node), strict=True)
        if each.name not in ("name", "source") and not isinstance(value, Tensor)
    )
    return (type(node), plain)


def _same_weights(a: Node, b: Node) -> bool:
    own, other = tensors(a), tensors(b)
    return own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own)

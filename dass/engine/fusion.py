"""Passes that make one node of two: Affine, activation and residual go into their producers."""

from __future__ import annotations

from dataclasses import replace

import torch

from dass.engine.editing import joined, rebuilt, sole_reader
from dass.engine.graph import Act, Add, Affine, Concat, Conv, Graph, Linear, Node, Pool
from dass.engine.sharing import merge

_ACTIVATED = (Conv, Linear, Pool, Affine, Add)


def fold_affine(graph: Graph) -> Graph:
    """Affine into the Conv, Linear, Pool or Affine before it, where that has no other reader.

    scale (W x + b) + bias = (scale W) x + (scale b + bias). A Conv with a residual takes the bias
    alone. An Affine by 1 and 0 becomes its activation, or nothing.
    """
    graph = _without_identities(graph)
    readers = graph.readers()
    nodes: dict[str, Node] = {}
    renamed: dict[str, str] = {}
    for node in graph:
        if isinstance(node, Affine) and sole_reader(graph, readers, node.inputs[0]) is node:
            name = renamed.get(node.inputs[0], node.inputs[0])
            folded = _with_affine(nodes[name], node)
            if folded is not None:
                nodes[name] = folded
                renamed[node.name] = name
                continue
        nodes[node.name] = node
    return rebuilt(graph, nodes.values(), renamed)


def _without_identities(graph: Graph) -> Graph:
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    for node in graph:
        if isinstance(node, Affine) and (node.scale == 1).all() and (node.bias == 0).all():
            if node.activation is None:
                renamed[node.name] = node.inputs[0]
                continue
            node = Act(node.name, node.inputs, node.shape, node.activation, source=node.source)
        nodes.append(node)
    return rebuilt(graph, nodes, renamed)


def _with_affine(first: Node, affine: Affine) -> Node | None:
    if getattr(first, "activation", "none") is not None:
        return None
    scale, bias = affine.scale, affine.bias
    changes = {"activation": affine.activation, "source": joined(first, affine)}
    if isinstance(first, (Conv, Linear)):
        if len(first.inputs) == 2 and not (scale == 1).all():
            return None
        weight = first.weight * scale.reshape(-1, *[1] * (first.weight.dim() - 1))
        return replace(first, weight=weight, bias=first.bias * scale + bias, **changes)
    if isinstance(first, (Pool, Affine)):
        own = torch.ones_like(scale) if first.scale is None else first.scale
        offset = torch.zeros_like(bias) if first.bias is None else first.bias
        return replace(first, scale=own * scale, bias=offset * scale + bias, **changes)
    return None


def fuse_activations(graph: Graph) -> Graph:
    """An Act into the node before it, where that has no other reader.

    Equal Acts of one node are merged first. The Act of a Concat that only it reads is done to the
    Concat's inputs instead, if the Concat alone reads those, too: each may then take it.
    """
    graph = merge(_through_concat(merge(graph, (Act,))), (Act,))
    readers = graph.readers()
    nodes: dict[str, Node] = {}
    renamed: dict[str, str] = {}
    for node in graph:
        if isinstance(node, Act):
            first = nodes.get(node.inputs[0])
            idle = node.activation is None
            if idle or (first is not None and _may_take(graph, readers, first)):
                if not idle:
                    source = joined(first, node)
                    fused = replace(first, activation=node.activation, source=source)
                    nodes[first.name] = fused
                renamed[node.name] = node.inputs[0]
                continue
        nodes[node.name] = node
    return rebuilt(graph, nodes.values(), renamed)


def _may_take(graph: Graph, readers: dict[str, list[Node]], node: Node) -> bool:
    takes = isinstance(node, _ACTIVATED) and node.activation is None
    return takes and isinstance(sole_reader(graph, readers, node.name), Act)


def _through_concat(graph: Graph) -> Graph:
    readers = graph.readers()
    acts = {
        node.name: act
        for node in graph
        if isinstance(node, Concat)
        and isinstance(act := sole_reader(graph, readers, node.name), Act)
        and all(len(readers[name]) == 1 for name in node.inputs)
    }
    nodes: list[Node] = []
    renamed = {act.name: name for name, act in acts.items()}
    shapes = {node.name: node.shape for node in graph}
    for node in graph:
        if node.name in renamed:
            continue
        if node.name in acts:
            act, pieces = acts[node.name], []
            for i, name in enumerate(node.inputs):
                pieces.append(f"{act.name}.{i}")
                nodes.append(
                    Act(pieces[-1], [name], shapes[name], act.activation, source=act.source)
                )
            node = replace(node, inputs=pieces)
        nodes.append(node)
    return rebuilt(graph, nodes, renamed)


def fuse_residuals(graph: Graph) -> Graph:
    """Add of a Conv's output, which nobody else reads, and a tensor: the Conv's residual.

    The Conv takes the Add's place, since what it adds must be there before, and its activation. Of
    two Convs it is the one that comes later.
    """
    while (found := _next_residual(graph)) is not None:
        conv, add = found
        other = add.inputs[1 - add.inputs.index(conv.name)]
        fused = replace(
            conv, inputs=[conv.inputs[0], other], activation=add.activation,
            source=joined(conv, add),
        )  # fmt: skip
        nodes = [fused if node is add else node for node in graph if node is not conv]
        graph = rebuilt(graph, nodes, {add.name: conv.name})
    return graph


def _next_residual(graph: Graph) -> tuple[Conv, Add] | None:
    readers = graph.readers()
    by_name = {node.name: (i, node) for i, node in enumerate(graph)}
    for node in graph:
        if isinstance(node, Add):
            takers = [
                by_name[name]
                for name in node.inputs
                if _takes_residual(by_name[name][1]) and sole_reader(graph, readers, name) is node
            ]
            if takers:
                return max(takers, key=lambda taker: taker[0])[1], node
    return None


def _takes_residual(node: Node) -> bool:
    return isinstance(node, Conv) and node.activation is None and len(node.inputs) == 1

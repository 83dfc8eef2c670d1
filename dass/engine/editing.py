"""What the passes over a graph share: renaming, and who reads a node alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

from torch import Tensor

from dass.engine.graph import Graph, Node


def rebuilt(graph: Graph, nodes: Iterable[Node], renamed: Mapping[str, str] | None = None) -> Graph:
    """The graph of these nodes. renamed: what a name is to be read as; followed to the end."""

    renamed = renamed or {}

    def final(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    nodes = [replace(node, inputs=[final(name) for name in node.inputs]) for node in nodes]
    return Graph(nodes, [final(name) for name in graph.outputs], graph.batch)


def sole_reader(graph: Graph, readers: Mapping[str, list[Node]], name: str) -> Node | None:
    """The only node that reads a name, once; None if there are several or it is an output."""
    found = readers[name]
    alone = len(found) == 1 and found[0].inputs.count(name) == 1 and name not in graph.outputs
    return found[0] if alone else None


def joined(first: Node, second: Node) -> str:
    """The source of what two nodes became."""
    parts = [part for node in (first, second) for part in node.source.split(" + ") if part]
    return " + ".join(dict.fromkeys(parts))


def tensors(node: Node) -> dict[str, Tensor]:
    """A node's weights, by the name of the field."""
    found = {each.name: getattr(node, each.name) for each in fields(node)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def channels(node: Node) -> int:
    return node.shape[0] if node.shape else 1

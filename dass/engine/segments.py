"""A graph cut where torch has to do a node: programs and torch's ops, in turn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dass.engine import graph as g
from dass.engine.interpret import run_torch


@dataclass
class Segment:
    """Either nodes for a program (`graph`) or one node for torch (`torch`).

    inputs, outputs: names of tensors [batch, ...], in the order in which they are passed. shapes:
    of the outputs, without the batch.
    """

    inputs: list[str]
    outputs: list[str]
    shapes: list[tuple[int, ...]]
    graph: g.Graph | None = None
    torch: g.Torch | None = None

    def call(self, inputs: list[Tensor]) -> Tensor:
        """The node's output."""
        return run_torch(self.torch, *inputs)


def cut(graph: g.Graph) -> list[Segment]:
    """Segments in the order in which they run; each reads what those before it gave."""
    groups: list[list[g.Node]] = [[]]
    for node in graph.nodes[1:]:
        if isinstance(node, g.Torch):
            groups += [[node], []]
        else:
            groups[-1].append(node)
    found = [_segment(graph, group) for group in groups if group]
    return found or [_segment(graph, [])]


def _segment(graph: g.Graph, nodes: list[g.Node]) -> Segment:
    names = {node.name for node in nodes}
    inputs = list(dict.fromkeys(n for node in nodes for n in node.inputs if n not in names))
    if len(nodes) == 1 and isinstance(nodes[0], g.Torch):
        return Segment(inputs, [nodes[0].name], [nodes[0].shape], torch=nodes[0])
    read_outside = {n for node in graph if node.name not in names for n in node.inputs}
    outputs = [n.name for n in nodes if n.name in read_outside or n.name in graph.outputs]
    given = [g.Input(name, [], graph[name].shape) for name in inputs]
    shapes = [graph[name].shape for name in outputs]
    return Segment(inputs, outputs, shapes, graph=g.Graph([*given, *nodes], outputs))

"""Groups of layers that may run depth first: [1x1 ->] depthwise [-> 1x1]."""

from __future__ import annotations

from dataclasses import dataclass

from dass.engine import graph as g


@dataclass(frozen=True)
class Fusion:
    """How one group runs: the names of its nodes, and how many output rows at a time."""

    depthwise: str
    expand: str | None = None
    project: str | None = None
    strip: int = 16

    @property
    def last(self) -> str:
        return self.project or self.depthwise

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(name for name in (self.expand, self.depthwise, self.project) if name)


def groups(graph: g.Graph, suits) -> list[Fusion]:
    """The longest group around each depthwise layer that ``suits``; no layer is in two."""
    nodes, readers = {node.name: node for node in graph}, graph.readers()
    taken: set[str] = set()
    found = []
    for node in graph:
        if not isinstance(node, g.Conv) or not suits(node):
            continue
        before = nodes[node.inputs[0]]
        expand = before.name if _pointwise(before) and len(before.inputs) == 1 else None
        if expand and (len(readers[expand]) > 1 or expand in graph.outputs):
            expand = None
        after = readers[node.name]
        project = after[0].name if len(after) == 1 and _pointwise(after[0]) else None
        if node.name in graph.outputs or (project and after[0].inputs[0] != node.name):
            project = None
        if project and node.name in after[0].inputs[1:]:
            project = None
        group = Fusion(node.name, None if expand in taken else expand, project)
        if len(group.members) > 1:
            found.append(group)
            taken.update(group.members)
    return found


def _pointwise(node: g.Node) -> bool:
    return (
        isinstance(node, g.Conv)
        and len(node.shape) == 3
        and node.weight.shape[2:] == (1, 1)
        and node.stride == (1, 1)
        and not any(node.padding)
        and node.groups == 1
        and node.activation in (None, "relu", "relu6", "hardswish")
    )

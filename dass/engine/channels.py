"""Pass: channels and nodes that nobody reads are taken out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dass.engine.editing import channels, rebuilt
from dass.engine.graph import Affine, Concat, Conv, Flatten, Graph, Input, Linear, Node, Pool, Torch


@dataclass
class Report:
    """What was taken out of a graph.

    channels: name of a node that is left -> how many of its channels went. nodes: names of those
    that went altogether, since nobody read them.
    """

    channels: dict[str, int] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)

    def __add__(self, later: Report) -> Report:
        """Of one pass and a later one."""
        both = dict(self.channels)
        for name, count in later.channels.items():
            both[name] = both.get(name, 0) + count
        gone = [*self.nodes, *later.nodes]
        return Report({name: n for name, n in both.items() if name not in gone}, gone)


def remove_dead(graph: Graph) -> tuple[Graph, Report]:
    """The graph without the channels that no weight reads, and what was taken out.

    Input, outputs and whatever a Torch node reads or gives keep all their channels. The sides of an
    Add or Mul, a residual and its Conv, and the input and output of a node that works channel by
    channel keep the same ones; in a Conv with groups, whole groups.
    """
    keep = _Keep(graph).found()
    nodes, renamed = [], {}
    report = Report()
    for node in graph:
        kept = keep[node.name]
        if not kept.any():
            report.nodes.append(node.name)
            continue
        if not kept.all():
            report.channels[node.name] = int((~kept).sum())
        node = _shrunk(node, keep)
        if isinstance(node, Concat) and len(node.inputs) == 1:
            renamed[node.name] = node.inputs[0]
            report.channels.pop(node.name, None)
            continue
        nodes.append(node)
    return rebuilt(graph, nodes, renamed), report


class _Keep:
    """Which channels stay, by name of the node; grown from the outputs until nothing changes."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.shapes = {node.name: node.shape for node in graph}
        self.keep = {node.name: torch.zeros(channels(node)).bool() for node in graph}
        self.changed = False
        # [O, I] of a Conv without groups or a Linear: which inputs a row reads.
        self.reads = {
            node.name: (node.weight != 0).flatten(2).any(2)
            if isinstance(node, Conv)
            else node.weight != 0
            for node in graph
            if isinstance(node, (Conv, Linear)) and not _is_grouped(node)
        }

    def found(self) -> dict[str, Tensor]:
        self._want(self.graph.nodes[0].name, torch.ones_like(self.keep[self.graph.nodes[0].name]))
        for name in self.graph.outputs:
            self._want(name, torch.ones_like(self.keep[name]))
        self._grow()
        while self._feed():
            self._grow()
        return self.keep

    def _want(self, name: str, mask: Tensor) -> None:
        new = self.keep[name] | mask
        if not torch.equal(new, self.keep[name]):
            self.keep[name], self.changed = new, True

    def _grow(self) -> None:
        self.changed = True
        while self.changed:
            self.changed = False
            for node in reversed(self.graph.nodes):
                self._visit(node)

    def _feed(self) -> bool:
        """Gives a node that stays but needs nothing of its input one channel to read."""
        for node in self.graph:
            kept = self.keep[node.name].any()
            if node.name in self.reads and kept and not self.keep[node.inputs[0]].any():
                self.keep[node.inputs[0]][0] = True
                return True
        return False

    def _visit(self, node: Node) -> None:
        kept = self.keep[node.name]
        if isinstance(node, Input) or not kept.any():
            return
        if isinstance(node, Torch):
            for name in [node.name, *node.inputs]:
                self._want(name, torch.ones_like(self.keep[name]))
        elif node.name in self.reads:
            self._want(node.inputs[0], self.reads[node.name][kept].any(0))
            if len(node.inputs) == 2:
                self._tie(node.name, node.inputs[1])
        elif isinstance(node, Conv):
            self._tie_groups(node)
        elif isinstance(node, Concat):
            self._tie_concat(node)
        elif isinstance(node, Flatten):
            name = node.inputs[0]
            pixels = kept.view(self.shapes[name][0], -1)
            self._want(name, pixels.any(1))
            self._want(node.name, self.keep[name][:, None].expand_as(pixels).flatten())
        else:
            for name in node.inputs:
                self._tie(node.name, name)

    def _tie(self, a: str, b: str) -> None:
        self._want(a, self.keep[b])
        self._want(b, self.keep[a])

    def _tie_groups(self, node: Conv) -> None:
        name = node.inputs[0]
        rows, columns = self.keep[node.name], self.keep[name]
        groups = rows.view(node.groups, -1).any(1) | columns.view(node.groups, -1).any(1)
        self._want(node.name, groups.repeat_interleave(len(rows) // node.groups))
        self._want(name, groups.repeat_interleave(len(columns) // node.groups))
        if len(node.inputs) == 2:
            self._tie(node.name, node.inputs[1])

    def _tie_concat(self, node: Concat) -> None:
        self._want(node.name, torch.cat([self.keep[name] for name in node.inputs]))
        sizes = [len(self.keep[name]) for name in node.inputs]
        for name, part in zip(node.inputs, self.keep[node.name].split(sizes), strict=True):
            self._want(name, part)


def _is_grouped(node: Node) -> bool:
    return isinstance(node, Conv) and node.groups > 1


def _shrunk(node: Node, keep: dict[str, Tensor]) -> Node:
    """The node with the channels that stay; all fields per channel follow."""
    kept = keep[node.name]
    if isinstance(node, (Input, Torch)) or (kept.all() and _inputs_stay(node, keep)):
        return node
    shape = (int(kept.sum()), *node.shape[1:])
    if isinstance(node, (Conv, Linear)):
        weight, changes = node.weight[kept], {}
        if _is_grouped(node):
            changes["groups"] = len(weight) * node.groups // len(kept)
        else:
            weight = weight[:, keep[node.inputs[0]]]
        return replace(node, shape=shape, weight=weight, bias=node.bias[kept], **changes)
    if isinstance(node, Concat):
        return replace(node, shape=shape, inputs=[n for n in node.inputs if keep[n].any()])
    if isinstance(node, (Affine, Pool)) and node.scale is not None:
        return replace(node, shape=shape, scale=node.scale[kept], bias=node.bias[kept])
    return replace(node, shape=shape)


def _inputs_stay(node: Node, keep: dict[str, Tensor]) -> bool:
    return all(keep[name].all() for name in node.inputs)

"""The passes over a graph, and their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dass.engine.channels import Report, remove_dead
from dass.engine.constants import fold_constants
from dass.engine.editing import tensors
from dass.engine.fusion import fold_affine, fuse_activations, fuse_residuals
from dass.engine.graph import Graph
from dass.engine.sharing import merge
from dass.engine.ungrouping import ungroup

__all__ = [
    "Report",
    "fold_affine",
    "fold_constants",
    "fuse_activations",
    "fuse_residuals",
    "merge",
    "remove_dead",
    "rounded",
    "simplify",
    "ungroup",
]

_FUSIONS: tuple[Callable[[Graph], Graph], ...] = (
    fold_affine,
    merge,
    fuse_activations,
    fold_constants,
)


def simplify(
    graph: Graph, dtype: torch.dtype = torch.float32, *, keep_dead: bool = False
) -> tuple[Graph, Report]:
    """The same network in as few nodes and channels as these passes find, and what they took out.

    They are repeated until nothing changes. Residuals are fused once no more constants are found,
    since a sum is easier to take apart than a Conv with a residual; what that uncovers is looked
    for again.

    Args:
        graph: as `dass.engine.capture.capture` gives it; it is left as it is.
        dtype: what weights are rounded to in the end.
        keep_dead: leave what nobody reads, to measure what taking it out gives.
    """
    remove = _keep_all if keep_dead else remove_dead
    graph, report = remove(ungroup(graph))
    for fusions in (_FUSIONS, (*_FUSIONS, fuse_residuals)):
        before = None
        while before != (before := _size(graph)):
            for fusion in fusions:
                graph = fusion(graph)
            graph, removed = remove(graph)
            report = report + removed
    return rounded(graph, dtype), report


def _keep_all(graph: Graph) -> tuple[Graph, Report]:
    return graph, Report()


def rounded(graph: Graph, dtype: torch.dtype) -> Graph:
    """The graph with all weights in this dtype."""
    nodes = [
        replace(node, **{key: value.to(dtype) for key, value in tensors(node).items()})
        for node in graph
    ]
    return Graph(nodes, graph.outputs, graph.batch)


def _size(graph: Graph) -> tuple[int, int, int]:
    """(nodes, channels, weights that are not 0): each pass makes one of them smaller."""
    weights = [value for node in graph for value in tensors(node).values()]
    channels = sum(node.shape[0] for node in graph if node.shape)
    return len(graph.nodes), channels, sum(int(value.count_nonzero()) for value in weights)

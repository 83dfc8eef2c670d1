"""Pass: convolutions with groups and few weights become ones without groups."""

from __future__ import annotations

from dataclasses import replace

from dass.engine.editing import rebuilt
from dass.engine.graph import Conv, Graph
from dass.engine.steps import DEPTHWISE_LEAST

MOST_WEIGHTS = 1 << 20  # of the dense weight [O, I, kh, kw] that comes of it


def ungroup(graph: Graph) -> Graph:
    """The graph with pruned depthwise and grouped convolutions as ones of a single group.

    They run as sparse rows in any case, which do not care. But groups tie the channels of output
    and input together, so that no channel of either can be removed alone.
    """
    return rebuilt(graph, [_ungrouped(node) if _is_sparse(node) else node for node in graph])


def _is_sparse(node) -> bool:
    if not isinstance(node, Conv) or node.groups == 1:
        return False
    few = float((node.weight != 0).double().mean()) < DEPTHWISE_LEAST
    return few and node.weight.numel() * node.groups <= MOST_WEIGHTS


def _ungrouped(node: Conv) -> Conv:
    outputs, per_group, *taps = node.weight.shape
    rows = outputs // node.groups
    weight = node.weight.new_zeros(outputs, node.groups * per_group, *taps)
    for group in range(node.groups):
        own = slice(group * rows, (group + 1) * rows)
        weight[own, group * per_group : (group + 1) * per_group] = node.weight[own]
    return replace(node, weight=weight, groups=1)

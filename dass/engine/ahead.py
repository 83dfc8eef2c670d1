"""What a step can do on the way, where code is emitted for it: a ReLU on what it reads, a sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dass.engine import graph as g
from dass.engine.steps import suits_depthwise

# Products with more weights than this may end up on templates, which do not know a ReLU.
MOST_NONZEROS = 400_000
WIDEST_WINDOW = 16  # of emitted pools


def relus_read_through(graph: g.Graph, readers: Mapping[str, list[g.Node]]) -> dict[str, str]:
    """ReLU -> what it reads, for those whose readers can all do it themselves."""
    inputs = {node.name for node in graph if isinstance(node, g.Input)}
    found = {}
    for node in graph:
        if not isinstance(node, g.Act) or node.activation != "relu" or len(node.shape) != 3:
            continue
        if node.name in graph.outputs or node.inputs[0] in inputs:
            continue
        if all(_reads_through(reader, node.name) for reader in readers[node.name]):
            found[node.name] = node.inputs[0]
    return found


def _reads_through(reader: g.Node, name: str) -> bool:
    if name in reader.inputs[1:]:
        return False
    if isinstance(reader, g.Pool):
        return _simple(reader.activation) and max(reader.kernel) <= WIDEST_WINDOW
    if not isinstance(reader, g.Conv) or reader.activation == "hardswish":
        return False
    if suits_depthwise(reader, 1):
        return _simple(reader.activation)
    return int((reader.weight != 0).sum()) <= MOST_NONZEROS


def sums_of_pools(
    graph: g.Graph, readers: Mapping[str, list[g.Node]], busy: Collection[str]
) -> dict[str, str]:
    """Sum -> the pool that does it: an input that nothing else reads. busy: not these."""
    nodes = {node.name: node for node in graph}
    found = {}
    for node in graph:
        if not isinstance(node, g.Add) or len(node.shape) != 3 or not _simple(node.activation):
            continue
        for name in node.inputs:
            pool = nodes[name]
            alone = len(readers[name]) == 1 and node.inputs.count(name) == 1
            if not isinstance(pool, g.Pool) or pool.activation is not None or not alone:
                continue
            if max(pool.kernel) > WIDEST_WINDOW:
                continue
            if name not in graph.outputs and not any(n in busy for n in node.inputs):
                found[node.name] = name
                break
    return found


def _simple(activation: str | None) -> bool:
    return activation in (None, "relu", "relu6")

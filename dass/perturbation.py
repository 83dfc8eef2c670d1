"""Selection by perturbation: an operation is worth what the relaxed network loses without it.

A large alpha need not mean an important operation. Instead, for each edge in turn, every operation
is taken out and the validation loss measured; the one that is missed most stays. Then, for each
node, every incoming edge is taken out, and the two that are missed most stay (Wang et al. 2021,
Rethinking Architecture Selection in Differentiable NAS, arXiv 2108.04392, algorithms 1 and 2; they
measure accuracy, which a few hundred images cannot tell apart).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from dass.genotype import CELLS, Edge, Genotype
from dass.space import CONCAT, EDGES, edge_index
from dass.supernet import Architecture, Weights

__all__ = ["select_by_perturbation"]


def select_by_perturbation(
    architecture: Architecture,
    loss: Callable[[Weights], float],
    *,
    tune: Callable[[Weights], None] | None = None,
    tell: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> Genotype:
    """The genotype whose operations and edges are missed most.

    Args:
        architecture: its softmaxed alphas are where it starts, and break ties.
        loss: the validation loss under weights ``{"normal": [14, choices], "reduce": ...}``.
        tune: called after each decision, to let the network's weights settle.
        tell: called with how many decisions are made, and of how many.
        seed: of the order in which edges and nodes are decided.
    """
    weights = {cell: w.detach().clone() for cell, w in architecture.weights().items()}
    strengths = {cell: w.clone() for cell, w in weights.items()}
    order = random.Random(seed)
    edges = [(cell, edge) for cell in CELLS for edge in range(EDGES)]
    nodes = [(cell, node) for cell in CELLS for node in CONCAT]
    order.shuffle(edges)
    order.shuffle(nodes)
    usable = [c for c, choice in enumerate(architecture.choices) if choice.op != "none"]
    chosen: dict[tuple[str, int], int] = {}

    def decided(count: int) -> None:
        if tune is not None:
            tune(weights)
        if tell is not None:
            tell(count, len(edges) + len(nodes))

    for count, (cell, edge) in enumerate(edges):
        row = weights[cell][edge]
        worth = {c: _loss_without(loss, weights, row[c : c + 1]) for c in usable}
        best = max(usable, key=lambda c: (worth[c], float(strengths[cell][edge, c])))
        row.zero_()[best] = 1.0
        chosen[cell, edge] = best
        decided(count + 1)

    found: dict[str, dict[int, tuple[Edge, ...]]] = {cell: {} for cell in CELLS}
    for count, (cell, node) in enumerate(nodes):
        rows = {source: weights[cell][edge_index(node, source)] for source in range(node)}
        worth = {source: _loss_without(loss, weights, row) for source, row in rows.items()}
        strongest = {s: float(strengths[cell][edge_index(node, s)].max()) for s in rows}
        order_of_worth = sorted(rows, key=lambda s: (worth[s], strongest[s]), reverse=True)
        for source in order_of_worth[2:]:
            rows[source].zero_()
        kept = []
        for source in sorted(order_of_worth[:2]):
            choice = architecture.choices[chosen[cell, edge_index(node, source)]]
            kept.append(Edge(choice.op, source, choice.density))
        found[cell][node] = tuple(kept)
        decided(len(edges) + count + 1)
    return Genotype(**{cell: tuple(found[cell][node] for node in CONCAT) for cell in CELLS})


@torch.no_grad()
def _loss_without(loss: Callable[[Weights], float], weights: Weights, part: Tensor) -> float:
    """The loss with a part of the weights at zero; the part is what it was, afterwards."""
    kept = part.clone()
    part.zero_()
    try:
        return loss(weights)
    finally:
        part.copy_(kept)

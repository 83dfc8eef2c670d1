"""What an architecture costs, as an expectation under its weights: nonzeros and measured time.

    L = L_val + lambda_t max(0, E[time] - budget) / E_0[time] + lambda_n E[nonzeros] / E_0[nonzeros]

with ``E[c] = sum over cells, edges and choices of weight x c`` (Wu et al. 2019, FBNet, arXiv
1812.03443, equation 2) and E_0 its value at equal weights, so that lambda has the loss's scale.
Limits are hard: they hold for the genotype found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dass.genotype import CELLS, Genotype
from dass.masks import keep_count
from dass.runs import UserError
from dass.space import CONCAT, edge_index
from dass.strategies import SearchConfig
from dass.supernet import Architecture, Choice, Supernet

__all__ = ["Costs", "costs_of", "nonzero_costs"]

Table = dict[str, Tensor]  # cell -> [edges, choices]: summed over the cells of that kind


@dataclass(frozen=True)
class Costs:
    """Cost tables with their lambdas; empty tables cost nothing."""

    tables: Mapping[str, Table] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    budgets: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)

    def expected(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """E[cost], in the table's unit; differentiable by the weights."""
        return sum((weights[cell] * self.tables[name][cell]).sum() for cell in CELLS)

    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor | float:
        """What is added to the validation loss."""
        total = 0.0
        for name, factor in self.factors.items():
            if factor:
                over = self.expected(name, weights) - self.budgets.get(name, 0.0)
                total = total + factor * over.clamp_min(0) / self._at_start(name)
        return total

    def report(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Expected cost by name."""
        with torch.no_grad():
            return {name: float(self.expected(name, weights)) for name in self.tables}

    def of(self, name: str, genotype: Genotype, choices: Sequence[Choice]) -> float:
        """The cost of the operations of a genotype, in all cells of the search's depth."""
        total = 0.0
        for cell in CELLS:
            for node, edges in zip(CONCAT, getattr(genotype, cell), strict=True):
                for edge in edges:
                    row = self.tables[name][cell][edge_index(node, edge.input)]
                    total += float(row[choices.index(Choice(edge.op, edge.density))])
        return total

    def genotype(self, architecture: Architecture) -> Genotype:
        """The strongest genotype within the limits.

        ``log p - mu sum_l c_l / limit_l`` takes the place of ``log p``, with the least mu, to a
        thousandth, whose genotype is within all limits.

        Raises:
            UserError: not even the cheapest operations are within a limit.
        """
        limits = {name: limit for name, limit in self.limits.items() if limit}
        if not limits:
            return architecture.genotype()

        def found(mu: float) -> Genotype:
            prices = {
                cell: mu * sum(self.tables[n][cell] / limit for n, limit in limits.items())
                for cell in CELLS
            }
            return architecture.genotype(prices)

        def excess(genotype: Genotype) -> dict[str, float]:
            costs = {name: self.of(name, genotype, architecture.choices) for name in limits}
            return {name: cost for name, cost in costs.items() if cost > limits[name]}

        if not excess(found(0.0)):
            return found(0.0)
        low, high = 1e-9, 1e9
        if over := excess(found(high)):
            name, least = next(iter(over.items()))
            raise UserError(f"a limit of {limits[name]:g} {name} is below the least, {least:g}")
        while high > 1.001 * low:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if excess(found(middle)) else (low, middle)
        return found(high)

    def _at_start(self, name: str) -> float:
        return float(sum(table.mean(-1).sum() for table in self.tables[name].values()))


def costs_of(config: SearchConfig, network: Supernet, image: tuple[int, ...]) -> Costs:
    """The cost tables that a configuration asks for; the nonzeros are always counted."""
    tables = {"nonzeros": nonzero_costs(network, config.density)}
    if config.latency_weight or config.latency_limit_us:
        from dass.latency_table import LatencyTable

        table = LatencyTable.load(config.latency_table)
        tables["time_us"] = table.costs(network, image, config.density)
    return Costs(
        tables,
        {"nonzeros": config.nonzero_weight, "time_us": config.latency_weight},
        {"time_us": config.latency_budget_us},
        {"nonzeros": config.nonzero_limit, "time_us": config.latency_limit_us},
    )


def nonzero_costs(network: Supernet, density: float) -> Table:
    """Kept weights of every choice by the counting rule, summed over the cells of a kind."""

    def count(op: nn.Module, own: float | None) -> int:
        layers = [m for m in op.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        return sum(keep_count(m.weight.numel(), own or density) for m in layers)

    return sum_over_cells(network, count)


def sum_over_cells(network: Supernet, cost) -> Table:
    """cost(op, density of its choice or None) for each choice of each edge, summed by cell kind."""
    edges = len(network.cells[0].edges)
    tables = {cell: torch.zeros(edges, len(network.choices)) for cell in CELLS}
    for cell in network.cells:
        for e, edge in enumerate(cell.edges):
            for c, (op, choice) in enumerate(zip(edge.ops, network.choices, strict=True)):
                tables[cell.kind][e, c] += cost(op, choice.density)
    return tables

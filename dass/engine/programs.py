"""A segment's program for one layout: decided by measurement, by default, or as it was once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

import dass_kernels
from dass.engine import graph as g
from dass.engine import tuning
from dass.engine.depth_first import Fusion, groups
from dass.engine.plan import make_plan
from dass.engine.steps import Plan, suits_depthwise


@dataclass
class Decisions:
    """All that is open about a program of a graph: with the same ones it gives the same bits.

    fusions: groups that run depth first. kernels: of the plan's products, in order. measured: as
    `dass.engine.tuning.choose` gives it; empty where nothing was.
    """

    fusions: list[Fusion] = field(default_factory=list)
    kernels: list[tuning.Kernel] = field(default_factory=list)
    measured: dict[str, dict] = field(default_factory=dict)


@dataclass
class Built:
    """A segment's program for one layout."""

    plan: Plan
    program: dass_kernels.Program
    decisions: Decisions


@dataclass
class Maker:
    """Makes the programs of one graph without Torch nodes.

    pixel: images per pass: 1, or the lanes of a register, which then lie side by side.
    """

    graph: g.Graph
    pixel: int

    def groups(self) -> list[Fusion]:
        """Groups that may run depth first: planes of one image only."""
        if self.pixel > 1:
            return []
        return groups(self.graph, lambda node: suits_depthwise(node, 1))

    def plan(self, fusions: Sequence[Fusion] = ()) -> Plan:
        sparse = dass_kernels.active_isa() == "avx512"
        emitted = dass_kernels.emit_unavailable() is None
        return make_plan(
            self.graph, self.pixel, sparse_gemv=sparse, emitted=emitted, fusions=fusions
        )

    def default(self) -> Built:
        """Nothing measured: default kernels, layer by layer."""
        plan = self.plan()
        tuning.use(plan, {})
        return self._built(plan, [], {})

    def measured(self, sample: Sequence[Tensor], cache: Path | None) -> Built:
        """The fastest for a call with such tensors; see `dass.engine.tuning.choose`."""
        made: dict[int, Sequence[Fusion]] = {}  # by the id of a plan: the last one holds

        def make(fusions: Sequence[Fusion]) -> Plan:
            plan = self.plan(fusions)
            made[id(plan)] = fusions
            return plan

        one = [tensor[: self.pixel] for tensor in sample]  # one pass tells as much as many
        plan, measured = tuning.choose(make, self.groups(), one, cache)
        return self._built(plan, list(made[id(plan)]), measured)

    def as_decided(self, decisions: Decisions) -> Built:
        """The same program again.

        Raises:
            ValueError: the decisions are not of this graph.
        """
        known = {node.name for node in self.graph}
        if any(set(fusion.members) - known for fusion in decisions.fusions):
            raise ValueError("depth first layers that the network does not have")
        plan = self.plan(decisions.fusions)
        parts = tuning.products(plan)
        if len(parts) != len(decisions.kernels):
            raise ValueError(f"{len(decisions.kernels)} kernels for {len(parts)} products")
        for part, kernel in zip(parts, decisions.kernels, strict=True):
            if not tuning.exists(kernel):
                raise ValueError(f"there is no kernel {kernel}")
            tuning.set_kernel(part, kernel)
        return Built(plan, tuning.build(plan), decisions)

    def _built(self, plan: Plan, fusions: list[Fusion], measured: dict) -> Built:
        kernels = [tuning.kernel_of(part) for part in tuning.products(plan)]
        return Built(plan, tuning.build(plan), Decisions(fusions, kernels, measured))

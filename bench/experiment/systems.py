"""The systems of the experiment, one row each; a further one is a row of SYSTEMS."""

from __future__ import annotations

from dataclasses import dataclass

from dass.genotype import Genotype
from dass.zoo.darts import found_genotype

__all__ = ["BASELINE", "SYSTEMS", "System"]

BASELINE = "mobilenet_v2"  # what the paper compares with: uniform, HYDRA


@dataclass(frozen=True)
class System:
    """A network and where its weights may lie.

    Args:
        title: in tables.
        network: of the zoo; "cells" for those of a genotype.
        densities: "uniform", "erk", or "exempt": depthwise layers dense, the others uniform.
        cell: a cell of the zoo, or "random-SEED".
        search: instead, the kind of search that gives the genotype (`Protocol.search`).
    """

    title: str
    network: str = "cells"
    densities: str = "uniform"
    cell: str | None = None
    search: str | None = None

    def genotype(self) -> Genotype | None:
        """That of `cell`; None for other networks and for what is yet to be searched."""
        if self.cell is None:
            return None
        kind, _, seed = self.cell.rpartition("-")
        return Genotype.random(int(seed)) if kind == "random" else found_genotype(self.cell)


SYSTEMS: dict[str, System] = {
    BASELINE: System("MobileNet-v2, uniform", "mobilenet_v2"),
    "mobilenet_v2_erk": System("MobileNet-v2, ERK", "mobilenet_v2", "erk"),
    "mobilenet_v2_exempt": System("MobileNet-v2, depthwise dense", "mobilenet_v2", "exempt"),
    "dass_99": System("DASS, published 99 % cell", cell="dass_99"),
    "resnet18": System("ResNet-18, thinned", "resnet18"),
    "darts_v2": System("DARTS_V2", cell="darts_v2"),
    "random_0": System("random cell 0", cell="random-0"),
    "random_1": System("random cell 1", cell="random-1"),
    "random_2": System("random cell 2", cell="random-2"),
    "dass_95": System("DASS, published 95 % cell", cell="dass_95"),
    "search": System("our search, the paper's objective", search="paper"),
    "search_time": System("our search, measured time", search="time"),
    "search_density": System("our search, density per operation", search="density"),
}

"""Measured times of the search space's building blocks on this machine, and what they predict.

    table = LatencyTable.load("runs/latency.json")
    table.time_us("sep_conv_3x3", (16, 32, 32), 16, stride=1, density=0.05)

A block is timed as it stands in a final network: in eval mode, batch 1, eager, pruned at random,
each of its layers dense or sparse, whichever is faster. Densities between two that were measured
are interpolated. A block that the table lacks is measured when it is asked for.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from dass.checkpoints import CheckpointError
from dass.convert import sparsify
from dass.costs import sum_over_cells
from dass.display import Display
from dass.genotype import Genotype
from dass.pruning import prune
from dass.report import write_text
from dass.space import NODES, OPS, FactorizedReduce, relu_conv_bn
from dass.strategies import SearchConfig
from dass.supernet import Supernet
from dass.timing import machine_facts, measure
from dass.zoo.darts import CellNetwork, build

__all__ = ["DENSITIES", "Block", "LatencyTable", "blocks_of", "fill_table"]

DENSITIES = (0.01, 0.05, 0.1, 0.3, 1.0)
_FORMAT = 1
_SECONDS = 0.03
_ROUNDS = 5
_CALIBRATION_SEEDS = (1_000_003, 1_000_033, 1_000_037, 1_000_039)

Shape = tuple[int, int, int]


def _block(name: str, channels: int, out: int, stride: int) -> nn.Module:
    if name == "preprocess":
        return relu_conv_bn(channels, out)
    if name == "preprocess_reduce":
        return FactorizedReduce(channels, out)
    if name == "stem":
        return nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        )
    if name == "head":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, out))
    return OPS[name](channels, stride)


@dataclass
class LatencyTable:
    """Microseconds per block, by ``name CxHxW->O/stride`` and density.

    Args:
        threads: torch threads that the times hold for.
        machine: facts of the machine; a table of another machine is refused.
        rows: key -> {density: microseconds}.
        factor: a network's time over the sum of its blocks' (:meth:`calibrate`).
    """

    threads: int = 1
    machine: dict = field(default_factory=machine_facts)
    rows: dict[str, dict[float, float]] = field(default_factory=dict)
    factor: float = 1.0

    @classmethod
    def load(cls, path: str | os.PathLike, *, threads: int = 1) -> LatencyTable:
        """Reads a table, or starts an empty one where there is no file.

        Raises:
            CheckpointError: it is none, or was measured on another machine, build or thread count.
        """
        path, mine = Path(path), cls(threads)
        if not path.exists():
            return mine
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = {
                k: {float(d): float(us) for d, us in v.items()} for k, v in found["rows"].items()
            }
            facts, count, version = found["machine"], found["threads"], found["format"]
            factor = float(found["factor"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no latency table ({error!r})") from None
        keys = ("cpu", "torch", "dass_isa")
        pairs = [(key, facts.get(key), mine.machine.get(key)) for key in keys]
        pairs += [("threads", count, threads), ("format", version, _FORMAT)]
        wrong = [f"{key} {was}, not {now}" for key, was, now in pairs if was != now]
        if wrong:
            raise CheckpointError(
                f"{path} has {'; '.join(wrong)}: make one for here with dass latency-table"
            )
        return cls(threads, mine.machine, rows, factor)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the table as JSON, whole or not at all."""
        state = {"format": _FORMAT, "threads": self.threads, "machine": self.machine}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        state |= {"factor": self.factor, "rows": self.rows}
        write_text(Path(path), json.dumps(state, indent=1) + "\n")

    def time_us(
        self, name: str, shape: Shape, out: int, *, stride: int = 1, density: float = 1.0
    ) -> float:
        """Microseconds of one block for one image; between densities, linear in the density."""
        key = f"{name} {'x'.join(map(str, shape))}->{out}/{stride}"
        row = self.rows.setdefault(key, {})
        if "conv" not in name and name not in ("preprocess", "preprocess_reduce", "stem", "head"):
            density = 1.0
        low = max((d for d in DENSITIES if d <= density), default=DENSITIES[0])
        high = min((d for d in DENSITIES if d >= density), default=DENSITIES[-1])
        for d in {low, high} - row.keys():
            row[d] = self._measure(name, shape, out, stride, d)
        if high == low:
            return row[low]
        share = (max(density, low) - low) / (high - low)
        return row[low] + share * (row[high] - row[low])

    def _measure(self, name: str, shape: Shape, out: int, stride: int, density: float) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            block = nn.Sequential(_block(name, shape[0], out, stride)).eval()
            x = torch.randn(1, *shape)
            if density < 1 and any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in block.modules()):
                prune(block, 1 - density, method="random")
                block, _ = sparsify(block, x, num_threads=self.threads, seconds=_SECONDS)
        return self.measure_us(lambda: block(x))

    def measure_us(self, function: Callable[[], object]) -> float:
        """Median microseconds of a call in inference mode, at the table's threads."""
        took = measure({"it": function}, seconds=_SECONDS, rounds=_ROUNDS, num_threads=self.threads)
        return took["it"].median_us

    def costs(self, network: Supernet, image: Shape, density: float) -> dict[str, Tensor]:
        """Cost tables of :class:`dass.costs.Costs`: microseconds per choice of each edge."""
        shapes = network.edge_shapes(image)
        owner = {id(op): edge for edge in shapes for op in edge.ops}

        def cost(op: nn.Module, own: float | None) -> float:
            edge = owner[id(op)]
            choice = network.choices[[id(o) for o in edge.ops].index(id(op))]
            shape, stride = shapes[edge], edge.stride
            return self.time_us(choice.op, shape, shape[0], stride=stride, density=own or density)

        return sum_over_cells(network, cost)

    def predict_us(self, network: CellNetwork, density: float, image: Shape) -> float:
        """The time of a network of :func:`dass.build` on one image, from its blocks alone.

        Sums over nodes and concatenations of cells are timed as blocks too. All is multiplied by
        `factor`: a block that is timed by itself finds its data in the cache, in a network less so.
        """
        own = {name.rsplit(".", 1)[0]: d for name, d in network.edge_densities().items()}
        total = 0.0
        for block in blocks_of(network, image):
            if block.name in ("add", "cat"):
                total += self._glue(block.name, block.shape, block.out)
            else:
                kept = next((d for name, d in own.items() if name.startswith(block.place)), density)
                total += self.time_us(
                    block.name, block.shape, block.out, stride=block.stride, density=kept
                )
        return self.factor * total

    def calibrate(self, channels: int, layers: int, density: float, image: Shape) -> float:
        """Sets `factor` from four random cells, of seeds that no one else is likely to take."""
        self.factor = 1.0
        ratios = []
        for seed in _CALIBRATION_SEEDS:
            genotype = Genotype.random(seed)
            network = build(genotype, channels, layers, 10, in_channels=image[0]).eval()
            predicted = self.predict_us(network, density, image)
            ratios.append(self.network_us(network, density, image, seed) / predicted)
        self.factor = statistics.median(ratios)
        return self.factor

    def network_us(self, network: nn.Module, density: float, image: Shape, seed: int = 0) -> float:
        """The measured time of a network, pruned at random in place, as `sparsify` makes it."""
        prune(network, 1 - density, method="random", seed=seed)
        x = torch.randn(1, *image)
        fast, _ = sparsify(network, x, num_threads=self.threads)
        return self.measure_us(lambda: fast(x))

    def _glue(self, name: str, shape: Shape, count: int) -> float:
        key = f"{name} {'x'.join(map(str, shape))} {count}"
        row = self.rows.setdefault(key, {})
        if 1.0 not in row:
            parts = [torch.randn(1, *shape) for _ in range(count)]
            glue = {"add": lambda: parts[0] + parts[1], "cat": lambda: torch.cat(parts, 1)}
            row[1.0] = self.measure_us(glue[name])
        return row[1.0]


class Block(NamedTuple):
    """A part of a network: its name in the table, its input's shape, its outputs, its place."""

    name: str
    shape: Shape
    out: int
    stride: int
    place: str


def blocks_of(network: CellNetwork, image: Shape) -> list[Block]:
    """What a network of :func:`dass.build` consists of, with the shapes for one image."""
    shapes: dict[nn.Module, tuple[Shape, Shape]] = {}

    def note(module: nn.Module, args: tuple, y: Tensor) -> None:
        shapes[module] = (tuple(args[0].shape[1:]), tuple(y.shape[1:]))

    parts = {"stem": network.stem, "head": network.pool}
    for c, cell in enumerate(network.cells):
        parts |= {f"cells.{c}.preprocess{i}": getattr(cell, f"preprocess{i}") for i in (0, 1)}
        parts |= {f"cells.{c}.ops.{i}": op for i, op in enumerate(cell.ops)}
    handles = [module.register_forward_hook(note) for module in parts.values()]
    was_training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, *image))
    finally:
        for handle in handles:
            handle.remove()
        network.train(was_training)
    found = [
        Block("stem", *_ends(shapes[network.stem]), "stem"),
        Block("head", shapes[network.pool][0], network.classifier.out_features, 1, "classifier"),
    ]
    for c, cell in enumerate(network.cells):
        for i, pre in enumerate((cell.preprocess0, cell.preprocess1)):
            name = "preprocess_reduce" if isinstance(pre, FactorizedReduce) else "preprocess"
            found.append(Block(name, *_ends(shapes[pre]), f"cells.{c}.preprocess{i}."))
        for i, op in enumerate(cell.ops):
            found.append(Block(cell.edges[i].op, *_ends(shapes[op]), f"cells.{c}.ops.{i}."))
        node = shapes[cell.ops[0]][1]
        found += [Block("add", node, 2, 1, "")] * NODES + [Block("cat", node, NODES, 1, "")]
    return found


def _ends(shapes: tuple[Shape, Shape]) -> tuple[Shape, int, int]:
    """(input shape, output channels, stride), for a Block."""
    before, after = shapes
    return before, after[0], 1 if before[1:] == after[1:] else 2


def fill_table(
    config: SearchConfig, image: Shape, path: Path, threads: int, console: Console
) -> LatencyTable:
    """Measures what the relaxed network of a configuration consists of, and saves it as it goes."""
    table = LatencyTable.load(path, threads=threads)
    network = Supernet(config.channels, config.layers, 10, in_channels=image[0])
    shapes = network.edge_shapes(image)
    wanted = sorted({(shape, edge.stride) for edge, shape in shapes.items()})
    with Display({"measure": 1}, console) as display, display.stage("measure") as tell:
        for i, (shape, stride) in enumerate(wanted):
            for name in OPS:
                for density in DENSITIES:
                    table.time_us(name, shape, shape[0], stride=stride, density=density)
            table.save(path)
            tell(0.9 * (i + 1) / len(wanted), "x".join(map(str, shape)))
        tell(0.9, "whole networks")
        table.calibrate(max(2, config.channels), max(3, config.layers), config.density, image)
        table.save(path)
    return table

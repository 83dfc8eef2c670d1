"""Times of trained networks: 3x32x32, batch 1, one thread; wants a quiet machine.

Each network is timed in one process in turn with dense MobileNet-v2 of the protocol's width in
torch's fastest form, so that a ratio is taken within rounds: by `dass.sparsify` (eager, layers
swapped), by `dass.compile` (the engine), and dense. For networks of cells what a table of the times
of their blocks predicts for sparsify stands beside it; what it lacks is measured on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import dass
from bench.experiment.protocol import Protocol
from bench.experiment.rows import Row, write
from bench.experiment.running import FACTS, TABLE, today, trained
from bench.experiment.systems import BASELINE, SYSTEMS
from dass import zoo
from dass.convert import densify
from dass.latency_table import LatencyTable, fill_table
from dass.timing import Sample, dense_variants, machine_facts, measure, speedup
from dass.zoo.darts import CellNetwork

__all__ = ["fill", "time_row"]

_IMAGE = (3, 32, 32)
_TOLERANCE = 1e-3
_PREDICTIONS = "predictions-table.json"  # times of the blocks of these networks
_CALIBRATION_CHANNELS = 64  # those of the networks at hand are 55 to 85


def fill(protocol: Protocol, runs: Path, console: Console) -> Path:
    """Measures the table that one of the searches prices time with; what is there is kept."""
    path, image = runs / TABLE, (3, protocol.size, protocol.size)
    fill_table(protocol.search("paper", protocol.sparsities[0]), image, path, 1, console)
    return path


def time_row(row: Row, protocol: Protocol, runs: Path, results: Path, seconds: float) -> dict:
    """Times a finished row, and writes its file.

    Raises:
        RuntimeError: an output differs from the network's. FileNotFoundError: not trained here.
    """
    network = trained(row, runs)
    example = torch.randn(1, *_IMAGE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = network(example)
    fast, _ = dass.sparsify(network, example, num_threads=1)
    engine = dass.compile(network, example)
    ours = {"sparsify": lambda: fast(example), "compile": lambda: engine(example)}
    for name, function in ours.items():
        _check(f"{row.label} by {name}", function, want)
    dense = densify(network)
    samples = measure(
        {
            **ours,
            **{f"dense {way}": call for way, call in dense_variants(dense, example).items()},
            **{f"baseline {way}": call for way, call in _baseline(protocol, example).items()},
        },
        seconds=seconds,
        num_threads=1,
    )
    best = {part: _fastest(samples, part) for part in ("dense", "baseline")}
    facts = machine_facts()
    predicted = _predicted(network, row, runs)
    return write(
        row.file(results, "latency"),
        {
            "times": {name: sample.to_dict() for name, sample in samples.items()},
            "dense": best["dense"],
            "baseline": best["baseline"],
            "speedup": {
                name: {part: speedup(samples[way], samples[name]) for part, way in best.items()}
                for name in ours
            },
            "predicted_us": predicted,
            "machine": {key: facts[key] for key in FACTS},
            "date": today(),
        },
    )


def _baseline(protocol: Protocol, example: torch.Tensor) -> dict[str, Callable]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dense_variants(zoo.create(SYSTEMS[BASELINE].network, width=protocol.width), example)


def _fastest(samples: dict[str, Sample], part: str) -> str:
    names = [name for name in samples if name.startswith(f"{part} ")]
    return min(names, key=lambda name: samples[name].median_us)


def _check(what: str, function: Callable, want: torch.Tensor) -> None:
    with torch.inference_mode():
        error = (function() - want).abs().max() / want.abs().max()
    if not error < _TOLERANCE:
        raise RuntimeError(f"{what}: differs by {error:.1e} of the largest output")


def _predicted(network: nn.Module, row: Row, runs: Path) -> float | None:
    if not isinstance(network, CellNetwork):
        return None
    path = runs / _PREDICTIONS
    table = LatencyTable.load(path)
    if not table.rows:
        table.calibrate(_CALIBRATION_CHANNELS, len(network.cells), 1 - row.sparsity, _IMAGE)
    predicted = table.predict_us(network, 1 - row.sparsity, _IMAGE)
    table.save(path)
    return predicted

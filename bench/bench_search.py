"""The search's own figures: predicted against measured time, and the fine-tuning steps.

python -m bench.bench_search --networks 5 --density 0.05 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from bench.table import markdown
from dass.data import load
from dass.genotype import Genotype
from dass.latency_table import LatencyTable
from dass.search_cost import compare_finetuning
from dass.strategies import SearchConfig
from dass.timing import machine_facts
from dass.zoo.darts import build


def predictions(count: int, density: float, channels: int, layers: int, size: int) -> list[dict]:
    """Random cells: the time that the table gives, and the network's own."""
    table, rows = LatencyTable(), []
    table.calibrate(channels, layers, density, (3, size, size))
    for seed in range(count):
        torch.manual_seed(seed)
        network = build(Genotype.random(seed), channels, layers, 10).eval()
        predicted = table.predict_us(network, density, (3, size, size))
        took = table.network_us(network, density, (3, size, size), seed)
        error = predicted / took - 1
        rows.append({"seed": seed, "predicted_us": predicted, "us": took, "error": error})
    return rows


def finetuning(densities: list[float], channels: int, layers: int, batch: int) -> list[dict]:
    """A step of the relaxed network with frozen masks: sparse kernels over masked dense."""
    data = load("synthetic", size=32, limit=4 * batch)
    rows = []
    for density in densities:
        config = SearchConfig(
            dataset="synthetic",
            density=density,
            channels=channels,
            layers=layers,
            batch_size=batch,
        )
        rows.append({"density": density, **compare_finetuning(config, data, rounds=3)})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=5, help="random cells (default: 5)")
    parser.add_argument("--density", type=float, default=0.05, help="of those (default: 0.05)")
    parser.add_argument("--channels", type=int, default=16, help="first cells' (default: 16)")
    parser.add_argument("--layers", type=int, default=8, help="cells (default: 8)")
    parser.add_argument("--batch", type=int, default=16, help="of a step (default: 16)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    given = parser.parse_args(arguments)
    rows = predictions(given.networks, given.density, given.channels, given.layers, 32)
    error = statistics.median(abs(row["error"]) for row in rows)
    print(
        markdown(
            ("random cell", "predicted us", "measured us", "error"),
            [
                (r["seed"], f"{r['predicted_us']:.0f}", f"{r['us']:.0f}", f"{r['error']:+.1%}")
                for r in rows
            ],
        )
    )
    print(
        f"\nmedian error {error:.1%}; batch 1, 32 pixels, one thread, density {given.density:g}\n"
    )
    with torch.random.fork_rng():
        steps = finetuning([0.01, 0.05, 0.1], given.channels, given.layers, given.batch)
    print(
        markdown(
            ("density", "masked dense ms", "sparse ms", "faster"),
            [
                (
                    f"{r['density']:g}",
                    f"{r['masked']['median_us'] / 1000:.0f}",
                    f"{r['packed']['median_us'] / 1000:.0f}",
                    f"{r['speedup']:.2f}x",
                )
                for r in steps
            ],
        )
    )
    print(f"\nrelaxed network, batch {given.batch}, {torch.get_num_threads()} threads")
    if given.json:
        found = {"facts": machine_facts(), "predictions": rows, "median_error": error}
        given.json.write_text(json.dumps({**found, "finetuning": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()

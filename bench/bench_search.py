"""The search's own figures: predicted against measured time, fine-tuning steps, depthwise layers.

python -m bench.bench_search --networks 5 --density 0.05 --json out.json
python -m bench.bench_search --profile 0.01     # where a fine-tuning step's time goes
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path

import torch
from torch import nn

from bench.table import markdown
from dass.data import load
from dass.genotype import Genotype
from dass.latency_table import LatencyTable
from dass.nn import SparseConv2d
from dass.search_cost import compare_finetuning
from dass.searching import Searcher
from dass.strategies import SearchConfig
from dass.timing import machine_facts, measure, speedup
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


# channels, pixels, kernel, dilation: of the search at 8, 16 and 36 channels, batch 64.
DEPTHWISE = ((8, 32, 3, 1), (8, 32, 5, 1), (8, 32, 5, 2), (16, 32, 3, 2), (36, 32, 5, 2))


def depthwise(batch: int = 64, threads: int = 1) -> list[dict]:
    """Dense depthwise layers, forward and backward, float32 NCHW: oneDNN against the kernels."""
    rows = []
    for channels, size, kernel, dilation in DEPTHWISE:
        padding = dilation * (kernel // 2)
        dense = nn.Conv2d(
            channels, channels, kernel, 1, padding, dilation, groups=channels, bias=False
        )
        layers = {"onednn": dense, "kernels": SparseConv2d.from_dense(dense)}
        x = torch.randn(batch, channels, size, size, requires_grad=True)
        grad = torch.randn(batch, channels, size, size)

        def both(layer: nn.Module, x=x, grad=grad) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                torch.autograd.grad(layer(x), (x, layer.weight), grad)

        took = measure(
            {name: functools.partial(both, layer) for name, layer in layers.items()},
            seconds=0.1,
            num_threads=threads,
        )
        rows.append(
            {
                "layer": f"{channels} channels, {kernel}x{kernel}, dilation {dilation}",
                **{name: sample.median_us for name, sample in took.items()},
                "speedup": speedup(took["onednn"], took["kernels"]),
            }
        )
    return rows


def profile_step(density: float, channels: int, layers: int, batch: int) -> str:
    """torch's profile of a fine-tuning step on the sparse kernels, its costliest ops first."""
    data = load("synthetic", size=32, limit=4 * batch)
    config = SearchConfig(
        dataset="synthetic", density=density, channels=channels, layers=layers, batch_size=batch
    )
    run = Searcher(config, data, None)
    run.skip_to(next(i for i, phase in enumerate(run.phases) if phase.frozen))
    run.one_step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        run.one_step()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables, or a profile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=5, help="random cells (default: 5)")
    parser.add_argument("--density", type=float, default=0.05, help="of those (default: 0.05)")
    parser.add_argument("--channels", type=int, default=16, help="first cells' (default: 16)")
    parser.add_argument("--layers", type=int, default=8, help="cells (default: 8)")
    parser.add_argument("--batch", type=int, default=16, help="of a step (default: 16)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--profile", type=float, help="profile a step at this density instead")
    given = parser.parse_args(arguments)
    if given.profile:
        print(profile_step(given.profile, given.channels, given.layers, given.batch))
        return
    found = {
        "facts": machine_facts(),
        "predictions": predictions(given.networks, given.density, given.channels, given.layers, 32),
    }
    print(predictions_table(found["predictions"], given.density), end="\n\n", flush=True)
    with torch.random.fork_rng():
        found["finetuning"] = finetuning(
            [0.01, 0.05, 0.1], given.channels, given.layers, given.batch
        )
    print(finetuning_table(found["finetuning"]), end="\n\n", flush=True)
    found["depthwise"] = depthwise()
    print(depthwise_table(found["depthwise"]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def predictions_table(rows: list[dict], density: float) -> str:
    """Of `predictions`, with the median of the absolute errors."""
    lines = [
        (r["seed"], f"{r['predicted_us']:.0f}", f"{r['us']:.0f}", f"{r['error']:+.1%}")
        for r in rows
    ]
    error = statistics.median(abs(row["error"]) for row in rows)
    return (
        markdown(("random cell", "predicted us", "measured us", "error"), lines)
        + f"\n\nmedian error {error:.1%}; batch 1, 32 pixels, one thread, density {density:g}"
    )


def finetuning_table(rows: list[dict]) -> str:
    """Of `finetuning`."""
    lines = [
        (
            f"{r['density']:g}",
            f"{r['masked']['median_us'] / 1000:.0f}",
            f"{r['packed']['median_us'] / 1000:.0f}",
            f"{r['speedup']:.2f}x",
        )
        for r in rows
    ]
    first = rows[0]
    return (
        markdown(("density", "masked dense ms", "sparse ms", "faster"), lines)
        + f"\n\nrelaxed network, batch {first['batch']}, {first['threads']} threads"
    )


def depthwise_table(rows: list[dict]) -> str:
    """Of `depthwise`."""
    lines = [
        (r["layer"], f"{r['onednn']:.0f}", f"{r['kernels']:.0f}", f"{r['speedup']:.1f}x")
        for r in rows
    ]
    return (
        markdown(("dense depthwise layer", "oneDNN us", "kernels us", "faster"), lines)
        + "\n\nforward and backward, batch 64, one thread, float32"
    )


if __name__ == "__main__":
    main()

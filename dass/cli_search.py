"""The commands ``dass search`` and ``dass latency-table``; :mod:`dass.cli` has the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dass.options import (
    RUN_HELP,
    BenchThreads,
    Data,
    Exclude,
    Fresh,
    Input,
    Limit,
    Seed,
    Size,
    Threads,
)
from dass.session import on_threads, publish, session


def search(
    preset: Annotated[
        str, typer.Option(help="paper, affordable, small (hours on two cores) or smoke (minutes).")
    ] = "small",
    data: Data = "auto",
    strategy: Annotated[str | None, typer.Option(help="dass, one_loop, darts or random.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the weights to keep, in (0, 1].")
    ] = None,
    densities: Annotated[
        str | None, typer.Option(help="Densities for the search to choose from, with commas.")
    ] = None,
    epochs: Annotated[
        str | None, typer.Option(help="Of pre-training, pruning and fine-tuning, such as 50,20,50.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    second_order: Annotated[
        bool | None, typer.Option(help="Differentiate through a step of the weights.")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="As dass prune --pattern.")] = None,
    exclude: Exclude = None,
    latency_weight: Annotated[
        float, typer.Option(help="Price of the expected time against the loss.")
    ] = 0.0,
    latency_table: Annotated[
        Path | None, typer.Option(help="A file of dass latency-table, for the price of time.")
    ] = None,
    latency_limit: Annotated[
        float | None,
        typer.Option(help="Most time that the operations found may take, in microseconds."),
    ] = None,
    nonzero_limit: Annotated[
        int | None, typer.Option(help="Most weights that the operations found may have.")
    ] = None,
    guard: Annotated[
        str | None, typer.Option(help="At a sign of collapse: warn, stop, off.")
    ] = None,
    selection: Annotated[
        str | None,
        typer.Option(
            help="What picks operations at the end: alpha, perturbation (the loss without each), "
            "guarded (perturbation at a sign of collapse)."
        ),
    ] = None,
    size: Size = None,
    limit: Limit = None,
    run: Annotated[Path | None, typer.Option(help=RUN_HELP + " Default: runs/search.")] = None,
    threads: Threads = None,
    seed: Seed = 0,
    fresh: Fresh = False,
) -> None:
    """Search an architecture that lives well with few weights (DASS).

    Ends in a folder with genotype.json, cells.svg and report.html. Broken off, even killed, the
    same command goes on and ends as if nothing had happened. With torchrun it uses all processes.

    Example: **dass search --preset smoke --data digits --run runs/first-search**
    """
    with session() as console:
        from dass import arguments
        from dass.search_run import search_run

        given = {
            "strategy": strategy,
            "density": density,
            "densities": arguments.densities(densities),
            "epochs": arguments.epochs(epochs),
            "batch_size": batch_size,
            "second_order": second_order,
            "pattern": pattern,
            "exclude": tuple(exclude) if exclude else None,
            "guard": guard,
            "selection": selection,
            "size": size,
            "limit": limit,
            "latency_table": str(latency_table) if latency_table else None,
            "latency_limit_us": latency_limit,
            "nonzero_limit": nonzero_limit,
        }
        changes = {key: value for key, value in given.items() if value is not None}
        config = arguments.search(
            preset, dataset=data, seed=seed, latency_weight=latency_weight, **changes
        )
        folder = run or Path("runs/search")
        with on_threads(threads), arguments.processes():
            report = search_run(config, folder, console, fresh=fresh)
        publish(report, folder, console)


def latency_table(
    out: Annotated[Path, typer.Option(help="The table's file.")] = Path("runs/latency.json"),
    preset: Annotated[str, typer.Option(help="Of the search that the table is for.")] = "small",
    shape: Input = "3x32x32",
    threads: BenchThreads = 1,
) -> None:
    """Time the search space's operations on this machine, dense and sparse, for dass search.

    Holds for this machine, build and number of threads; what is there already is not timed again.

    Example: **dass latency-table --preset small --out runs/latency.json**
    """
    with session() as console:
        from dass import arguments
        from dass.latency_table import fill_table

        config = arguments.search(preset)
        count = arguments.at_least_one(threads)
        table = fill_table(config, arguments.shape(shape), out, count, console)
        console.print(f"{len(table.rows)} blocks in {out}")
